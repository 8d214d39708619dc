"""init_from: what is loaded, from where, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from common.errors import InputError
from common.model import VisionTransformer
from common.training.checkpoints import Checkpoints, read
from common.training.initialisation import initialise, state_dict_of
from supervised import Classification

NET = {"image_size": 8, "patch_size": 2, "classes": 5, "width": 16, "depth": 2, "heads": 2}


def net(**options) -> VisionTransformer:
    return VisionTransformer(**{**NET, **options}).eval()


def published(path: Path, key: str | None = None, **options) -> torch.nn.Module:
    """A timm model with its state dict saved at `path`, plain or below a key."""
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        **{"img_size": 8, "patch_size": 2, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2, **options}
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.save({key: model.state_dict()} if key else model.state_dict(), path)
    return model


def load(model: VisionTransformer, source: Path) -> dict:
    return initialise(model, model, str(source))


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_timm_weights_give_timm_logits(tmp_path: Path, key):
    reference, ours = published(tmp_path / "timm.pth", key), net()
    report = load(ours, tmp_path / "timm.pth")
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=1e-5)
    assert set(report["loaded"]) == set(ours.state_dict())
    assert not report["missing"] and not report["unexpected"] and not report["resampled"]
    assert "position_prior" not in report


def test_a_head_of_another_class_count_stays_fresh_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    reference, ours = published(tmp_path / "timm.pth"), net(classes=7)
    fresh = ours.head.weight.detach().clone()
    report = load(ours, tmp_path / "timm.pth")
    assert report["missing"] == ["head.weight", "head.bias"]
    assert report["unexpected"] == ["head.weight", "head.bias"]  # there, and of no use here
    assert torch.equal(ours.head.weight, fresh)
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, reference.blocks[1].mlp.fc1.weight)
    said = capsys.readouterr().out
    assert "missing: 2 head.weight, head.bias" in said and "loaded: 30 tensors" in said


@pytest.mark.parametrize("options, message", [
    ({"depth": 3}, r"does not cover the encoder: blocks.2.norm1.weight \(16,\) \(absent\), .* and 9 more"),
    ({"width": 8}, r"cls_token \(1, 1, 8\) \(there \(1, 1, 16\)\)"),
    ({"patch_size": 4}, r"patch_embed.proj.weight \(16, 48\) \(there \(16, 3, 2, 2\)\)"),
    ({"channels": 12, "patch_size": 1}, r"patch_embed.proj.weight \(16, 12\) \(there \(16, 3, 2, 2\)\)"),
])  # fmt: skip
def test_an_encoder_that_is_not_covered_is_refused_with_names_and_shapes(tmp_path: Path, options, message):
    published(tmp_path / "timm.pth")
    with pytest.raises(InputError, match=message):
        load(net(**options), tmp_path / "timm.pth")


def test_a_position_table_of_another_grid_is_resampled_and_said(tmp_path: Path):
    reference = published(tmp_path / "timm.pth", img_size=12)  # 6x6 patches of 2
    ours = net(image_size=(8, 16))
    with pytest.warns(UserWarning, match="2D prior"):
        report = load(ours, tmp_path / "timm.pth")
    assert report["position_prior"] == "interpolated" and report["resampled"] == ["pos_embed"]
    assert torch.equal(ours.pos_embed[:, 0], reference.pos_embed[:, 0])  # the class token's row is no place
    plane = reference.pos_embed[:, 1:].detach().reshape(1, 6, 6, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(plane, (4, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_a_table_of_no_square_grid_is_refused(tmp_path: Path):
    published(tmp_path / "timm.pth", img_size=(8, 12))
    with pytest.raises(InputError, match="position table of 25 rows is of no square grid with 1 prefix rows"):
        load(net(), tmp_path / "timm.pth")


def test_a_fixed_table_stays_what_its_config_says(tmp_path: Path):
    published(tmp_path / "timm.pth", img_size=12)
    ours = net(position="sincos")
    fixed = ours.pos_embed.clone()
    report = load(ours, tmp_path / "timm.pth")
    assert torch.equal(ours.pos_embed, fixed) and not report["resampled"] and "position_prior" not in report


def test_a_classifier_initialises_a_net_around_a_backbone(tmp_path: Path):
    reference = published(tmp_path / "timm.pth")
    around = torch.nn.ModuleDict({"encoder": net(classes=0), "decoder": torch.nn.Linear(16, 4)})
    report = initialise(around, around["encoder"], str(tmp_path / "timm.pth"))
    assert torch.equal(around["encoder"].blocks[0].attn.qkv.weight, reference.blocks[0].attn.qkv.weight)
    assert report["missing"] == ["decoder.weight", "decoder.bias"]
    assert report["unexpected"] == ["encoder.head.weight", "encoder.head.bias"]


# Sources


def test_a_run_gives_its_average_or_its_raw_weights(train: Callable, tmp_path: Path):
    module = train(Checkpoints(), optim={"ema": 0.9}).lightning_module
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"):
        for weights, expected in [("ema", module.average), ("raw", module.net)]:
            found = state_dict_of(source, weights)
            assert found.keys() == expected.state_dict().keys()
            assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())
    without = train(Checkpoints(), folder="without").lightning_module
    found = state_dict_of(tmp_path / "without", "ema")
    assert all(torch.equal(value, found[key]) for key, value in without.net.state_dict().items())


def test_an_average_of_another_project_is_not_taken_for_ours(tmp_path: Path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"a": torch.zeros(1)}}, tmp_path / "foreign.pt")
    assert state_dict_of(tmp_path / "foreign.pt") == {"a": torch.ones(1)}


def test_the_initial_weights_do_not_depend_on_the_device(train: Callable):
    trainer = train()
    module = Classification(trainer.lightning_module.optim, **trainer.lightning_module.vit)
    module.trainer = trainer
    with torch.device("meta"):  # as Lightning builds on a GPU
        module.configure_model()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_weights_are_compared_where_they_were_read(train: Callable, tmp_path: Path):
    """On the CPU, whatever Lightning builds on: a table of positions may be that of sines, or need resampling."""
    trainer = train(Checkpoints(), folder="source")
    module = Classification(trainer.lightning_module.optim, **trainer.lightning_module.vit)
    module.trainer, module.init_from = trainer, str(tmp_path / "source")
    with torch.device("meta"):
        module.configure_model()
    expected = state_dict_of(tmp_path / "source")
    assert all(torch.equal(value, expected[name]) for name, value in module.net.state_dict().items()
               if not name.startswith("head"))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"name": "vit"}}])
def test_a_file_without_weights_is_named(tmp_path: Path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="odd.pth holds no weights"):
        state_dict_of(tmp_path / "odd.pth")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="is not a run folder with a checkpoint"):
        state_dict_of(tmp_path)


# The command


def test_the_command_starts_from_a_run_and_records_it(command: Callable, tmp_path: Path):
    assert command("fit", "--run_name", "first", "--model.patch_size", "2").code == 0
    source = tmp_path / "runs/supervised/first"
    more = ["--init_from", source, "--run_name", "second", "--model.patch_size", "2", "--data.image_size", "4"]
    outcome = command("fit", *more, "--model.optim.lr", "0")
    assert outcome.code == 0, outcome.err
    assert "init_from resampled: 1 pos_embed" in outcome.out
    results = json.loads((tmp_path / "runs/supervised/second/results.json").read_text())
    assert results["init_from"]["position_prior"] == "interpolated"
    assert results["init_from"]["source"] == "runs/supervised/first"  # one spelling of a path, whoever typed it
    first, second = (read(tmp_path / f"runs/supervised/{name}/checkpoints/last.ckpt") for name in ("first", "second"))
    different = [k for k, v in first["state_dict"].items() if not torch.equal(v, second["state_dict"][k])
                 if k != "net.pos_embed"]  # fmt: skip
    assert not different  # nothing was trained at a rate of 0, so these are the weights that were loaded


@pytest.mark.parametrize("source, message", [
    ("absent", "error: --init_from: there is no run folder or file absent"),
    ("timm.pth", "error: --init_from: timm.pth does not cover the encoder: "),
    ("text", "error: text: truncated, or not a checkpoint"),
])  # fmt: skip
def test_the_command_refuses_a_source_in_one_line(command: Callable, tmp_path: Path, source, message):
    published(tmp_path / "timm.pth", embed_dim=32)
    (tmp_path / "text").write_text("hello")
    outcome = command("fit", "--run_name", "x", "--init_from", source)
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith(message), outcome.err
    assert not (tmp_path / "runs/supervised/x/config.yaml").exists()
