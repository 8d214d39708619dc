"""python -m diffusion.evaluate on folders and .npz files, with a network of Inception's kind that costs nothing."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from common.command import run_command
from common.data import ImageData
from common.data.folders import ImageFolder
from diffusion import evaluate, evaluation, image_sets, metrics
from diffusion.features import Extracted, Extractor, Inception, load_classifier
from diffusion.image_sets import Prepared, open_images, to_uint8, write_npz
from diffusion.metrics import precision_recall


class Toy(Extractor):
    """Stands in for Inception: random projections of an image of 6x5 pixels."""

    name, channels, features, spatial_features, classes, sha256, tags = "inception", 3, 5, 4, 6, "none", Inception.tags

    def extract(self, images: Tensor) -> Extracted:
        projection = torch.randn(90, 15, generator=torch.Generator().manual_seed(0)) / 90**0.5
        return Extracted(*(images.flatten(1) / 64 @ projection).split([5, 4, 6], dim=1))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def pictures(images: int, seed: int) -> np.ndarray:
    """uint8 (N, 6, 5, 3), brighter with the seed."""
    return np.random.default_rng(seed).integers(10 * seed, 200 + 10 * seed, (images, 6, 5, 3), dtype=np.uint8)


def extracted(images: np.ndarray) -> Extracted:
    return Toy()(torch.from_numpy(images).permute(0, 3, 1, 2))


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    rows = features.double().numpy()
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def save_folder(path: Path, images: np.ndarray) -> None:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:05}.png")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """The command in tmp_path, with Toy in Inception's place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: Toy())
    return the_command(monkeypatch, capsys)


def the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    def run(*arguments: Any) -> Outcome:
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command(evaluate.main)
        return Outcome(leaving.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def content(run) -> Callable[..., dict[str, Any]]:
    """What --json holds after a run that succeeds."""

    def of(*arguments: Any) -> dict[str, Any]:
        outcome = run(*arguments, "--json", "out.json")
        assert outcome.code == 0, outcome.err
        return json.loads(Path("out.json").read_text())

    return of


SAMPLES, REFERENCE = pictures(23, seed=1), pictures(12, seed=2)


def test_all_metrics_of_folders_and_archives_are_those_of_the_features(content, monkeypatch):
    monkeypatch.setattr(metrics, "SPLIT", 9)
    np.savez("samples.npz", SAMPLES, np.arange(23))  # ADM writes labels as arr_1
    np.savez_compressed("reference.npz", arr_0=REFERENCE)
    save_folder(Path("samples"), SAMPLES)
    save_folder(Path("reference"), REFERENCE)
    of_archives = content("samples.npz", "reference.npz", "--batch-size", 7)
    of_folders = content("samples", "reference")
    one, other = extracted(SAMPLES), extracted(REFERENCE)
    splits = [(p * (p / p.mean(0)).log()).sum(1).mean().exp() for p in one.logits.double().softmax(1).split(9)]
    precision, recall = precision_recall(one.pooled, other.pooled)
    assert 0 < precision < 1 and 0 < recall < 1
    expected = {
        "test/fid": fid_statistics_to_metric(statistics(one.pooled), statistics(other.pooled), False),
        "test/sfid": fid_statistics_to_metric(statistics(one.spatial), statistics(other.spatial), False),
        "test/inception_score": np.mean(splits),
        "test/inception_score_std": np.std(splits),
        "test/precision": precision,
        "test/recall": recall,
    }
    expected |= {tag: expected[tag]["frechet_inception_distance"] for tag in ("test/fid", "test/sfid")}
    assert of_archives["metrics"] == pytest.approx(expected, rel=1e-6)
    assert of_folders["metrics"] == pytest.approx(expected, rel=1e-6)


def test_stored_statistics_give_the_distances_of_their_images_which_then_serve_precision_alone(content):
    np.savez("samples.npz", SAMPLES)
    np.savez("plain.npz", REFERENCE)
    other = extracted(REFERENCE)
    spatial = {f"{key}_s": value for key, value in statistics(other.spatial).items()}
    stored = statistics(other.pooled) | spatial
    np.savez("stored.npz", arr_0=REFERENCE, **stored)
    plain, found = (content("samples.npz", file) for file in ("plain.npz", "stored.npz"))
    assert found["metrics"] == pytest.approx(plain["metrics"], rel=1e-6)

    images = pictures(8, seed=4)
    np.savez("stored.npz", arr_0=images, **stored)
    found = content("samples.npz", "stored.npz")
    shares = precision_recall(extracted(SAMPLES).pooled, extracted(images).pooled)
    assert [found["metrics"][f"test/{name}"] for name in ("precision", "recall")] == pytest.approx(shares)
    assert found["metrics"]["test/fid"] == pytest.approx(plain["metrics"]["test/fid"], rel=1e-6)
    assert found["metrics"]["test/sfid"] == pytest.approx(plain["metrics"]["test/sfid"], rel=1e-6)

    np.savez("stored.npz", **stored)
    found = content("samples.npz", "stored.npz", "--metrics", "sfid,fid")
    expected = {tag: plain["metrics"][tag] for tag in ("test/sfid", "test/fid")}
    assert found["metrics"] == pytest.approx(expected, rel=1e-6)
    assert found["evaluation"]["reference_images"] == 0


def test_the_record_says_what_was_measured_and_how(content, run):
    np.savez("samples.npz", SAMPLES)
    np.savez("reference.npz", REFERENCE)
    outcome = run("samples.npz", "reference.npz")
    assert [line.split()[0] for line in outcome.out.splitlines()[1:6]] == list(Inception.tags.values())
    assert "23 samples of 6x5 pixels against 12 images of reference.npz; features: inception" in outcome.out
    digest = hashlib.sha256(Path("reference.npz").read_bytes()).hexdigest()
    assert f"rounding uint8, as stored; extractor_sha256 none; reference_sha256 {digest}\n" in outcome.out
    assert content("samples.npz", "reference.npz")["evaluation"] == {
        "samples": 23,
        "image_size": "6x5",
        "rounding": "uint8, as stored",
        "extractor": "inception",
        "extractor_sha256": "none",
        "reference": "reference.npz",
        "reference_sha256": digest,
        "reference_images": 12,
        "reference_statistics": "of its images",
    }


def test_the_hash_of_a_folder_is_that_of_its_files_and_names(content, run):
    np.savez("samples.npz", SAMPLES)
    save_folder(Path("reference"), REFERENCE)
    printed = subprocess.run("sha256sum *.png", shell=True, cwd="reference", capture_output=True, check=True).stdout
    record = content("samples.npz", "reference")["evaluation"]
    assert record["reference_sha256"] == hashlib.sha256(printed).hexdigest()


def test_a_folder_that_no_metric_looks_at_needs_no_hash(content, run):
    np.savez("samples.npz", SAMPLES)
    save_folder(Path("reference"), REFERENCE)
    record = content("samples.npz", "reference", "--metrics", "inception_score")["evaluation"]
    assert (record["reference"], record["reference_sha256"], record["reference_images"]) == ("reference", None, 0)


def test_a_long_evaluation_gives_signs_of_life(tmp_path):
    """A run's watchdog would end it else, since the Trainer has no batches then."""
    beats = []
    for name, images in [("samples", SAMPLES), ("reference", REFERENCE)]:
        np.savez(tmp_path / f"{name}.npz", images)
    samples = open_images(tmp_path / "samples.npz", 3)
    evaluation.evaluate(samples, tmp_path / "reference.npz", Toy(), ["fd"], batch=4, beat=lambda: beats.append(1))
    assert len(beats) == 6 + 3


def test_training_images_in_files_are_not_decoded_to_be_told_apart(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name / "train", np.zeros((0, 6, 5, 3)))
        save_folder(tmp_path / name / "train" / "one", SAMPLES[:3])
        save_folder(tmp_path / name / "train" / "other", SAMPLES[3 : 6 + (name == "b")])
    data = {name: ImageData(ImageFolder(str(tmp_path / name)), 4, 1) for name in ("a", "b")}
    cropped = ImageData(ImageFolder(str(tmp_path / "a")), 4, 1, eval_crop=0.9)
    monkeypatch.setattr(image_sets, "decode", None)
    digests = [Prepared(each).digest() for each in (data["a"], data["a"], data["b"], cropped)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_too_few_images_are_refused_and_can_be_taken_as_they_are(run):
    np.savez("samples.npz", SAMPLES)
    np.savez("few.npz", REFERENCE[:5])
    for arguments in [("few.npz", "samples.npz"), ("samples.npz", "few.npz")]:
        outcome = run(*arguments)
        assert outcome.code == 2 and "few.npz: 5 images for 5 features" in outcome.err, outcome.err
        assert run(*arguments, "--allow-few-samples").code == 0
    assert run("few.npz", "samples.npz", "--metrics", "precision,sfid").code == 0  # 4 spatial features


def test_an_image_that_is_damaged_behind_its_header_is_named(run):
    np.savez("other.npz", REFERENCE)
    save_folder(Path("samples"), SAMPLES)
    file = Path("samples/00003.png")
    file.write_bytes(file.read_bytes()[:60])
    outcome = run("samples", "other.npz")
    assert outcome.code == 2 and "error: samples/00003.png: not a readable image (" in outcome.err


def damaged(path: str, form: str) -> None:
    np.savez("whole.npz", SAMPLES)
    whole = Path("whole.npz").read_bytes()
    middle = len(whole) // 2
    Path(path).write_bytes({
        "truncated": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "text": b"no zip file",
    }[form])


def unfinished(path: str) -> None:
    """An archive whose array ends before its header says."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (23, 6, 5, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(SAMPLES[:10].tobytes())


def mixed(path: str) -> None:
    save_folder(Path(path), REFERENCE)
    Image.fromarray(REFERENCE[0][:5]).save(f"{path}/00009.png")


def unreadable(path: str) -> None:
    save_folder(Path(path), REFERENCE)
    (Path(path) / "00003.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "bad.npz: there is no such folder of images or .npz file"),
        (lambda path: damaged(path, "truncated"), "bad.npz: truncated, or not an .npz file"),
        (lambda path: damaged(path, "flipped"), "bad.npz: truncated, or not an .npz file"),
        (lambda path: damaged(path, "text"), "bad.npz: truncated, or not an .npz file"),
        (unfinished, "bad.npz: truncated, or not an .npz file"),
        (lambda path: np.savez(path, images=SAMPLES), "bad.npz: holds no arr_0, the images, but images"),
        (lambda path: np.savez(path, SAMPLES / 255), "bad.npz: arr_0 is float64; store pixels as uint8 in 0-255"),
        (lambda path: np.savez(path, np.array([None])), "bad.npz: arr_0 is object; store pixels as uint8"),
        (lambda path: np.savez(path, SAMPLES.transpose(0, 3, 1, 2)),
         "bad.npz: arr_0 has shape (23, 3, 6, 5); right is (images, height, width, 3)"),
        (lambda path: np.savez(path, SAMPLES[..., 0]), "bad.npz: arr_0 has shape (23, 6, 5); right is"),
        (lambda path: np.savez(path, SAMPLES[:0]), "bad.npz: arr_0 has shape (0, 6, 5, 3); right is"),
        (lambda path: np.savez(path, np.asfortranarray(SAMPLES)), "bad.npz: arr_0 is in Fortran's order"),
        (lambda path: np.savez(path, SAMPLES[:, :5]), "images of 5x5 pixels, where other.npz has 6x5; bring both"),
        (lambda path: Path(path).mkdir(), "bad.npz: holds no images (.jpeg, .jpg, .png, .webp)"),
        (mixed, "bad.npz/00009.png: 5x5 pixels, where bad.npz/00000.png has 6x5; bring all images to one size"),
        (unreadable, "bad.npz/00003.png: not a readable image"),
    ],
)
def test_malformed_samples_are_one_line_that_names_them(run, write, message):
    np.savez("other.npz", REFERENCE)
    write("bad.npz")
    outcome = run("bad.npz", "other.npz")
    assert outcome.code == 2 and f"error: {message}" in outcome.err.replace("bad.npz: images of 5", "images of 5")
    assert "Traceback" not in outcome.err and not outcome.out


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sigma": None}, [], "holds no sigma, but arr_0, mu, mu_s, sigma_s"),
        ({"mu_s": None}, [], "holds no mu_s, but arr_0, mu, sigma, sigma_s"),
        ({"arr_0": None}, [], "holds no arr_0, the images, but mu, mu_s, sigma, sigma_s"),
        ({"mu": np.zeros(7)}, [], "mu has shape (7,), or values that are not finite; right is (5,)"),
        ({"sigma_s": np.full((4, 4), np.nan)}, [], "sigma_s has shape (4, 4), or values that are not finite"),
        ({"mu": np.array(["a"] * 5)}, [], "truncated, or not an .npz file"),
        ({}, ["--metrics", "fid,is"], "--metrics: is is not measured with the extractor inception; choose among fid,"),
        ({}, ["--batch-size", "0"], "--batch-size: 0 is not a positive number"),
    ],
)
def test_malformed_references_and_options_are_one_line(run, change, arguments, message):
    np.savez("samples.npz", SAMPLES)
    other = extracted(REFERENCE)
    spatial = {f"{key}_s": value for key, value in statistics(other.spatial).items()}
    arrays = {"arr_0": REFERENCE} | statistics(other.pooled) | spatial | change
    np.savez("reference.npz", **{key: value for key, value in arrays.items() if value is not None})
    outcome = run("samples.npz", "reference.npz", *arguments)
    assert outcome.code == 2 and message in outcome.err, outcome.err
    assert len(outcome.err.splitlines()) == 1 and not outcome.out


# With a classifier of the suite


def test_a_run_folder_gives_distances_of_its_own_name(command, monkeypatch, capsys):
    assert command("fit", "--run_name", "judge").code == 0
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8) // (2 - i) for i in range(2)]
    width = 16
    # Statistics in a file are Inception's, whatever their width.
    np.savez("reference.npz", arr_0=images[0], mu=np.zeros(width), sigma=np.eye(width), mu_s=0, sigma_s=0)
    np.savez("samples.npz", images[1])
    run = the_command(monkeypatch, capsys)
    run_folder = Path("runs/supervised/judge")
    outcome = run("samples.npz", "reference.npz", "--extractor", run_folder, "--json", "out.json")
    assert outcome.code == 0, outcome.err
    content = json.loads(Path("out.json").read_text())
    tags = [f"test/{name}_judge" for name in ("fd", "classifier_score", "precision", "recall")]
    assert sorted(content["metrics"]) == sorted(tags)  # a score of one split has no deviation
    one, other = (load_classifier(run_folder)(torch.from_numpy(i).permute(0, 3, 1, 2)) for i in images[::-1])
    expected = fid_statistics_to_metric(statistics(one.pooled), statistics(other.pooled), False)
    assert content["metrics"]["test/fd_judge"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert content["evaluation"]["reference_statistics"] == "of its images"
    # With classes beside the samples, how many of them the classifier finds in its logits.
    found = load_classifier(run_folder)(torch.from_numpy(images[1]).permute(0, 3, 1, 2)).logits.argmax(1).numpy()
    np.savez("asked.npz", images[1], np.where(np.arange(20) < 13, found, (found + 1) % 10))
    outcome = run("asked.npz", "reference.npz", "--extractor", run_folder, "--json", "out.json")
    assert json.loads(Path("out.json").read_text())["metrics"]["test/agreement_judge"] == pytest.approx(65)
    np.savez("asked.npz", images[1], found + 10)
    outcome = run("asked.npz", "reference.npz", "--extractor", run_folder)
    assert outcome.code == 2 and "asked.npz: of class " in outcome.err and "knows 10 classes" in outcome.err
    np.savez("asked.npz", images[1], found - (np.arange(20) == 7) * 10)
    outcome = run("asked.npz", "reference.npz", "--extractor", run_folder)
    assert outcome.code == 2 and f"asked.npz: of class {found[7] - 10}, counted from 0, where the" in outcome.err
    outcome = run("samples.npz", "reference.npz", "--extractor", run_folder, "--metrics", "agreement")
    assert outcome.code == 2 and "agreement needs the classes that samples.npz was asked for" in outcome.err
    np.savez("asked.npz", images[1], np.ones(20))
    outcome = run("asked.npz", "reference.npz", "--extractor", run_folder)
    assert outcome.code == 2 and "asked.npz: arr_1 is float64 of shape (20,)" in outcome.err
    outcome = run("samples.npz", "reference.npz", "--extractor", run_folder, "--metrics", "fid")
    assert outcome.code == 2 and "fid is of Inception's features alone" in outcome.err
    outcome = run("samples.npz", "reference.npz", "--extractor", run_folder, "--weights", "inception.pth")
    assert outcome.code == 2 and "--weights: inception.pth goes with --extractor inception" in outcome.err


def test_without_inceptions_weights_the_command_says_where_they_go(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outcome = the_command(monkeypatch, capsys)("a.npz", "b.npz")
    assert outcome.code == 2 and not outcome.out
    assert outcome.err.startswith("error: data/weights-inception-2015-12-05-6726825d.pth: there is no such file")


# Writing


def test_written_archives_are_what_numpy_reads(tmp_path):
    images = torch.from_numpy(SAMPLES).permute(0, 3, 1, 2)
    labels = torch.arange(23) % 4
    write_npz(tmp_path / "samples.npz", 23, iter(images.split(5)), labels)
    with np.load(tmp_path / "samples.npz") as archive:
        assert sorted(archive) == ["arr_0", "arr_1"] and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], SAMPLES)
        np.testing.assert_array_equal(archive["arr_1"], labels)
    written = open_images(tmp_path / "samples.npz", 3)
    assert torch.equal(torch.cat([batch for _, batch in written.batches(4)]), images)
    assert torch.equal(written.labels(), labels)


@pytest.mark.parametrize("compressed", [False, True])
def test_ranks_share_a_set_without_overlap(tmp_path, compressed):
    save_folder(tmp_path / "folder", SAMPLES)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "samples.npz", SAMPLES)
    for path in (tmp_path / "folder", tmp_path / "samples.npz"):
        shares = [dict(enumerate(open_images(path, 3).batches(4, rank, 3))) for rank in range(3)]
        assert [len(share) for share in shares] == [2, 2, 2]  # 6 batches of 23 images
        found = sorted((place.start, batch) for share in shares for place, batch in share.values())
        assert [place for place, _ in found] == [0, 4, 8, 12, 16, 20]
        np.testing.assert_array_equal(torch.cat([batch for _, batch in found]).permute(0, 2, 3, 1), SAMPLES)


def test_an_archive_of_fewer_images_than_promised_never_appears(tmp_path):
    with pytest.raises(AssertionError, match="10 images were given, not 23"):
        write_npz(tmp_path / "samples.npz", 23, [torch.zeros(10, 3, 2, 2, dtype=torch.uint8)])
    assert not list(tmp_path.iterdir())


def test_pixels_are_rounded_as_dit_does():
    images = torch.tensor([-1.1, -1.0, -0.9999, -0.996, 0.0, 0.0039, 0.004, 0.99, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 128, 128, 128, 254, 255, 255]
