"""Depth estimation as a whole: the net against its definition, a training on rooms, pictures, predictions, refusals."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import InputError
from common.model import VisionTransformer
from common.training.optim import Recipe, parameter_groups
from supervised.depth import Depth
from supervised.depth_data import DepthData
from supervised.depth_loss import gradient_loss, log_residual, sig_loss
from supervised.depth_net import DepthNet
from supervised.rooms import Rooms

RANGE = (0.001, 10.0)
VIT = {"size": "nano", "width": 24, "depth": 2, "heads": 2}


def depth_net(class_token: bool = True, bins: int = 8) -> DepthNet:
    torch.manual_seed(0)
    pool = "cls" if class_token else "avg"
    vit = VisionTransformer((6, 8), 2, classes=0, class_token=class_token, pool=pool, **VIT)
    net = DepthNet(vit, bins, RANGE)
    torch.nn.init.normal_(net.head.weight)  # scores on both sides of zero
    return net


@pytest.mark.parametrize("class_token", [True, False])
def test_depth_is_the_published_head_s(class_token):
    """Class token beside every token, x4, then the 1x1 convolution: the order of the publication."""
    net, images = depth_net(class_token), torch.randn(2, 3, 6, 8)
    prefix = int(class_token)
    tokens = net.backbone.forward_features(images)
    if not class_token:
        tokens = net.backbone.fc_norm(tokens)
    grid = tokens[:, prefix:].transpose(1, 2).reshape(2, 24, 3, 4)
    if class_token:
        grid = torch.cat([grid, tokens[:, 0, :, None, None].expand(-1, -1, 3, 4)], 1)
    grid = F.interpolate(grid, (12, 16), mode="bilinear", align_corners=False)
    weights = F.conv2d(grid, net.head.weight[:, :, None, None], net.head.bias).relu() + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    centres = torch.tensor(np.linspace(0.001, 10, 8), dtype=torch.float32)
    expected = (weights * centres.view(1, -1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)
    assert net(images).std() > 0.1


@pytest.mark.parametrize("class_token", [True, False])
def test_every_parameter_is_trained(class_token):
    net = depth_net(class_token)
    net(torch.randn(2, 3, 6, 8)).sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_groups_know_the_backbone_behind_the_wrapper():
    net = depth_net()
    groups = parameter_groups(net, Recipe(lr=1.0, weight_decay=0.1, layer_decay=0.5), 1.0)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in net.named_parameters()}
    assert found["head.weight"] == (1.0, 0.1)
    assert found["backbone.pos_embed"] == (0.5**3, 0.0) and found["backbone.cls_token"] == (0.5**3, 0.0)
    assert found["backbone.blocks.1.mlp.fc1.weight"] == (0.5, 0.1)


def experiment(
    tmp_path: Path,
    epochs: int = 1,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    lr: float = 2e-3,
    **model: Any,
) -> tuple[L.Trainer, Depth, DepthData]:
    options = {"source": Rooms(size=(24, 32), train=40, val=6, test=5), "image_size": (12, 16), "batch_size": 8,
               "batch_per_device": 8, "eval_batch_size": 4}
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
        logger=TensorBoardLogger(str(tmp_path), name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **(trainer or {}),
    )
    trainer.seed = 0
    model = {"patch_size": 2, "bins": 16, "picture_epochs": 0, **VIT, **model}
    return trainer, Depth(Recipe(lr=lr), **model), DepthData(**{**options, **(data or {})})


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def test_ten_steps_on_rooms_lower_the_loss_and_draw_pictures(tmp_path):
    few = {"source": Rooms(size=(24, 32), train=8, val=6, test=5)}  # one step an epoch
    trainer, module, data = experiment(tmp_path, epochs=10, data=few, lr=1e-2, sig_warmup=0, gradient_loss="off",
                                       picture_epochs=10)
    trainer.callbacks.append(record := Losses())
    trainer.fit(module, data)
    assert len(record.losses) == 10
    assert np.mean(record.losses[-3:]) < 0.92 * record.losses[0]
    metrics = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    assert 0 < metrics["val/rmse"] < 4 and metrics["val/rmse_low"] != metrics["val/rmse"]
    assert {"val/rae", "val/delta1", "val/log10", "val/rmse_pooled", "val/relative_absolute_error"} <= set(metrics)
    figure = np.asarray(Image.open(tmp_path / "figures" / "depth.png").convert("RGB"))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    (shown,) = events.Images("val/depth")  # every 10 epochs
    assert (shown.height, shown.width) == figure.shape[:2] and shown.step == 10 and figure.std() > 30


def test_the_first_steps_train_on_the_mean_term_alone(tmp_path):
    def losses(warmup: int) -> list[float]:
        trainer, module, data = experiment(tmp_path / str(warmup), sig_warmup=warmup, gradient_loss="off")
        trainer.callbacks.append(record := Losses())
        trainer.fit(module, data)
        return record.losses

    short, long = losses(2), losses(100)
    assert short[:2] == long[:2] and short[2] > 2 * long[2]


def test_clipping_works_with_a_fused_optimiser_under_mixed_precision(tmp_path):
    trainer, module, data = experiment(tmp_path, trainer={"precision": "bf16-mixed", "gradient_clip_val": 0.01})
    norms = []

    class Norms(L.Callback):
        def on_train_start(self, trainer, module) -> None:
            trainer.optimizers[0].register_step_post_hook(self.note)

        def note(self, *_) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    trainer.callbacks.append(Norms())
    trainer.fit(module, data)
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)


def test_a_batch_whose_variance_would_be_split_is_refused(tmp_path):
    trainer, module, data = experiment(tmp_path, data={"batch_per_device": 4})
    with pytest.raises(InputError, match=r"data\.batch_size: .* needs the 8 images .* data\.batch_per_device=8"):
        trainer.fit(module, data)


def test_evaluation_averages_with_the_mirror_image():
    module, images = Depth(Recipe(lr=1.0)), torch.rand(1, 3, 4, 6)
    left = lambda x: x[:, :1] * torch.arange(6.0)  # noqa: E731, a net that is not symmetric
    mirrored = left(images.flip(-1)).flip(-1)
    torch.testing.assert_close(module.predict_depth(left, images), (left(images) + mirrored) / 2)
    assert torch.equal(Depth(Recipe(lr=1.0), flip_average=False).predict_depth(left, images), left(images))


def test_predict_writes_millimetres_and_a_preview_of_each_image_s_own_size(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in [("a.jpg", (40, 30)), ("sub/b.png", (64, 20))]:
        Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(pictures / name)
    trainer, module, data = experiment(tmp_path / "run", data={"images": str(pictures)})
    trainer.predict(module, data, return_predictions=False)
    written = tmp_path / "run" / "predictions"
    for name, shape in [("a.jpg", (30, 40)), ("sub/b.png", (20, 64))]:
        depth = np.asarray(Image.open(written / f"{name}.depth.png"))
        assert depth.dtype == np.uint16 and depth.shape == shape
        assert 1000 < depth.mean() < 9000  # an untrained net is in the middle of its bins
        assert np.asarray(Image.open(written / f"{name}.preview.png")).shape == (*shape, 3)


@pytest.mark.parametrize(("images", "message"), [(None, "data.images: None"), ("no/where", "data.images: no/where")])
def test_predict_without_images_is_refused(tmp_path, images, message):
    with pytest.raises(InputError, match=message):
        experiment(tmp_path, data={"images": images})[2].load("predict")


def test_cost_counts_the_head(tmp_path):
    _, module, data = experiment(tmp_path)
    module._trainer = SimpleNamespace(precision="32-true")
    net = module.build(data)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, 12, 16))
    assert module.cost(net).forward_flops == counter.get_total_flops()


@pytest.mark.parametrize(("option", "message"), [
    ({"bins": 1}, "model.bins: 1"),
    ({"depth_range": (0.0, 10.0)}, "model.depth_range"),
    ({"depth_range": (5.0, 2.0)}, "model.depth_range"),
    ({"gradient_weight": -1.0}, "model.gradient_weight"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        Depth(Recipe(lr=1.0), **option)


def test_the_command_line_offers_the_model_s_options_and_not_the_data_s():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(Depth, "model")
    keys = set(parser.get_defaults().model.as_dict())
    assert {"size", "patch_size", "position", "drop_path", "class_token", "bins"} <= keys
    assert not {"image_size", "channels", "classes", "pool"} & keys


def test_a_bare_off_in_yaml_is_off():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(Depth, "model")
    config = parser.parse_string("model: {gradient_loss: off, optim: {lr: 1.0}}")
    assert parser.instantiate(config).model.gradient_weight == 0


@pytest.mark.parametrize("kind, weight, step", [("spatial", 0.5, 200), ("spatial", 2.0, 200), ("off", 0.5, 200),
                                                ("spatial", 0.5, 5)])
def test_the_loss_is_the_sum_of_its_terms(kind: str, weight: float, step: int) -> None:
    module = Depth(Recipe(lr=1.0), gradient_loss=kind, gradient_weight=weight, sig_warmup=100)
    module.trainer = SimpleNamespace(global_step=step)
    prediction, truth = 1 + torch.rand(2, 1, 6, 8), 1 + torch.rand(2, 1, 6, 8)
    module.net = net = torch.nn.Identity()
    net.backbone = SimpleNamespace(drop_path=0)
    net.forward = lambda images, drops: prediction
    valid = torch.ones_like(truth, dtype=torch.bool)
    residual = log_residual(prediction, truth, valid)
    expected = sig_loss(residual, valid, mean_only=step < 100)
    if kind == "spatial":
        expected = expected + weight * gradient_loss(residual, valid)
    torch.testing.assert_close(module.training_step({"image": truth, "depth": truth}, 0), expected)
