"""Classification of permuted images: the intact one without swaps, and one order of pixels in every stage."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import Digits
from common.model import VisionTransformer
from common.training.checkpoints import read
from locality_ablation.permutation import Permutation, PixelPermutation
from supervised import Classification

CONFIG = Path(__file__).parents[2] / "locality_ablation" / "configs" / "digits.yaml"
# All that augments and mixes, several micro-batches a step, and an average that is evaluated beside the weights.
EVERYTHING = ["--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.drop_path", "0.2", "--model.optim.ema", "0.9",
              "--model.label_smoothing", "0.1", "--data.augment.flip", "0.5", "--data.augment.crop_scale", "[0.3,1.0]",
              "--data.batch_per_device", "64", "--checkpoint.every_n_steps", "4", "--model.patch_size", "2",
              "--data.batch_size", "256"]  # fmt: skip
TWENTY = ["--model.permutation.swaps", "20"]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def checkpoint_of(folder: Path) -> dict:
    return read(folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def ablation(command: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Runs `python -m locality_ablation SUBCOMMAND`, which succeeds, and returns the run's folder."""

    def run(subcommand: str, name: str, *args) -> Path:
        outcome = command(subcommand, "--run_name", name, *args, study="locality_ablation", config=CONFIG)
        assert outcome.code == 0, outcome.err
        return tmp_path / "runs" / "locality_ablation" / name

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The images that reach a net, call by call."""
    calls, forward = [], VisionTransformer.forward

    def recorded(self, images: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        calls.append(images.detach().clone())
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward", recorded)
    return calls


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for seed in range(3):
        picture = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{seed}.png")
    return tmp_path / "pictures"


# Against the intact model


@pytest.mark.parametrize("options", [["--model.patch_size", "2"], EVERYTHING], ids=["plain", "everything"])
def test_without_swaps_a_run_is_that_of_supervised_bit_for_bit(ablation, command, tmp_path, options):
    permuted = ablation("fit", "a", *options, "--model.permutation.swaps", "0")
    assert command("fit", "--run_name", "a", *options).code == 0
    intact = tmp_path / "runs" / "supervised" / "a"
    ours, theirs = checkpoint_of(permuted), checkpoint_of(intact)
    assert torch.equal(ours["state_dict"].pop("permuted.order"), torch.arange(64))
    for part in (lambda c: c["state_dict"], lambda c: c.get("ema", {}).get("state_dict", {})):
        assert part(ours).keys() == part(theirs).keys()
        assert all(torch.equal(value, part(theirs)[name]) for name, value in part(ours).items())
    metrics = [{tag: value for tag, value in results(folder)["metrics"].items() if tag.startswith("val")}
               for folder in (permuted, intact)]  # fmt: skip
    assert metrics[0] == metrics[1] and "val/acc1" in metrics[0]
    assert results(permuted)["parameters"] == results(intact)["parameters"]


def test_with_swaps_it_is_another(ablation):
    weights = [checkpoint_of(ablation("fit", name, *options))["state_dict"]["net.patch_embed.proj.weight"]
               for name, options in (("intact", []), ("swapped", TWENTY))]  # fmt: skip
    assert not torch.equal(*weights)


def test_every_stage_sees_the_images_of_the_intact_model_in_the_same_order(ablation, seen, pictures):
    """After flips, crops, mixup and cutmix, of which the intact run's net has seen the results."""
    stages = [("fit", []), ("validate", []), ("test", []), ("predict", ["--data.images", pictures])]
    calls = {}
    for name, options in (("intact", []), ("swapped", TWENTY)):
        for stage, more in stages:
            seen.clear()
            folder = ablation(stage, name, *EVERYTHING, *options, *more)
            calls[name, stage] = list(seen)
    order = checkpoint_of(folder)["state_dict"]["permuted.order"]
    assert (order != torch.arange(64)).sum() == 40 and torch.equal(order[order], torch.arange(64))
    for stage, _ in stages:
        intact, swapped = calls["intact", stage], calls["swapped", stage]
        assert len(intact) == len(swapped) > 0
        for one, other in zip(intact, swapped, strict=True):
            assert torch.equal(other, one.flatten(2)[:, :, order].view_as(one)), stage
    # 4 steps of 4 micro-batches an epoch; the average and the weights on 300 images in two batches.
    assert len(calls["swapped", "fit"]) == 2 * (4 * 4 + 2 * 2)
    assert len(calls["swapped", "test"]) == 4 and len(calls["swapped", "predict"]) == 1


def test_the_average_is_evaluated_on_permuted_images(ablation):
    folder = ablation("fit", "a", *EVERYTHING, *TWENTY)
    ablation("test", "a", *EVERYTHING, *TWENTY)
    content = checkpoint_of(folder)
    order = content["state_dict"]["permuted.order"]
    assert not [name for name in content["ema"]["state_dict"] if "order" in name]
    net = VisionTransformer(8, 2, channels=1, classes=10, width=16, depth=1, heads=2)
    for split in ("val", "test"):
        images, labels = Digits().read(Path(), split)
        images = (images / 255 * 2 - 1).flatten(2)[:, :, order].view(-1, 1, 8, 8)
        for tag, weights in ((split, content["ema"]["state_dict"]), (f"{split}_raw", {
            name.removeprefix("net."): value for name, value in content["state_dict"].items() if name.startswith("net.")
        })):  # fmt: skip
            net.load_state_dict(weights)
            with torch.no_grad():
                loss = F.cross_entropy(net(images), labels).item()
            assert results(folder)["metrics"][f"{tag}/loss"] == pytest.approx(loss, abs=1e-5)


# What a run keeps


def test_a_test_uses_the_order_of_the_checkpoint(ablation, seen):
    folder = ablation("fit", "a", *TWENTY)
    seen.clear()
    ablation("test", "a", *TWENTY)
    images = torch.cat(seen)
    path = folder / "checkpoints" / "last.ckpt"
    content = read(path)
    order, other = content["state_dict"]["permuted.order"], torch.arange(64).flip(0)
    content["state_dict"]["permuted.order"] = other
    torch.save(content, path)
    seen.clear()
    with pytest.warns(UserWarning, match="trained under another permutation.*the checkpoint's is used"):
        ablation("test", "a", *TWENTY)
    intact = images.flatten(2)[:, :, order]  # a swap undoes itself
    assert torch.equal(torch.cat(seen).flatten(2), intact[:, :, other])


def test_the_permutations_seed_is_the_runs_unless_given(ablation):
    def order(name: str, *args) -> torch.Tensor:
        folder = ablation("fit", name, *TWENTY, "--trainer.max_epochs", "1", *args)
        return checkpoint_of(folder)["state_dict"]["permuted.order"]

    first = order("a")
    assert not torch.equal(order("b", "--seed_everything", "1"), first)
    assert torch.equal(order("c", "--seed_everything", "1", "--model.permutation.seed", "0"), first)


@pytest.mark.parametrize("options, warned", [
    (["--model.permutation.swaps", "21"], True), ([*TWENTY, "--model.permutation.seed", "1"], True),
    (TWENTY, False), ([], True),
], ids=["more swaps", "another seed", "the same", "intact"])  # fmt: skip
def test_a_start_from_a_run_under_another_permutation_warns(ablation, options, warned):
    source = ablation("fit", "source", *TWENTY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = ablation("fit", "a", *options, "--init_from", source)
    said = [str(w.message) for w in caught if "was trained under another permutation; model.permutation's is used" in
            str(w.message)]  # fmt: skip
    assert len(said) == warned
    order = checkpoint_of(folder)["state_dict"]["permuted.order"]
    assert torch.equal(order, checkpoint_of(source)["state_dict"]["permuted.order"]) == (not warned)


def test_a_start_from_a_run_without_permutation_is_possible(ablation, command, tmp_path):
    assert command("fit", "--run_name", "source").code == 0
    ablation("fit", "a", *TWENTY, "--init_from", tmp_path / "runs" / "supervised" / "source")


def test_a_resumed_run_ends_bit_identical(ablation, command, monkeypatch):
    whole = ablation("fit", "whole", *EVERYTHING, *TWENTY)
    training_step = Classification.training_step

    def failing(self, batch: dict, index: int) -> torch.Tensor:
        if self.trainer.global_step == 6:
            raise RuntimeError("a cosmic ray")
        return training_step(self, batch, index)

    with monkeypatch.context() as fault:
        fault.setattr(Classification, "training_step", failing)
        arguments = ["--run_name", "a", *EVERYTHING, *TWENTY]
        assert command("fit", *arguments, study="locality_ablation", config=CONFIG).code == 1
    resumed = ablation("fit", "a", *EVERYTHING, *TWENTY)
    one, other = checkpoint_of(whole), checkpoint_of(resumed)
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert all(torch.equal(value, part(other)[name]) for name, value in part(one).items())
    assert one["global_step"] == other["global_step"] == 8
    assert results(resumed)["metrics"]["val/loss"] == results(whole)["metrics"]["val/loss"]


def test_check_says_how_many_pairs_are_swapped(command):
    """`check` builds the net alone, so that the recipe's note finds no permutation."""
    outcome = command("check", *TWENTY, study="locality_ablation", config=CONFIG)
    assert outcome.code == 0 and "20 of 32 (62.5%)" in outcome.out


def test_check_refuses_what_fit_would(command):
    outcome = command("check", "--model.permutation.swaps", "33", study="locality_ablation", config=CONFIG)
    assert outcome.code == 2 and "model.permutation.swaps: 33 are more than the 32 pairs" in outcome.err


@pytest.mark.parametrize("options, message", [
    (["--model.permutation.swaps", "33"], "model.permutation.swaps: 33 are more than the 32 pairs of 8x8 pixels"),
    (["--model.permutation.delta", "1"], "model.permutation.delta: 1 allows no swap"),
    (["--model.permutation.swaps", "3", "--model.permutation.share", "1"], "model.permutation.share: 1"),
    (["--model.permutation.swaps", "32", "--model.permutation.delta", "2"], "this seed reaches "),
    (["--model.permutation.swap", "3"], "model.permutation.swap"),
    (["--model.permutation.delta", "near"], "model.permutation.delta"),
    (["--model.permutation.swaps", "3", "--model.permutation.pairs", "shared"], "do not divide over 4 patches"),
])  # fmt: skip
def test_what_a_user_can_mend_is_said_in_a_line(command, options, message):
    outcome = command("fit", *options, study="locality_ablation", config=CONFIG)
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err


def test_a_share_and_the_unlimited_distance_can_be_typed(ablation):
    order = checkpoint_of(ablation("fit", "a", "--model.permutation.share", "0.5", "--model.permutation.delta", "inf",
                                   "--trainer.max_epochs", "1"))["state_dict"]["permuted.order"]  # fmt: skip
    assert (order != torch.arange(64)).sum() == 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_has_the_order_of_one_on_a_cpu(ablation):
    orders = [checkpoint_of(ablation("fit", device, *TWENTY, "--trainer.max_epochs", "1", "--trainer.accelerator",
                                     device))["state_dict"]["permuted.order"] for device in ("cpu", "gpu")]  # fmt: skip
    assert torch.equal(orders[0], orders[1].cpu())


# What a permutation cannot change


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(**{"classes": 7, "width": 24, "depth": 2, "heads": 2, **options}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("size, patch_size, channels, inside", [((8, 12), 4, 3, 7), ((9, 9), 3, 1, 4),
                                                                ((8, 8), 2, 3, 1)])  # fmt: skip
@pytest.mark.parametrize("class_token", [True, False])
def test_shared_swaps_reorder_the_inputs_of_the_projection(size, patch_size, channels, inside, class_token):
    """(b): with the projection's columns in the same order the logits are those of the intact model."""
    patches = size[0] * size[1] // patch_size**2
    order = Permutation(swaps=inside * patches, pairs="shared").order(size, patch_size, 3)
    net = vit(image_size=size, patch_size=patch_size, channels=channels, class_token=class_token,
              pool="cls" if class_token else "avg")  # fmt: skip
    images = torch.randn(4, channels, *size)
    expected = net(images)
    permuted = PixelPermutation(order, size)(images)
    assert (net(permuted) - expected).abs().max() > 0.01
    columns = []
    for y in range(patch_size):  # the first patch's own, as the projection counts them: row, column, channel
        for x in range(patch_size):
            source = int(order[y * size[1] + x])
            place = source // size[1] * patch_size + source % size[1]
            columns += [place * channels + channel for channel in range(channels)]
    with torch.no_grad():
        net.patch_embed.proj.weight.copy_(net.patch_embed.proj.weight[:, columns].clone())
    torch.testing.assert_close(net(permuted), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [
    {"swaps": 48}, {"swaps": 30, "delta": 2}, {"share": 0.4, "delta": 3, "distance": "manhattan"},
    {"swaps": 20, "pairs": "across", "patch_size": 4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("class_token", [True, False])
def test_any_permutation_reorders_the_positions_of_a_pixel_model(options, class_token):
    """(c): with the table's rows in the same order the logits are those of the intact model."""
    net = vit(image_size=(8, 12), patch_size=1, class_token=class_token, pool="cls" if class_token else "avg")
    order = Permutation(**options).order((8, 12), 1, 3)
    images = torch.randn(3, 3, 8, 12)
    expected = net(images)
    permuted = PixelPermutation(order, (8, 12))(images)
    assert (net(permuted) - expected).abs().max() > 0.01
    prefix = int(class_token)
    rows = [*range(prefix), *(prefix + source for source in order.tolist())]
    with torch.no_grad():
        net.pos_embed.copy_(net.pos_embed[:, rows].clone())
    torch.testing.assert_close(net(permuted), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_without_positions_an_image_is_a_set_of_patches(pool):
    """Patches that move as wholes change nothing; pixels that leave their patch do, unless they are the patches."""
    net = vit(image_size=8, patch_size=2, position="none", pool=pool)
    images = torch.randn(3, 3, 8, 8)
    numbers, order = torch.arange(64).view(8, 8), torch.empty(8, 8, dtype=torch.int64)
    corners = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
    for (y, x), source in zip(corners, torch.randperm(16).tolist(), strict=True):
        top, left = corners[source]
        order[y : y + 2, x : x + 2] = numbers[top : top + 2, left : left + 2]
    whole = PixelPermutation(order.flatten(), (8, 8))(images)
    assert not torch.equal(whole, images)
    torch.testing.assert_close(net(whole), net(images), atol=1e-5, rtol=1e-5)
    across = PixelPermutation(Permutation(swaps=32, pairs="across").order((8, 8), 2, 0), (8, 8))(images)
    assert (net(across) - net(images)).abs().max() > 0.01
    pixels = vit(image_size=8, patch_size=1, position="none", pool=pool)
    torch.testing.assert_close(pixels(across), pixels(images), atol=1e-5, rtol=1e-5)
