"""Training a diffusion Transformer and sampling from it, as a user sees it."""

import json
import math
import os
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import run
from PIL import Image

from common.comparison import Comparison
from common.data import Digits
from common.errors import InputError
from common.randomness import normal, uniform
from common.runs import find_runs
from common.training import progress
from common.training.checkpoints import read
from common.training.optim import Recipe
from diffusion import DiT, Generation, samples
from diffusion.evaluation import evaluate, load_extractor
from diffusion.features import load_classifier
from diffusion.image_sets import Folder
from diffusion.initialisation import initialise_dit
from diffusion.samples import SampleFolder, Sampling
from diffusion.sampling import Sampler

DIGITS = Path(__file__).parents[2] / "diffusion" / "configs" / "digits.yaml"


@pytest.fixture
def generation(command: Callable) -> Callable:
    """Runs `python -m diffusion SUBCOMMAND` on the pixels of digits with a small net, without pictures."""
    pixels = ["--data.autoencoder", "null", "--data.image_size", "8", "--trainer.check_val_every_n_epoch", "1"]
    return lambda word, *args: command(word, *pixels, "--model.picture_epochs", "0", "--model.optim.ema", "0.5",
                                       "--run_name", "a", *args, config=DIGITS, study="diffusion")  # fmt: skip


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs/diffusion/a/results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read(folder / "checkpoints" / "last.ckpt")
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}}


def test_micro_batches_are_the_whole_batch(generation: Callable, tmp_path: Path) -> None:
    for size in ("128", "32"):
        outcome = generation("fit", "--run_name", size, "--data.batch_per_device", size)
        assert outcome.code == 0, outcome.err
    whole, micro = (weights(tmp_path / "runs/diffusion" / size) for size in ("128", "32"))
    for name, value in whole.items():
        torch.testing.assert_close(micro[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_the_life_of_a_generation(generation: Callable, tmp_path: Path) -> None:
    checked = generation("check")
    assert checked.code == 0 and "train: 1197 images" in checked.out and "forwards, " in checked.out
    outcome = generation("fit")
    assert outcome.code == 0, outcome.err
    assert "forwards" in outcome.out
    trained = results(tmp_path)
    assert trained["status"] == "finished" and trained["headline"] == "val/loss"
    names = {"loss", "mse", "mse_q1", "mse_q2", "mse_q3", "mse_q4"}
    assert names == {tag.split("/")[1] for tag in trained["metrics"] if tag.startswith("val/")}
    quarters = [trained["metrics"][f"val/mse_q{quarter}"] for quarter in range(1, 5)]
    assert trained["metrics"]["val/mse"] == pytest.approx(sum(quarters) / 4)  # 300 images, 75 in each
    assert generation("validate").code == 0
    assert results(tmp_path) == trained


FEW = ["--model.predict.samples", "5", "--model.predict.steps", "4"]
SAMPLES = Path("runs/diffusion/a/samples/step18-ddim4-g1.5-s0")


def pictures() -> list[np.ndarray]:
    return [np.array(Image.open(path)).astype(int) for path in sorted(SAMPLES.glob("*.png"))]


def test_samples_are_functions_of_their_numbers(generation: Callable) -> None:
    assert generation("fit").code == 0
    outcome = generation("predict", *FEW)
    assert outcome.code == 0 and f"5 samples -> {SAMPLES}" in outcome.out, outcome.err
    assert Image.open(SAMPLES.with_name(SAMPLES.name + ".png")).size[0] > 400  # the first of them, for the eye
    files = sorted(SAMPLES.glob("*.png"))
    assert [path.name for path in files] == [f"00000{number}.png" for number in range(5)]
    first = pictures()
    assert first[0].shape == (8, 8)
    files[1].unlink()
    files[3].unlink()
    others = files[0].stat().st_mtime_ns
    assert generation("predict", *FEW, "--data.eval_batch_size", "1").code == 0
    assert all(abs(one - other).max() <= 1 for one, other in zip(first, pictures(), strict=True))
    assert files[0].stat().st_mtime_ns == others  # what is there is not generated again

    # More of them keep the first, with their classes; fewer are a part.
    labels = json.loads((SAMPLES / "record.json").read_text())["labels"]
    assert generation("predict", *FEW, "--model.predict.samples", "7", "--model.predict.npz", "true").code == 0
    record = json.loads((SAMPLES / "record.json").read_text())
    assert record["labels"][:5] == labels and len(record["labels"]) == record["samples"] == 7
    with np.load(SAMPLES.with_name(SAMPLES.name + ".npz")) as archive:
        assert archive["arr_0"].shape == (7, 8, 8, 3)  # ADM's evaluator knows no grey
        np.testing.assert_array_equal(archive["arr_0"], np.stack([pictures()] * 3, axis=-1))
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].tolist() == record["labels"]
    assert files[0].stat().st_mtime_ns == others
    of_all = SAMPLES.with_name(SAMPLES.name + ".png").read_bytes()
    assert "5 samples" in generation("predict", *FEW).out
    assert SAMPLES.with_name(SAMPLES.name + ".png").read_bytes() == of_all
    assert json.loads((SAMPLES / "record.json").read_text()) == record

    expected = {"weights": "ema", "trained_steps": 18, "solver": "ddim", "steps": 4, "spacing": "respaced as by ADM",
                "guidance": 1.5, "guidance_channels": 3, "seed": 0, "classes": 10, "autoencoder": None,
                "rounding": "127.5 x + 128, clamped to 0-255, truncated", "precision": "32-true"}  # fmt: skip
    assert record.items() >= expected.items()


def test_samples_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(to.name) or replace(path, to))
    SampleFolder(tmp_path).write([0, 1], torch.rand(2, 3, 8, 8))
    sizes = [(tmp_path / name).stat().st_size for name in ("000000.png", "000001.png")]
    assert calls == [sizes[0], "000000.png", sizes[1], "000001.png"]


def test_no_autoencoder_is_spelt_none_or_null(command: Callable, tmp_path: Path) -> None:
    for spelt in ("none", "null"):
        outcome = command("fit", "--data.autoencoder", spelt, "--data.image_size", "8", "--model.picture_epochs", "0",
                          "--run_name", f"a-{spelt}", config=DIGITS, study="diffusion")  # fmt: skip
        assert outcome.code == 0 and "8x8" in outcome.out, outcome.err
    one, other = (weights(tmp_path / "runs/diffusion" / f"a-{spelt}") for spelt in ("none", "null"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    none = ["--data.autoencoder", "none"]
    outcome = command("fit", *none, "--data.latents", "latents", config=DIGITS, study="diffusion")
    assert outcome.code == 2 and "data.latents: needs data.autoencoder too" in outcome.err
    outcome = command("fit", "--data.autoencoder", "nothing", config=DIGITS, study="diffusion")
    assert outcome.code == 2 and "or train on pixels: --data.autoencoder none" in outcome.err


def test_samples_of_other_weights_are_not_taken_for_these(generation: Callable) -> None:
    assert generation("fit").code == 0
    assert generation("predict", *FEW).code == 0
    path = SAMPLES / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"weights_sha256": "another"}))
    outcome = generation("predict", *FEW)
    assert outcome.code == 2 and "samples that were made otherwise (weights_sha256: another there" in outcome.err
    path.write_text("{")
    assert "record.json: damaged" in generation("predict", *FEW).err
    path.unlink()
    assert "holds images but no record.json" in generation("predict", *FEW).err
    assert generation("fit", "--overwrite", "--model.optim.lr", "1e-3").code == 0
    assert not SAMPLES.exists()


@pytest.mark.parametrize("options, message", [
    (["--model.predict.classes", "[3,10]"], "model.predict.classes: [3, 10] are not all among the 10 classes"),
    (["--model.predict.samples", "0"], "model.predict.samples: 0"),
    (["--model.predict.seed", "-1"], "model.predict.seed: -1"),
    (["--model.predict.steps", "1"], "model.predict.steps: 1 are not between 2 and the 1000"),
    (["--model.predict.solver", "ddim", "--model.predict.steps", "5000"], "model.predict.steps: 5000 are not between"),
    (["--model.predict.solver", "euler"], "model.predict.solver"),
    (["--trainer.limit_predict_batches", "0"], "trainer.limit_predict_batches: 0 would leave samples out; give their"),
])
def test_mistakes_in_what_is_sampled_are_named(generation: Callable, options: list[str], message: str) -> None:
    assert generation("fit", "--trainer.max_epochs", "1").code == 0
    outcome = generation("predict", "--trainer.max_epochs", "1", "--model.predict.solver", "ddpm", *options)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_many_classes_have_a_name_that_a_file_system_takes() -> None:
    """Another one for other classes; few are spelt out."""
    few, many, others = (Sampling(classes=classes).name for classes in ([3, 5], [*range(200)], [*range(1, 201)]))
    assert "-classes3_5-" in few and len(many) < 100 and many != others


def test_a_classifier_of_other_classes_tells_no_agreement(
    generation: Callable, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    assert command("fit", "--run_name", "judge").code == 0
    assert generation("fit").code == 0

    def of_eight(*asked):
        extractor = load_extractor(*asked)
        extractor.head, extractor.classes = torch.nn.Linear(extractor.features, 8), 8
        return extractor

    monkeypatch.setattr("diffusion.generation.load_extractor", of_eight)
    with pytest.warns(UserWarning, match="agreement is left out: judge tells 8 classes, the samples are of 10"):
        outcome = generation("test", "--model.predict.steps", "3", "--model.predict.samples", "40",
                             "--model.evaluation.extractor", "runs/supervised/judge")
    assert outcome.code == 0, outcome.err
    tags = results(tmp_path)["metrics"].keys()
    assert "test/fd_judge" in tags and "test/agreement_judge" not in tags


def test_a_test_samples_and_judges(generation: Callable, command: Callable, tmp_path: Path) -> None:
    """As the evaluation of the same folder by its own command, with the training images as the reference."""
    assert command("fit", "--run_name", "judge").code == 0
    judge = "runs/supervised/judge"
    assert generation("fit").code == 0
    options = ["--model.predict.steps", "3", "--model.predict.samples", "40", "--model.evaluation.extractor", judge]
    outcome = generation("test", *options)
    assert outcome.code == 0, outcome.err
    assert "runs/diffusion/a after 18 steps on digits, test: 40 samples" in outcome.out
    folder = SAMPLES.with_name("step18-ddim3-g1.5-s0")
    judged = results(tmp_path)
    names = {f"{name}_judge" for name in ("fd", "classifier_score", "precision", "recall", "agreement")}
    assert {tag for tag in judged["metrics"] if tag.startswith("test/")} == {f"test/{name}" for name in names}
    record = judged["evaluation"]
    assert record["samples"] == 40 and record["reference"] == "training images of digits"
    assert record["reference_images"] == 1197 and record["guidance"] == 1.5 and record["weights"] == "ema"
    beside = json.loads(folder.with_name(folder.name + ".json").read_text())
    assert beside["evaluation"] == record

    images = Digits().read(Path(), "train").images[:, 0].numpy()
    (tmp_path / "reference").mkdir()
    for number, image in enumerate(images):  # at 8x8 they are what the model sees, in the same order
        Image.fromarray(image).save(tmp_path / "reference" / f"{number:04}.png")
    values, again = evaluate(Folder(folder, 1), tmp_path / "reference", load_classifier(tmp_path / judge),
                             ["fd", "classifier_score", "precision", "recall", "agreement"])  # fmt: skip
    assert {f"test/{tag}": value for tag, value in values.items()} == pytest.approx(
        {tag: value for tag, value in judged["metrics"].items() if tag.startswith("test/")}, rel=1e-4)
    assert {**again, "reference": 0, "reference_sha256": 0} == {**record, "reference": 0, "reference_sha256": 0}

    # Judged again, against a file: nothing is sampled anew.
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))]
    outcome = generation("test", *options, "--model.evaluation.reference", "reference")
    assert outcome.code == 0, outcome.err
    assert results(tmp_path)["evaluation"]["reference"] == "reference"
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))] == times
    # Scores of another judge are no part of this record any more.
    shutil.copytree("runs/supervised/judge", "runs/supervised/other")
    assert generation("test", *options, "--model.evaluation.extractor", "runs/supervised/other").code == 0
    assert {tag.split("_")[-1] for tag in results(tmp_path)["metrics"] if tag.startswith("test/fd")} == {"other"}
    assert results(tmp_path)["evaluation"]["extractor"] == "other"

    # What cannot be judged is not sampled, and a folder of which some are missing not judged.
    next(folder.glob("*.png")).unlink()
    with pytest.raises(InputError, match="holds 39 of the 40 samples that were asked for"):
        Folder(folder, 1)
    shutil.rmtree(folder.parent)
    outcome = generation("test", *options, "--model.predict.samples", "16")
    assert outcome.code == 2 and "model.predict.samples: 16 images for 16 features" in outcome.err
    np.savez("small.npz", np.zeros((20, 4, 4, 1), np.uint8))
    outcome = generation("test", *options, "--model.evaluation.reference", "small.npz")
    assert outcome.code == 2 and "images of 8x8 pixels, where small.npz has 4x4" in outcome.err
    outcome = generation("test", *options, "--model.evaluation.reference", "nowhere.npz")
    assert outcome.code == 2 and "nowhere.npz: there is no such folder of images or .npz file" in outcome.err
    outcome = generation("test", *options, "--model.evaluation.extractor", "inception")
    assert outcome.code == 2 and "fetch https://github.com/toshas/torch-fidelity" in outcome.err
    assert not folder.parent.exists()


def test_a_copy_of_a_run_is_tested_otherwise(
    generation: Callable, command: Callable, scalars: Callable, tmp_path: Path
) -> None:
    """Whose scores then stand beside the run's own; and no other way is it another run."""
    assert command("fit", "--run_name", "judge").code == 0
    assert generation("fit").code == 0
    options = ["--model.predict.steps", "3", "--model.predict.samples", "40", "--model.evaluation.extractor",
               "runs/supervised/judge"]  # fmt: skip
    assert generation("test", *options).code == 0
    own = results(tmp_path)
    copy = [*options, "--run_name", "b", "--copy_of", "runs/diffusion/a/", "--model.predict.guidance", "1"]
    for subcommand in ("fit", "test", "fit"):
        outcome = generation(subcommand, *copy)
        assert outcome.code == 0, outcome.err
    there, copied = tmp_path / "runs/diffusion/a", tmp_path / "runs/diffusion/b"
    assert results(tmp_path) == own
    assert (there / "checkpoints/last.ckpt").samefile(copied / "checkpoints/last.ckpt")
    judged = json.loads((copied / "results.json").read_text())
    assert (judged["run_name"], judged["status"], judged["step"], judged["epoch"]) == ("b", "finished", 18, 2)
    assert (own["evaluation"]["guidance"], judged["evaluation"]["guidance"]) == (1.5, 1.0)
    trained = {tag for tag in own["metrics"] if not tag.startswith("test/")}
    assert trained and {tag: judged["metrics"][tag] for tag in trained} == {tag: own["metrics"][tag] for tag in trained}
    assert judged["metrics"]["test/fd_judge"] != own["metrics"]["test/fd_judge"]
    assert len({find["config_hash"] for find in (own, judged)}) == 2
    assert [len(group.runs) for group in Comparison(find_runs([there, copied])).groups] == [1, 1]

    assert scalars(copied)["val/loss"][-1] == (18, pytest.approx(own["metrics"]["val/loss"]))  # HPARAMS sorts by it

    # One that was cut off is not tested, and is made anew; a copy goes anywhere that its original does.
    for names in (["results.json"], ["results.json", "checkpoints/last.ckpt"]):
        for name in names:
            (copied / name).unlink()
        assert generation("test", *copy).code == 2
        assert "copied: runs/diffusion/a -> runs/diffusion/b" in generation("fit", *copy).out
    assert not list(copied.rglob("*.tmp"))
    outcome = generation("predict", *copy, "--model.predict.guidance", "3")
    assert outcome.code == 0 and (copied / "samples/step18-ddim3-g3-s0").is_dir(), outcome.err
    outcome = generation("fit", *copy[:-1], "3", "--overwrite")
    assert outcome.code == 0 and "guidance: 3.0" in (copied / "config.yaml").read_text(), outcome.err
    assert not (copied / "samples").exists()
    outcome = generation("fit", "--run_name", "c", "--copy_of", "runs/diffusion/b")  # whose weights are a's
    assert outcome.code == 0 and (tmp_path / "runs/diffusion/c/checkpoints/last.ckpt").samefile(
        there / "checkpoints/last.ckpt"), outcome.err

    for options, message in [
        (["--run_name", "d", "--copy_of", "runs/diffusion/d"], "--copy_of: runs/diffusion/d is the run itself"),
        (["--run_name", "e", "--copy_of", "runs/diffusion/d"], "--copy_of: runs/diffusion/d is no run folder"),
        (["--run_name", "e", "--copy_of", ""], "is no run folder"),
        (["--run_name", "a"], "--copy_of: runs/diffusion/a is the run itself; choose another --run_name"),
        (["--copy_of", "runs/diffusion/c"], "b holds a run of another config (copy_of: runs/diffusion/a"),
        (["--run_name", "e", "--x_axis", "images"], "but the curves in runs/diffusion/a are over step"),
        (["--run_name", "e", "--model.patch_size", "2"], "was trained otherwise: model.patch_size: 4 there, 2 here"),
    ]:
        outcome = generation("fit", *copy, *options)
        assert outcome.code == 2 and message in outcome.err, outcome.err
    (there / "results.json").write_text(json.dumps(own | {"status": "running", "step": 9}))
    outcome = generation("fit", *copy, "--run_name", "e")
    assert outcome.code == 2 and "--copy_of: runs/diffusion/a is not a finished run (running)" in outcome.err
    assert not (tmp_path / "runs/diffusion/e").exists()
    outcome = generation("fit", *copy[:-1], "3")
    assert outcome.code == 2 and "weights that are no longer in runs/diffusion/a" in outcome.err, outcome.err


def test_two_processes_sample_and_judge_as_one(generation: Callable, command: Callable, tmp_path: Path) -> None:
    """40 samples, some of which are there before; in one batch, so that one process is left without any to judge."""
    assert command("fit", "--run_name", "judge").code == 0
    assert generation("fit").code == 0
    shutil.copytree(tmp_path / "runs/diffusion/a", tmp_path / "runs/diffusion/b")
    options = ["--model.predict.steps", "3", "--model.predict.samples", "40", "--data.eval_batch_size", "64",
               "--model.evaluation.extractor", "runs/supervised/judge"]  # fmt: skip
    assert generation("test", *options).code == 0
    one = results(tmp_path)
    assert generation("predict", *options, "--run_name", "b", "--model.predict.samples", "5").code == 0
    words = ["test", "--config", "runs/diffusion/b/config.yaml", "--run_name", "b", *options, "--trainer.devices", "2",
             "--trainer.accelerator", "cpu"]  # fmt: skip
    done = run("diffusion", *words, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "runs/diffusion/b/results.json").read_text())
    name = "samples/step18-ddim3-g1.5-s0"
    for file in (tmp_path / "runs/diffusion/a" / name).glob("*.png"):
        ours, theirs = (np.array(Image.open(tmp_path / "runs/diffusion" / run / name / file.name)).astype(int)
                        for run in "ab")
        assert abs(ours - theirs).max() <= 1
    judged, again = ({tag: value for tag, value in found["metrics"].items() if tag.startswith("test/")}
                     for found in (one, two))  # fmt: skip
    assert again == pytest.approx(judged, rel=0.02)
    assert two["evaluation"] == one["evaluation"]
    assert done.stdout.count("40 samples ->") == 1  # one of them speaks


def test_a_loss_that_is_no_number_stops_the_training(generation: Callable, tmp_path: Path) -> None:
    outcome = generation("fit", "--model.optim.lr", "1e30", "--trainer.log_every_n_steps", "1")
    assert outcome.code == 1 and "train/loss is nan, for the first time at step" in outcome.err
    assert outcome.err.count("failed:") == 1
    assert results(tmp_path)["status"] == "failed"


# Weights from elsewhere


def published_file(path: Path, channels: int = 1, **more: object) -> dict[str, torch.Tensor]:
    """A DiT in its authors' layout: the patch projection is a convolution, the position table one of sines."""
    torch.manual_seed(3)
    net = DiT(8, patch_size=4, channels=channels, classes=10, width=16, depth=1, heads=2, position="sincos")
    weights = {name: torch.randn_like(value) * 0.02 if name != "pos_embed" else value
               for name, value in net.state_dict().items()}
    published = {**weights, "x_embedder.proj.weight":
                 weights["x_embedder.proj.weight"].view(16, 4, 4, channels).permute(0, 3, 1, 2).contiguous()}
    torch.save(published if not more else {"model": net.state_dict(), "ema": published, **more}, path)
    return weights


@pytest.mark.parametrize("training", [False, True])
def test_published_weights_are_sampled_from_and_trained_on(
    generation: Callable, tmp_path: Path, training: bool
) -> None:
    """A published file is a state dict; their training's checkpoint holds the average beside what an optimiser needs.
    """
    weights = published_file(tmp_path / "dit.pt", **({"opt": {}, "args": Namespace(a=1)} if training else {}))
    options = ["--init_from", "dit.pt", "--model.position", "sincos"]
    outcome = generation("predict", *options, *FEW)
    assert outcome.code == 0, outcome.err
    assert "init_from loaded: 22 " in outcome.out and "samples/ddim4-g1.5-s0" in outcome.out
    assert generation("fit", *options, "--model.optim.lr", "0", "--trainer.max_epochs", "1").code == 0
    trained = read(tmp_path / "runs/diffusion/a/checkpoints/last.ckpt")["state_dict"]
    for name, value in weights.items():
        torch.testing.assert_close(trained[f"net.{name}"], value)
    assert generation("fit", *options[:2], "--run_name", "b", "--trainer.max_epochs", "1").code == 0
    assert json.loads((tmp_path / "runs/diffusion/b/results.json").read_text())["init_from"]["position_prior"] == (
        "sincos")


def test_samples_that_are_no_numbers_are_no_images(generation: Callable, tmp_path: Path) -> None:
    published_file(tmp_path / "dit.pt")
    weights = torch.load(tmp_path / "dit.pt")
    torch.save(weights | {"final_layer.linear.bias": weights["final_layer.linear.bias"] * math.nan}, "dit.pt")
    outcome = generation("predict", "--init_from", "dit.pt", "--model.position", "sincos", *FEW)
    assert outcome.code == 1 and "samples are not finite numbers" in outcome.err
    assert not list(tmp_path.rglob("*.png"))


def test_what_goes_wrong_with_a_batch_of_samples_ends_the_next_at_once(
    generation: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, failed, (as_pixels, predicted) = [], threading.Event(), (samples.as_pixels, Sampler.predicted)

    def looked(images: torch.Tensor) -> torch.Tensor:
        try:
            return as_pixels(images * math.nan)
        finally:
            failed.set()

    def counted(*arguments: object) -> torch.Tensor:
        steps.append(len(steps))
        if len(steps) > 4:  # of the first batch
            assert failed.wait(60)
            time.sleep(0.2)
        return predicted(*arguments)

    assert generation("fit").code == 0
    monkeypatch.setattr(samples, "as_pixels", looked)
    monkeypatch.setattr(Sampler, "predicted", counted)
    outcome = generation("predict", *FEW, "--data.eval_batch_size", "1")
    assert outcome.code == 1 and "samples are not finite numbers" in outcome.err
    assert 4 < len(steps) < 8 and not list(tmp_path.rglob("*.png"))


def test_a_batch_is_written_while_the_next_is_generated(
    generation: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not even looked at before: on a GPU that would wait until it is decoded."""
    begun, waited, (as_pixels, generate) = [], [], (samples.as_pixels, Generation.generate)
    second = threading.Event()

    def generated(*arguments: object) -> torch.Tensor:
        begun.append(len(begun))
        if len(begun) == 2:
            second.set()
        return generate(*arguments)

    def looked(images: torch.Tensor) -> torch.Tensor:
        waited.append(second.wait(30))
        return as_pixels(images)

    assert generation("fit").code == 0
    monkeypatch.setattr(Generation, "generate", generated)
    monkeypatch.setattr(samples, "as_pixels", looked)
    assert generation("predict", *FEW, "--data.eval_batch_size", "2").code == 0
    assert begun == [0, 1, 2] and waited == [True] * 3 and len(pictures()) == 5


def test_what_goes_wrong_with_writing_is_told_once_and_nothing_is_written(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path)
    folder.look()
    folder.write_behind([0, 1], torch.tensor([0.0, math.inf]).view(2, 1, 1, 1))
    with pytest.raises(FloatingPointError, match="samples are not finite numbers; try --trainer.precision 32-true"):
        for _ in range(1000):
            folder.look()
            time.sleep(0.01)
    folder.wait()
    assert not list(tmp_path.iterdir())


def test_a_line_says_how_much_of_a_batch_of_samples_is_done(
    generation: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generation("fit").code == 0
    monkeypatch.setattr(progress, "SECONDS", 0)
    outcome = generation("predict", *FEW, "--data.eval_batch_size", "3")
    lines = [line.split(" · ")[0] for line in outcome.err.splitlines() if line.startswith("predict: batch")]
    assert lines == [f"predict: batch {done}/2" for done in ("0.25", "0.5", "0.75", 1, 1, "1.25", "1.5", "1.75", 2, 2)]


def test_latents_of_another_autoencoder_are_another_language(tmp_path: Path) -> None:
    published_file(tmp_path / "dit.pt")
    weights = torch.load(tmp_path / "dit.pt")
    torch.save({"loops": {}, "state_dict": {f"net.{name}": value for name, value in weights.items()},
                "autoencoder_sha256": "one"}, tmp_path / "run.ckpt")  # fmt: skip
    net = DiT(8, patch_size=4, channels=1, classes=10, width=16, depth=1, heads=2, position="sincos")
    assert initialise_dit(net, str(tmp_path / "dit.pt"), "one")["weights"] == "as published"
    with pytest.raises(InputError, match="run.ckpt was trained on the latents of another autoencoder"):
        initialise_dit(net, str(tmp_path / "run.ckpt"), "other")
    with pytest.raises(InputError, match="or one of the two on pixels"):
        initialise_dit(net, str(tmp_path / "run.ckpt"), None)


@pytest.mark.parametrize("options, message", [
    (["--model.patch_size", "2"], "dit.pt holds another net than this config's"),
    (["--model.depth", "2"], 'Missing key(s) in state_dict: "blocks.1'),
    (["--model.conditional", "false"], "y_embedder"),
])
def test_weights_of_another_net_are_refused(
    generation: Callable, tmp_path: Path, options: list[str], message: str
) -> None:
    published_file(tmp_path / "dit.pt")
    outcome = generation("fit", "--init_from", "dit.pt", "--model.position", "sincos", *options)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_a_run_initialises_another_unless_its_heads_differ(generation: Callable, tmp_path: Path) -> None:
    assert generation("fit").code == 0
    average = read(tmp_path / "runs/diffusion/a/checkpoints/last.ckpt")["ema"]["state_dict"]
    options = ["--init_from", "runs/diffusion/a", "--run_name", "b", "--model.optim.lr", "0"]
    assert generation("fit", *options).code == 0
    other = read(tmp_path / "runs/diffusion/b/checkpoints/last.ckpt")["state_dict"]
    for name, value in average.items():
        torch.testing.assert_close(other[f"net.{name}"], value)
    outcome = generation("fit", *options, "--run_name", "c", "--model.heads", "4")
    assert outcome.code == 2 and "was trained with heads=2, and this config's is 4" in outcome.err


def test_without_images_their_number_of_classes_is_enough_to_sample(generation: Callable, tmp_path: Path) -> None:
    published_file(tmp_path / "dit.pt", channels=3)
    options = ["--init_from", "dit.pt", "--model.position", "sincos", "--data.source=common.data.ImageFolder",
               "--data.source.path=nowhere"]  # fmt: skip
    outcome = generation("predict", *FEW, *options)
    assert outcome.code == 2 and "nowhere: no such folder" in outcome.err
    assert generation("predict", *FEW, *options, "--data.assumed_classes", "10").code == 0
    assert len(list(tmp_path.glob("runs/diffusion/a/samples/*/*.png"))) == 5
    outcome = generation("fit", *options, "--data.assumed_classes", "10")
    assert outcome.code == 2 and "data.assumed_classes: 10 is for predict and test alone" in outcome.err
    outcome = generation("predict", *FEW, *options, "--data.assumed_classes", "0")
    assert outcome.code == 2 and "data.assumed_classes: 0 is not a positive number" in outcome.err


def test_pictures_and_samples_are_made_by_the_average(
    generation: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages, generate = [], Generation.generate

    def watched(module: Generation, sampler: Sampler, net: DiT, *asked: torch.Tensor) -> torch.Tensor:
        averages.append(net is module.average and net is not module.net)
        return generate(module, sampler, net, *asked)

    monkeypatch.setattr(Generation, "generate", watched)
    options = ["--model.picture_epochs", "1", "--model.picture_steps", "2", "--trainer.max_epochs", "1"]
    assert generation("fit", *options).code == 0
    assert averages == [True] and Image.open(tmp_path / "runs/diffusion/a/figures/samples.png").size[0] > 400
    assert generation("predict", *options, *FEW).code == 0
    assert averages == [True, True]


def test_each_step_and_image_has_its_own_noise_and_dropped_labels() -> None:
    module = Generation(Recipe(lr=0.1))
    seen = []

    class Watched(torch.nn.Module):
        classes = 10

        def forward(self, x, t, y, drops):
            noise = x / (1 - module.process.alphas_cumprod[t]).sqrt()[:, None, None, None]  # the data are 0
            seen.append((noise.flatten(1), t / 1000, drops))
            return torch.zeros(len(x), 2, 4, 4)

    module.net = Watched()
    place = torch.arange(500)
    batch = {"image": torch.zeros(500, 1, 4, 4), "label": place % 10, "place": place}
    for step in (0, 1):
        module.trainer = SimpleNamespace(seed=3, global_step=step)
        module.training_step(batch, 0)
    drawn = torch.stack([row for noise, *rest in seen for row in (noise[:, 0].float(), *rest)])
    assert (drawn.corrcoef() - torch.eye(6)).abs().max() < 0.2  # of 500 pairs: 4.5 deviations
    assert (torch.cat([noise for noise, *_ in seen]).std() - 1).abs() < 0.05


def test_without_classes(generation: Callable, tmp_path: Path) -> None:
    options = ["--model.conditional", "false", "--trainer.max_epochs", "1"]
    assert generation("fit", *options, "--model.picture_epochs", "1", "--model.picture_steps", "2").code == 0
    assert not [name for name in weights(tmp_path / "runs/diffusion/a") if "y_embedder" in name]
    more = ["--model.predict.samples", "2", "--model.predict.steps", "2", "--model.predict.solver", "ddim",
            "--model.picture_epochs", "1", "--model.picture_steps", "2"]  # fmt: skip
    outcome = generation("predict", *options, *more)
    assert outcome.code == 0, outcome.err
    recipe = results(tmp_path)["recipe"]
    assert recipe["sampling"].startswith("50 forwards")  # without a class to guide to, whatever the guidance
    assert (tmp_path / "runs/diffusion/a/samples/step9-ddim2-g1-s0").is_dir()


def test_validation_uses_fixed_noise_and_steps() -> None:
    """Against plain loops, for a net that answers with its input."""
    module = Generation(Recipe(lr=0.1))
    seen = []

    class Echo(torch.nn.Module):
        classes = 0

        def forward(self, x, t, y, drops):
            seen.append((x, t))
            return torch.cat([x, torch.zeros_like(x)], dim=1)

    images, index = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 3, 7, 100])
    scores = module.metrics(None)
    module.evaluate(Echo(), {"image": images, "index": index, "label": index}, scores)
    values = scores.compute()
    [(x, t)] = seen
    errors = []
    for row, i in enumerate(index.tolist()):
        step = int(250 * (i % 4) + 250 * uniform("evaluation timestep", i, n=1))
        assert int(t[row]) == step
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step]
        noise = normal("evaluation noise", i, n=16).view(1, 4, 4)
        noisy = kept.sqrt().float() * images[row] + (1 - kept).sqrt().float() * noise
        torch.testing.assert_close(x[row], noisy, atol=1e-5, rtol=1e-5)
        errors.append((noisy - noise).square().mean())
    assert values["mse"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    bound = module.process.training_losses(torch.cat([x, torch.zeros_like(x)], 1), images, t,
                                           normal("evaluation noise", index, n=16).view(6, 1, 4, 4))[1]
    assert values["loss"].item() == pytest.approx(values["mse"].item() + bound.mean().item(), rel=1e-5)
    assert values["mse_q1"].item() == pytest.approx(((errors[0] + errors[5]) / 2).item(), rel=1e-5)
    assert values["mse_q4"].item() == pytest.approx(((errors[3] + errors[4]) / 2).item(), rel=1e-5)


def test_it_learns_to_tell_noise_from_points(generation: Callable, tmp_path: Path) -> None:
    """The error of predicting no noise at all is 1."""
    outcome = generation("fit", "--model.patch_size", "2", "--trainer.max_epochs", "8", "--model.optim.lr", "5e-3")
    assert outcome.code == 0, outcome.err
    assert results(tmp_path)["metrics"]["val_raw/mse"] < 0.6


def test_the_net_s_names_are_those_of_dit(generation: Callable, tmp_path: Path) -> None:
    assert generation("fit", "--trainer.max_epochs", "1").code == 0
    saved = read(tmp_path / "runs/diffusion/a/checkpoints/last.ckpt")["state_dict"]
    net = DiT(8, patch_size=4, channels=1, classes=10, width=16, depth=1, heads=2)
    assert {name.removeprefix("net.") for name in saved} == net.state_dict().keys()
