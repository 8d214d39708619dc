"""Fine-tuning and linear probing from a pre-training run, by their commands."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.training.checkpoints import read
from common.training.optim import Recipe
from supervised import Classification

SOURCE = "runs/mae/source"
# Of one block: the class token, the position table, the patch projection and twelve of the block.
ENCODER = 16


@pytest.fixture
def source(done: Callable, tmp_path: Path) -> Path:
    """The folder of a pre-training run with an average."""
    done("fit", "--run_name", "source", "--model.optim.ema", "0.9")
    return tmp_path / SOURCE


def weights(run: Path, average: bool = False) -> dict[str, Tensor]:
    """The net's weights in the last checkpoint of a run."""
    checkpoint = read(run / "checkpoints/last.ckpt")
    if average:
        return checkpoint["ema"]["state_dict"]
    return {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}


def is_encoder(name: str) -> bool:
    return name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def scores(out: str) -> dict[str, list[float]]:
    """The printed table: name -> values of the columns."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: [float(value) for value in row[1:]] for row in rows if row and row[0] in ("loss", "acc1", "acc5")}


# Fine-tuning


def test_a_fine_tuning_starts_from_the_average_of_the_run(done: Callable, tmp_path: Path, source: Path) -> None:
    still = ["--init_from", SOURCE, "--run_name", "tuned", "--model.optim.lr", "0"]  # trains nothing
    lines = done("fit", *still, config="digits_finetune").splitlines()
    tuned, average, raw = weights(tmp_path / "runs/mae/tuned"), weights(source, average=True), weights(source)
    encoder = {name for name in tuned if is_encoder(name)}
    assert len(encoder) == ENCODER
    assert all(torch.equal(tuned[name], average[name]) for name in encoder)
    assert sum(not torch.equal(average[name], raw[name]) for name in encoder) > ENCODER / 2

    fresh = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    unexpected = [name for name in average if name == "mask_token" or name.startswith(("norm.", "decoder_"))]
    assert len(unexpected) + ENCODER == len(average)
    assert f"init_from missing: 4 {', '.join(fresh)}" in lines
    assert next(line for line in lines if line.startswith("init_from loaded: ")).startswith("init_from loaded: 16 ")
    said = next(line for line in lines if line.startswith("init_from unexpected: "))
    assert said.startswith("init_from unexpected: 22 ") and "decoder_blocks (12)" in said and "mask_token (1)" in said
    found = results(tmp_path / "runs/mae/tuned")["init_from"]
    assert (found["source"], found["missing"], set(found["loaded"])) == (SOURCE, fresh, encoder)
    assert set(found["unexpected"]) == set(unexpected)
    assert found["resampled"] == [] and "position_prior" not in found

    head = tuned["head.weight"]
    assert head.shape == (10, 16) and not tuned["head.bias"].any()
    assert head.std().item() == pytest.approx(2e-5, rel=5 / (2 * head.numel()) ** 0.5)  # five standard errors


def test_a_fine_tuning_trains_the_whole_encoder(done: Callable, tmp_path: Path, source: Path) -> None:
    done("fit", "--init_from", SOURCE, "--run_name", "tuned", config="digits_finetune")
    before, after = weights(source, average=True), weights(tmp_path / "runs/mae/tuned")
    assert not [name for name in after if is_encoder(name) and torch.equal(before[name], after[name])]


def test_the_position_table_is_resampled_to_another_image_size(done: Callable, tmp_path: Path, source: Path) -> None:
    still = ["--init_from", SOURCE, "--run_name", "large", "--model.optim.lr", "0", "--data.image_size", "12"]
    with pytest.warns(UserWarning, match="pos_embed: the position table was interpolated to another grid"):
        out = done("fit", *still, config="digits_finetune")
    assert "init_from resampled: 1 pos_embed" in out
    found = results(tmp_path / "runs/mae/large")["init_from"]
    assert (found["position_prior"], found["resampled"]) == ("interpolated", ["pos_embed"])
    table, large = weights(source, average=True)["pos_embed"], weights(tmp_path / "runs/mae/large")["pos_embed"]
    plane = table[0, 1:].T.reshape(1, 16, 4, 4)
    expected = F.interpolate(plane, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(large[0, 1:], expected)
    assert torch.equal(large[0, 0], table[0, 0])


def test_null_starts_from_random_weights(done: Callable, tmp_path: Path) -> None:
    out = done("fit", "--init_from", "null", "--run_name", "scratch", config="digits_finetune")
    found = results(tmp_path / "runs/mae/scratch")
    assert found["status"] == "finished" and "init_from" not in found and "init_from" not in out


REQUIRED = ("--init_from: this config starts from trained weights; name a run folder or a checkpoint, or null to start "
            "from random weights")  # fmt: skip


@pytest.mark.parametrize("config", ["digits_finetune", "digits_probe"])
@pytest.mark.parametrize("word", ["fit", "validate"])
def test_what_needs_trained_weights_says_so(mae: Callable, tmp_path: Path, config: str, word: str) -> None:
    said = mae(word, config=config)
    assert (said.code, said.err.splitlines()[-1]) == (2, f"error: {REQUIRED}")
    assert not (tmp_path / "runs").exists()


def test_another_encoder_is_refused(mae: Callable, tmp_path: Path, source: Path) -> None:
    for options, parts in [
        (["--model.patch_size", "4"], ["patch_embed.proj.weight (16, 16) (there (16, 4))"]),
        (["--model.width", "32"], ["cls_token (1, 1, 32) (there (1, 1, 16))", "and 13 more"]),
        (["--model.depth", "2"], ["blocks.1.norm1.weight (16,) (absent)", "and 9 more"]),
    ]:
        said = mae("fit", "--init_from", SOURCE, "--run_name", "other", *options, config="digits_finetune")
        line = said.err.splitlines()[-1]
        assert said.code == 2 and line.startswith(f"error: --init_from: {SOURCE} does not cover the encoder: "), said
        assert all(part in line for part in parts), line
        assert not (tmp_path / "runs/mae/other").exists()
    said = mae("fit", "--init_from", "absent", "--run_name", "other", config="digits_finetune")
    line = "error: --init_from: there is no run folder or file absent"
    assert (said.code, said.err.splitlines()[-1]) == (2, line)


def test_a_fine_tuned_run_is_validated_without_a_folder_of_its_own(
    done: Callable, tmp_path: Path, source: Path
) -> None:
    started = ["--init_from", SOURCE, "--run_name", "tuned"]
    done("fit", *started, config="digits_finetune")
    tuned = tmp_path / "runs/mae/tuned"
    before, expected = results(tuned), results(tuned)["metrics"]
    for options, weights_of in [(started, "runs/mae/tuned after 18 steps"),
                                (["--init_from", "runs/mae/tuned"], "runs/mae/tuned")]:  # fmt: skip
        out = done("validate", *options, config="digits_finetune")
        assert f"{weights_of} on digits, val: 300 images" in out
        for name, values in scores(out).items():
            assert values == pytest.approx([expected[f"val/{name}"]], abs=0.005), name
    assert {path.name for path in (tmp_path / "runs/mae").iterdir()} == {"source", "tuned"}
    assert results(tuned) == before


# Linear probing


def probe() -> tuple[Classification, torch.nn.Module]:
    module = Classification(Recipe(lr=0.1), probe=True, patch_size=2, width=8, depth=1, heads=2, size="nano")
    torch.manual_seed(0)
    return module, module.build(SimpleNamespace(image_size=(4, 4), channels=1, class_names=["a", "b", "c"]))


def test_the_head_of_a_probe_by_hand() -> None:
    module, net = probe()
    with torch.no_grad():
        net.head[1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    weight, bias = net.head[1].weight, net.head[1].bias
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == {
        "head.1.weight", "head.1.bias"}  # fmt: skip
    assert not list(net.head[0].parameters())  # nothing affine
    running_mean, running_variance = torch.zeros(8), torch.ones(8)
    for step in range(3):
        images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        features = net.forward_features(images)[:, 0]  # the class token
        mean, variance = features.mean(0), features.var(0, unbiased=False)
        expected = (features - mean) / (variance + 1e-6).sqrt() @ weight.T + bias
        torch.testing.assert_close(net.train()(images), expected)
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_variance = 0.9 * running_variance + 0.1 * variance * 6 / 5  # unbiased, as torch keeps it
    expected = (features - running_mean) / (running_variance + 1e-6).sqrt() @ weight.T + bias
    torch.testing.assert_close(net.eval()(images), expected)
    alone = net(images[2:3])  # of its own, whatever else is in the batch
    torch.testing.assert_close(alone, expected[2:3])


def test_a_probe_trains_the_head_alone_and_resumes_bit_for_bit(
    done: Callable, mae: Callable, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--init_from", SOURCE, "--model.optim.ema", "0.9", "--checkpoint.every_n_steps", "4"]
    done("fit", *options, "--run_name", "whole", config="digits_probe")
    whole = tmp_path / "runs/mae/whole"
    start = weights(source, average=True)
    for trained in (weights(whole), weights(whole, average=True)):
        kept = {name for name in trained if is_encoder(name) or name.startswith("norm.")}
        assert trained.keys() - kept == {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked",
                                         "head.1.weight", "head.1.bias"}  # fmt: skip
        assert all(torch.equal(trained[name], start[name]) for name in kept)
        assert trained["head.1.bias"].abs().min() > 0  # it starts at 0
    assert weights(whole)["head.0.num_batches_tracked"] == 18
    # The statistics go from 0 towards features that stay the same, a tenth of the way a step, and the average follows.
    raw, average = (weights(whole, average)["head.0.running_mean"].norm() for average in (False, True))
    expected = (1 - 0.9**17 * (0.9 + 17 * 0.09)) / (1 - 0.9**18)
    assert (average / raw).item() == pytest.approx(expected, rel=0.05)

    trained = results(whole)
    out = done("validate", *options, "--run_name", "whole", config="digits_probe")
    for name, values in scores(out).items():
        expected = [trained["metrics"][f"{stage}/{name}"] for stage in ("val", "val_raw")]
        assert values == pytest.approx(expected, abs=0.005)
    assert results(whole) == trained

    step = Classification.training_step

    def stop(module: Classification, *args) -> Tensor:
        if module.trainer.global_step == 14:
            raise RuntimeError("stopped")
        return step(module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", stop)
        said = mae("fit", *options, "--run_name", "cut", config="digits_probe")
    cut = tmp_path / "runs/mae/cut"
    assert said.code == 1 and weights(cut)["head.0.num_batches_tracked"] == 12
    done("fit", *options, "--run_name", "cut", config="digits_probe")
    for average in (False, True):
        resumed = weights(cut, average)
        assert all(torch.equal(value, resumed[name]) for name, value in weights(whole, average).items())


def test_a_probe_refuses_micro_batches(mae: Callable, tmp_path: Path, source: Path) -> None:
    said = mae("fit", "--init_from", SOURCE, "--run_name", "a", "--data.batch_per_device", "64", config="digits_probe")
    assert said.code == 2 and said.err.splitlines()[-1] == (
        "error: data.batch_size: the loss is no mean over images and needs the 128 images of a device at once, but it "
        "holds 64; use at most 64, more devices, or model.checkpoint_blocks=auto, or set data.batch_per_device=128 if "
        "they fit"
    )
    assert not (tmp_path / "runs/mae/a").exists()


# The source of the weights


def test_the_report_outlives_a_resumed_run(
    mae: Callable, done: Callable, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--init_from", SOURCE, "--run_name", "a", "--data.image_size", "16"]
    step = Classification.training_step

    def breaking(module: Classification, batch: dict[str, Tensor], number: int) -> Tensor:
        if module.trainer.global_step == 12:  # in the second of two epochs
            raise RuntimeError("lightning struck")
        return step(module, batch, number)

    with monkeypatch.context() as broken:
        broken.setattr(Classification, "training_step", breaking)
        assert mae("fit", *options, config="digits_finetune").code == 1
    before = results(tmp_path / "runs/mae/a")
    assert before["status"] == "failed" and before["init_from"]["position_prior"] == "interpolated"
    done("fit", *options, config="digits_finetune")
    after = results(tmp_path / "runs/mae/a")
    assert after["status"] == "finished" and after["init_from"] == before["init_from"]


def test_a_run_of_weights_that_were_trained_anew_is_not_finished(mae: Callable, done: Callable, source: Path) -> None:
    tuned = ["fit", "--init_from", SOURCE, "--run_name", "a"]
    done(*tuned, config="digits_finetune")
    assert done(*tuned, config="digits_finetune").startswith("finished: ")
    done("fit", "--run_name", "source", "--model.optim.lr", "1e-3", "--overwrite")
    outcome = mae(*tuned, config="digits_finetune")
    assert outcome.code == 2 and "runs/mae/a started from weights that are no longer in runs/mae/source" in outcome.err
    done(*tuned, "--overwrite", config="digits_finetune")
    assert done(*tuned, config="digits_finetune").startswith("finished: ")


def test_a_finished_run_does_not_need_its_source(done: Callable, source: Path) -> None:
    tuned = ["fit", "--init_from", SOURCE, "--run_name", "a"]
    done(*tuned, config="digits_finetune")
    source.rename(source.with_name("elsewhere"))
    assert done(*tuned, config="digits_finetune").startswith("finished: ")


def test_one_run_however_its_source_is_spelt(done: Callable, tmp_path: Path, source: Path) -> None:
    done("fit", "--init_from", SOURCE, config="digits_finetune")
    for spelling in (f"{SOURCE}/", f"./{SOURCE}", str(source)):
        assert done("fit", "--init_from", spelling, config="digits_finetune").startswith("finished: ")


@pytest.mark.parametrize("given, message", [
    ("", "this config starts from trained weights"), ("required", "this config starts from trained weights"),
    (f"{SOURCE} --model.heads 4", "was trained with heads=2, and model.heads is 4"),
])  # fmt: skip
def test_a_source_that_cannot_be_meant_is_refused(mae: Callable, source: Path, given: str, message: str) -> None:
    name, *more = given.split(" ")
    outcome = mae("fit", "--init_from", name, "--run_name", "a", *more, config="digits_finetune")
    assert outcome.code == 2 and message in outcome.err


def test_a_grid_that_is_not_square_is_known(done: Callable, tmp_path: Path) -> None:
    done("fit", "--run_name", "wide", "--data.image_size", "[4,16]")  # 2x8 patches, as many as 4x4
    out = done("fit", "--init_from", "runs/mae/wide", "--run_name", "a", "--model.optim.lr", "0",
               config="digits_finetune")  # fmt: skip
    assert "init_from resampled: 1 pos_embed" in out
    there, here = (weights(tmp_path / "runs/mae" / run)["pos_embed"] for run in ("wide", "a"))
    plane = there[:, 1:].reshape(1, 2, 8, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(plane, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(here[:, 1:], expected)


def test_a_source_that_is_not_finished_is_said(done: Callable, source: Path) -> None:
    (source / "results.json").write_text(json.dumps({**results(source), "status": "running"}))
    with pytest.warns(UserWarning, match="runs/mae/source is not finished"):
        done("fit", "--init_from", SOURCE, "--run_name", "a", config="digits_finetune")
