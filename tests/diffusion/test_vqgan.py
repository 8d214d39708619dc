"""Training of autoencoders through the command: resuming, scale and shift, evaluation, refusals."""

import contextlib
import hashlib
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from forked import ROOT, run
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from small import TWO_STEPS
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from common.data.sources import Digits
from common.errors import InputError
from common.training.checkpoints import read
from common.training.cli import main
from common.training.curves import Curves
from common.training.optim import Recipe
from diffusion.autoencoder import Autoencoder
from diffusion.features import load_classifier
from diffusion.perceptual import LPIPS, VGG16
from diffusion.vqgan import AutoencoderTraining

CONFIGS = ROOT / "diffusion" / "configs"
DIGITS = CONFIGS / "autoencoder_digits.yaml"
TINY = ["--model.base", "8", "--model.groups", "4", "--model.channels", "2", "--data.batch_size", "16",
        "--data.eval_batch_size", "50", "--model.adversary.start", "8", "--model.adversary.warmup", "3",
        "--model.optim.ema", "0.9", "--model.optim.lr", "0.001", "--trainer.max_epochs", "2",
        "--trainer.limit_train_batches", "9", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1",
        "--trainer.check_val_every_n_epoch", "1", "--checkpoint.every_n_steps", "2"]  # fmt: skip


# One of the two takes its steps in micro-batches.
KINDS = {"vq": ["--model.kind", "vq"],
         "kl": ["--model.kind", "kl", "--model.adversary.norm", "group", "--data.batch_per_device", "8"]}  # fmt: skip


def study(folder: Path, *arguments: Any, config: Path = DIGITS) -> tuple[int, str]:
    """The exit code and the output of `python -m diffusion ARGUMENTS` with runs in folder/runs."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.chdir(folder)
        argv = ["diffusion", arguments[0], "--config", config, "--run_name", "a", *arguments[1:]]
        patch.setattr("sys.argv", [str(argument) for argument in argv])
        try:
            main("diffusion")
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
    return code, said.getvalue()


def run_of(folder: Path) -> Path:
    return folder / "runs" / "diffusion" / "a"


def last_of(folder: Path) -> dict[str, Any]:
    return read(run_of(folder) / "checkpoints" / "last.ckpt")


def tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    states = checkpoint["optimizer_states"][0]["state"].items()
    moments = {f"{number}.{name}": value for number, state in states for name, value in state.items()}
    average = {f"ema.{key}": value for key, value in checkpoint["ema"]["state_dict"].items()}
    return checkpoint["state_dict"] | average | moments


def net_of(checkpoint: dict[str, Any], average: bool) -> Autoencoder:
    net = Autoencoder(**checkpoint["autoencoder"])
    raw = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items() if key[:4] == "net."}
    net.load_state_dict(checkpoint["ema"]["state_dict"] if average else raw)
    return net.requires_grad_(False)


def digits(split: str) -> Tensor:
    """As they are trained on: enlarged to 16x16, in [-1, 1]."""
    images = Digits().read(Path(), split).images.float() / 255
    return nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1


@pytest.fixture(scope="module", params=["vq", "kl"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run of 18 steps, with the discriminator from step 5 and its effect from step 8 on."""
    folder = tmp_path_factory.mktemp(request.param)
    code, said = study(folder, "fit", *TINY, *KINDS[request.param], "--model.picture_epochs", "1")
    assert code == 0, said
    return folder, request.param


@pytest.mark.parametrize("whole, stop", [("vq", 4), ("vq", 6), ("kl", 15)], indirect=["whole"])
def test_a_run_that_was_stopped_ends_bit_identical(stop, whole, tmp_path, monkeypatch, scalars):
    """Before the discriminator learns, while it learns alone, and with everything in play; both in mid-epoch."""
    folder, kind = whole
    step = AutoencoderTraining.training_step

    def until(module: AutoencoderTraining, *args: Any) -> dict[str, Tensor]:
        if module.trainer.global_step == stop:
            raise RuntimeError("stopped")
        return step(module, *args)

    options = [*TINY, *KINDS[kind], "--model.picture_epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTraining, "training_step", until)
        assert study(tmp_path, "fit", *options)[0] == 1
    assert last_of(tmp_path)["global_step"] == stop // 2 * 2
    assert study(tmp_path, "fit", *options)[0] == 0
    one, other = (tensors(last_of(place)) for place in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    drawn, again = (scalars(run_of(place)) for place in (folder, tmp_path))
    timed = {"train/images_per_second", "train/data_wait"}
    for tag in drawn.keys() - timed:  # the codebook's over the whole epoch among them
        assert np.array_equal(drawn[tag][-2:], again[tag][-2:], equal_nan=True), tag


def test_the_curves_hold_every_term_from_its_step_on(whole, scalars):
    folder, kind = whole
    curves = scalars(run_of(folder))
    steps = {tag: [step for step, value in points if not math.isnan(value)] for tag, points in curves.items()}
    of_all = ["loss", "l1", "codebook" if kind == "vq" else "kl"]
    for tags, first in [(of_all, 1), (["discriminator", "logits_real", "logits_fake"], 6),
                        (["adversarial", "adaptive_weight"], 9)]:  # fmt: skip
        for tag in tags:
            assert steps[f"train/{tag}"] == list(range(first, 19)), tag
    evaluated = ["loss", "l1", "psnr", "ssim", *(["codebook_usage"] if kind == "vq" else ["kl"])]
    for tag in evaluated:
        assert steps[f"val/{tag}"] == steps[f"val_raw/{tag}"] == [9, 18]
    assert (steps.get("train/codebook_perplexity") == [9, 18]) == (kind == "vq")
    assert (run_of(folder) / "figures" / "reconstructions.png").is_file()


def test_the_discriminator_starts_to_move_when_it_learns(whole):
    folder, _ = whole
    checkpoint = last_of(folder)
    groups, states = (checkpoint["optimizer_states"][0][key] for key in ("param_groups", "state"))
    ours = len([key for key in checkpoint["state_dict"] if key.startswith("discriminator.")])
    steps = [int(states[i]["step"]) for group in groups for i in group["params"]]
    assert steps[-ours:] == [13] * ours  # of 18
    assert set(steps[:-ours]) == {18}


@pytest.mark.parametrize("average", [False, True])
def test_the_last_checkpoint_normalises_the_latents_of_the_training_images(whole, average):
    folder, kind = whole
    net = net_of(last_of(folder), average)
    moments = net.moments(digits("train"))
    noise = torch.randn(len(moments), 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = net.normalise(net.sample(moments, noise))
    tolerance = 1e-4 if kind == "vq" else 0.02  # KL's are drawn
    assert latents.mean((0, 2, 3)).abs().max() < tolerance
    assert latents.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, abs=tolerance)
    assert net.scale != 1 and net.shift.abs().max() > 0


def test_checkpoints_hold_the_two_players_and_nothing_frozen(whole):
    folder, kind = whole
    checkpoint = last_of(folder)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"net", "discriminator"} | (
        {"code_counts"} if kind == "vq" else set()
    )
    assert not any("discriminator" in key for key in checkpoint["ema"]["state_dict"])


def test_a_run_initialises_another_and_evaluates_as_itself(whole, tmp_path, scalars):
    folder, kind = whole
    of_run = scalars(run_of(folder))["val/loss"][-1][1]
    files = {"run": run_of(folder), "checkpoint": run_of(folder) / "checkpoints" / "last.ckpt",
             "published": tmp_path / "net.bin"}  # fmt: skip
    torch.save(net_of(last_of(folder), average=True).model.state_dict(), files["published"])
    options = [*TINY, *KINDS[kind]]
    for source in files.values():
        code, said = study(tmp_path, "validate", *options, "--init_from", source)
        assert code == 0, said
        assert float(said.split("\nloss")[1].split()[0]) == pytest.approx(of_run, abs=1e-4)
    code, said = study(tmp_path, "validate", *options, "--model.channels", "3", "--init_from", files["run"])
    assert code == 2 and "holds another net than this config's" in said


def test_a_test_measures_how_far_reconstructions_lie_from_the_images(whole, command):
    """By the features of a classifier trained here, for the average and for the weights themselves."""
    folder, kind = whole
    assert command("fit", "--run_name", "judge").code == 0
    judge = Path("runs/supervised/judge").absolute()
    options = [*TINY, *KINDS[kind], "--model.picture_epochs", "1"]
    code, said = study(folder, "test", *options, "--model.evaluation.extractor", judge)
    assert code == 0, said
    results = yaml.safe_load((run_of(folder) / "results.json").read_text())
    metrics, truth, extractor = results["metrics"], digits("test"), load_classifier(judge)
    enlarged = nn.functional.interpolate(Digits().read(Path(), "test").images, (16, 16), mode="bicubic", antialias=True)
    assert results["evaluation"] == {
        "samples": 300, "image_size": "16x16", "rounding": "uint8, rounded", "extractor": "judge",
        "extractor_sha256": extractor.sha256, "reference": "test images of digits", "reference_images": 300,
        "reference_sha256": hashlib.sha256(enlarged.numpy().tobytes()).hexdigest(),
        "reference_statistics": "of its images",
    }  # fmt: skip
    for tag, average in [("test", True), ("test_raw", False)]:
        with torch.no_grad():
            made = net_of(last_of(folder), average)(truth).images
        features = [extractor((127.5 * (x.clamp(-1, 1) + 1)).round().byte()).pooled.double() for x in (made, truth)]
        means, covariances = zip(*((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in features), strict=True)
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        distance = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert metrics[f"{tag}/rfd_judge"] == pytest.approx(distance, rel=1e-3)
    assert not any("rfd" in tag for tag in metrics if tag.startswith("val"))
    code, said = study(folder, "test", *options, "--model.evaluation.extractor", "inception")
    assert code == 2 and "weights-inception-2015-12-05-6726825d.pth: there is no such file" in said


def test_a_test_measures_lpips_where_its_weights_are(whole, tmp_path):
    """A run that trained without it; torchmetrics' LPIPS on the same weights is in test_perceptual.py."""
    folder, kind = whole
    (tmp_path / "weights").mkdir()
    features = make_layers(cfgs["D"])
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, tmp_path / VGG16)
    options = [*TINY, *KINDS[kind], "--model.picture_epochs", "1", "--data.root", tmp_path]
    code, said = study(folder, "test", *options)
    assert code == 0, said
    metrics = yaml.safe_load((run_of(folder) / "results.json").read_text())["metrics"]
    truth, judge = digits("test"), LPIPS().load(tmp_path)
    with torch.no_grad():
        expected = judge(net_of(last_of(folder), average=True)(truth).images, truth).mean().item()
    assert metrics["test/perceptual"] == pytest.approx(expected, rel=1e-4)
    assert metrics["test/loss"] == metrics["test/l1"] and "val/perceptual" not in metrics


def test_predict_writes_reconstructions(whole, tmp_path):
    folder, kind = whole
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for place, image in zip(("a.png", "sub/b.png"), images, strict=True):
        Image.fromarray(image).save(tmp_path / "in" / place)
    code, said = study(folder, "predict", *TINY, *KINDS[kind], "--model.picture_epochs", "1",
                       "--data.images", tmp_path / "in")  # fmt: skip
    assert code == 0, said
    net = net_of(last_of(folder), average=True)
    with torch.no_grad():
        made = net(torch.from_numpy(images)[:, None].float() / 127.5 - 1).images[:, 0]
    for place, expected in zip(("a.png", "sub/b.png"), made, strict=True):
        written = np.asarray(Image.open(run_of(folder) / "predictions" / f"{place}.png")).astype(float)
        assert np.abs(written - (127.5 * (expected.clamp(-1, 1) + 1)).numpy()).max() <= 0.51


def test_reconstructions_are_made_in_fp32_whatever_the_trainings_precision(whole, tmp_path):
    folder, kind = whole
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    found = []
    for precision in ("32-true", "bf16-mixed"):
        options = [*TINY, *KINDS[kind], "--init_from", run_of(folder), "--trainer.precision", precision]
        code, said = study(tmp_path, "validate", *options)
        assert code == 0, said
        metrics = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) == 2}
        assert study(tmp_path, "predict", *options, "--data.images", tmp_path / "in")[0] == 0
        found.append((metrics, (run_of(tmp_path) / "predictions" / "a.png.png").read_bytes()))
    assert found[0] == found[1] and {"loss", "psnr"} <= found[0][0].keys()


def test_the_usage_of_a_training_epoch_counts_every_image_once(tmp_path, scalars):
    """In micro-batches, at a learning rate of 0, so that the net is the same for all of them."""
    options = [*TINY, "--model.adversary.weight", "0", "--model.optim.lr", "0", "--data.batch_size", "399",
               "--data.batch_per_device", "133", "--trainer.max_epochs", "1",
               "--trainer.limit_train_batches", "1.0"]  # fmt: skip
    code, said = study(tmp_path, "fit", *options)
    assert code == 0, said
    net = net_of(last_of(tmp_path), average=False)
    indices = net.quantise(net.moments(digits("train")))[2]
    shares = np.bincount(indices.flatten().numpy(), minlength=64) / indices.numel()
    curves = scalars(run_of(tmp_path))
    assert (shares > 0).sum() > 1
    assert curves["train/codebook_usage"] == [(3, pytest.approx((shares > 0).mean()))]
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert curves["train/codebook_perplexity"] == [(3, pytest.approx(math.exp(entropy), rel=1e-4))]
    assert last_of(tmp_path)["state_dict"]["code_counts"].sum() == 0  # for the next epoch
    # Terms beside the loss are means over the micro-batches, as the loss is.
    whole_epoch = (net(digits("train")).images - digits("train")).abs().mean().item()
    assert np.mean([value for _, value in curves["train/l1"]]) == pytest.approx(whole_epoch, rel=1e-4)


@pytest.mark.parametrize("adversary", [["--model.adversary.weight", "0"], ["--model.adversary.norm", "group"]])
def test_micro_batches_change_nothing(adversary, tmp_path, scalars):
    """KL draws by an image's place in the global batch; the adaptive weight is that of the global batch."""
    found = []
    for most in (16, 4):
        (tmp_path / str(most)).mkdir()
        options = [*TINY, "--model.kind", "kl", *adversary, "--trainer.max_epochs", "1"]
        code, said = study(tmp_path / str(most), "fit", *options, "--data.batch_per_device", most,
                           "--trainer.limit_train_batches", 10)  # fmt: skip
        assert code == 0, said
        found.append(scalars(run_of(tmp_path / str(most))))
    felt = ("train/discriminator", "train/adversarial", "train/adaptive_weight") if "group" in adversary else ()
    for tag in ("train/loss", "train/l1", "train/kl", "train/grad_norm", "val/psnr", *felt):
        assert found[0][tag] == [(step, pytest.approx(value, rel=1e-3)) for step, value in found[1][tag]], tag
    assert [step for step, _ in found[1].get("train/adaptive_weight", [])] == ([9, 10] if felt else [])


def test_a_codebook_that_collapses_is_told_once(tmp_path):
    module = AutoencoderTraining(Recipe(lr=1e-3), perceptual="none")
    module._trainer = SimpleNamespace(logger=CSVLogger(tmp_path), global_step=1, current_epoch=0)
    module.register_buffer("code_counts", torch.zeros(64, dtype=torch.int64))
    said = []
    for used in (7, 6, 5, 64, 2):  # 10 % are 6.4
        module.code_counts[:used] = 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusion.vqgan.rank_zero_warn", said.append)
            module._report_codebook()
    assert [message.split(". ")[0] for message in said] == [
        "the codebook collapses: epoch 1 used 9.4% of its 64 codes, fewer than 10%",
        "the codebook collapses: epoch 1 used 3.1% of its 64 codes, fewer than 10%",
    ]


def test_each_player_is_clipped_by_its_own_norm(tmp_path, monkeypatch):
    """Once a step, of all its micro-batches; the discriminator has no gradients before its warm-up."""
    norms, clip = [], AutoencoderTraining.configure_gradient_clipping

    def norm(part: nn.Module) -> float:
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        return torch.stack([gradient.norm() for gradient in gradients]).norm().item() if gradients else 0.0

    def watched(module: AutoencoderTraining, *given: Any, **options: Any) -> None:
        before = norm(module.net), norm(module.discriminator)
        clip(module, *given, **options)
        norms.append((*before, norm(module.net), norm(module.discriminator)))

    monkeypatch.setattr(AutoencoderTraining, "configure_gradient_clipping", watched)
    code, said = study(tmp_path, "fit", *TINY, *KINDS["kl"], "--trainer.gradient_clip_val", "0.01")
    assert code == 0, said
    befores, afters = [pair[:2] for pair in norms], [pair[2:] for pair in norms]
    assert len(norms) == 18 and all(before[0] > 0.01 for before in befores)
    assert [after[0] for after in afters] == pytest.approx([0.01] * 18, rel=1e-3)
    assert [after[1] for after in afters] == pytest.approx(
        [min(before[1], 0.01) for before in befores], rel=1e-3) and sum(before[1] > 0.01 for before in befores) >= 10


@pytest.mark.soak
@pytest.mark.parametrize("kind, epochs, steps, rel", [("kl", 2, 6, 2e-5), ("vq", 1, 9, 1e-4)])
def test_two_processes_train_as_one(kind, epochs, steps, rel, tmp_path, scalars):
    """With group norm; batch norm's statistics are a device's.

    A discriminator that is felt amplifies rounding severalfold a step, and a code that rounding chose otherwise is
    another reconstruction: KL, which has no codes, is compared over the first four such steps, VQ over one.
    """
    options = ["--run_name", "a", *TINY, "--model.adversary.norm", "group", "--trainer.accelerator", "cpu",
               "--model.kind", kind, "--trainer.max_epochs", str(epochs), "--trainer.limit_train_batches", str(steps),
               "--trainer.limit_val_batches", "1.0"]  # a batch of each of two is twice as many images
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        words = ["fit", "--config", DIGITS, "--runs", folder / "runs", *options, "--trainer.devices", devices,
                 "--data.batch_per_device", 16 // devices**2]  # of two: each in two micro-batches
        done = run("diffusion", *words, ranks=devices)
        assert done.returncode == 0, done.stderr
        found.append((tensors(last_of(folder)), scalars(run_of(folder))))
    (one, curves), (two, others) = found
    tags = ("train/loss", "train/adaptive_weight", "val/psnr", "train/codebook_usage" if kind == "vq" else "train/kl")
    for tag in tags:
        margin = 2 * rel if tag == "train/adaptive_weight" and kind == "vq" else rel
        assert curves[tag] == [(step, pytest.approx(value, rel=margin)) for step, value in others[tag]], tag
    assert len(curves["train/adaptive_weight"]) == steps * epochs - 8
    weights = [name for name in one if name.startswith(("net.", "discriminator."))]
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in weights])
    # Adam turns a gradient that is nothing but rounding into a step of the full length.
    assert (apart > 2e-4).sum() <= (0 if kind == "kl" else 3) and apart.max() < 1e-3


# What is refused


@pytest.mark.parametrize("arguments, message", [
    (["--data.image_size", "15"], "data.image_size: 15x15 is not a multiple of 2, by which 2 multipliers reduce"),
    (["--data.mean", "[0.2]"], "data.mean, data.std: [0.2] and [0.5]; an autoencoder takes images in [-1, 1]"),
    (["--data.batch_per_device", "8"], "needs the 16 images of a device at once, but it holds 8; use at most 8, more "
     "devices, or model.adversary.norm=group"),
    (["--model.adversary.layers", "3"], "model.adversary.layers: 3 need images of 24x24 pixels at least, not 16x16"),
    (["--model.adversary.warmup", "9"], "model.adversary.warmup: 9 steps do not fit before start=8"),
    (["--model.adversary.weight", "-1"], "model.adversary.weight: -1.0 is less than 0"),
    (["--model.kl_weight", "-1"], "model.kl_weight: -1.0 is negative"),
    (["--model.optim.layer_decay", "0.5"], "model.optim.layer_decay: 0.5 needs layers in a row"),
    (["--model.perceptual", "lpips"], "data/weights/vgg16-397923af.pth: there is no such file; fetch torchvision's"),
    (["--model.groups", "3"], "groups=3 does not divide base=8"),
    (["--init_from", "absent"], "--init_from: there is no run folder or file absent"),
])  # fmt: skip
def test_mistakes_are_named(arguments, message, tmp_path):
    code, said = study(tmp_path, "fit", *TINY, *arguments)
    assert code == 2 and message in " ".join(said.split()), said
    assert not (tmp_path / "runs").exists() or not run_of(tmp_path).exists()


def test_lpips_refuses_images_that_its_pools_would_use_up(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / VGG16).touch()
    module = AutoencoderTraining(Recipe(lr=1e-3), base=8, groups=4, multipliers=(1, 2))
    data = SimpleNamespace(mean=(0.5,), std=(0.5,), channels=1, image_size=(16, 14), root=tmp_path)
    with pytest.raises(InputError, match="model.perceptual: lpips needs images of 16x16 pixels at least, not 16x14"):
        module.build(data)


KL = ["--model.kind", "kl", "--model.multipliers", "[1,2,4,4]", "--model.attention", "middle"]  # as the config says


@pytest.mark.parametrize("kind", [[], KL], ids=["vq", "kl"])
def test_the_paper_s_trains_with_lpips_and_is_refused_without(kind, tmp_path):
    """In bf16-mixed, at a quarter of the image's side and of the width."""
    config = CONFIGS / "autoencoder_imagenet256.yaml"
    for split in ("train", "val"):
        for i in range(4):
            place = tmp_path / "data" / "imagenet" / split / f"n0{i % 2}" / f"{i}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(place)
    assert all(word in config.read_text() for word in KL)
    small = [*kind, "--data.image_size", "64", "--model.base", "32", "--data.batch_size", "2",
             "--data.eval_batch_size", "2", "--data.workers", "0", "--trainer.max_epochs", "1",
             "--model.optim.warmup_epochs", "0", "--model.adversary.start", "1",
             "--trainer.log_every_n_steps", "1", "--model.codebook_size", "64", "--trainer.accelerator", "cpu"]
    code, said = study(tmp_path, "fit", *small, config=config)
    assert code == 2 and f"{VGG16}: there is no such file; fetch torchvision's VGG16" in said
    (tmp_path / "data" / "weights").mkdir()
    weights = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    torch.save(weights, tmp_path / "data" / VGG16)
    code, said = study(tmp_path, "fit", *small, config=config)
    assert code == 0, said
    checkpoint = last_of(tmp_path)
    assert not [key for key in checkpoint["state_dict"] if "features" in key or "lin0" in key or "perceptual" in key]
    metrics = yaml.safe_load((run_of(tmp_path) / "results.json").read_text())["metrics"]
    assert metrics["val/loss"] == pytest.approx(metrics["val/l1"] + metrics["val/perceptual"], rel=1e-5)
    assert metrics["train/perceptual"] > 0 and metrics["train/adaptive_weight"] > 0


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_config_of_shapes_trains(kind, tmp_path):
    options = ["--model.kind", kind, "--data.source.train", "8", *TWO_STEPS,
               "--model.adversary.start", "1", "--model.adversary.warmup", "0"]  # fmt: skip
    code, said = study(tmp_path, "fit", *options, config=CONFIGS / "autoencoder_shapes.yaml")
    assert code == 0, said
    metrics = yaml.safe_load((run_of(tmp_path) / "results.json").read_text())["metrics"]
    assert math.isfinite(metrics["val/psnr"]) and last_of(tmp_path)["global_step"] == 2


def test_curves_reduce_what_stands_beside_the_loss(tmp_path):
    """To the mean over the micro-batches that returned it, while Lightning has divided the loss."""
    curves, logged = Curves(), []
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_step=1, log_every_n_steps=1, datamodule=SimpleNamespace(global_batch=4),
        strategy=SimpleNamespace(reduce=lambda x, reduce_op: x),
        logger=SimpleNamespace(log_metrics=lambda values, step: logged.append(values)),
    )  # fmt: skip
    for i, (loss, l1) in enumerate([(1.5, 2.0), (0.5, 4.0)]):
        out = {"loss": torch.tensor(loss), "l1": torch.tensor(l1), **({"last": torch.tensor(5.0)} if i else {})}
        curves.on_train_batch_end(trainer, None, out, None, i)
    assert {tag: logged[0][f"train/{tag}"] for tag in ("loss", "l1", "last")} == {"loss": 2.0, "l1": 3.0, "last": 5.0}
