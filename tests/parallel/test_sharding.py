"""Sharded training is that of one device, and a run changes its strategy when it goes on."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import Command
from torch.distributed.device_mesh import init_device_mesh

from common.model import VisionTransformer
from common.parallel.sharding import shard

# Mixup, dropped paths, an average, clipping, and two micro-batches on each of two devices.
RECIPE = ["--config", "supervised/configs/digits.yaml", "--model.patch_size", "2", "--model.optim.ema", "0.9",
          "--model.mixup", "0.8", "--model.drop_path", "0.2", "--trainer.gradient_clip_val", "0.5",
          "--data.batch_size", "64", "--data.batch_per_device", "16", "--checkpoint.every_n_steps", "5"]  # fmt: skip
COMMON = ["--model.optim.warmup_epochs", "1", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
          "--trainer.log_every_n_steps", "1"]  # fmt: skip
SHARDED = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"]


def start(runs: Path, name: str, *more: str, study: str = "supervised", recipe: list[str] = RECIPE) -> Command:
    words = ["fit", *recipe, *COMMON, "--runs", runs, "--run_name", name, *more]
    return Command(study, *words, ranks=2 if "--trainer.devices" in more else 1)


def finish(runs: Path, name: str, *more: str, study: str = "supervised", recipe: list[str] = RECIPE) -> dict:
    """The last checkpoint."""
    process = start(runs, name, *more, study=study, recipe=recipe)
    assert process.wait(timeout=900) == 0, process.stderr
    return torch.load(runs / study / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return finish(tmp_path_factory.mktemp("one"), "one")


def assert_alike(ours: dict, theirs: dict) -> None:
    """In layout to the letter, in weights and average to 1e-5, in moments to 1e-6."""
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert list(part(ours)) == list(part(theirs))
        for name, value in part(theirs).items():
            other = part(ours)[name]
            assert type(other) is torch.Tensor and (other.shape, other.dtype) == (value.shape, value.dtype)
            kept = torch.ones(len(value), dtype=torch.bool)
            if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam magnifies
                kept.view(3, -1)[1] = False
            torch.testing.assert_close(other[kept], value[kept], rtol=0, atol=1e-5, msg=name)
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [{**group, "params": list(group["params"])} for group in ours["param_groups"]] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, moments in theirs["state"].items():
        for name, value in moments.items():
            assert type(ours["state"][index][name]) is torch.Tensor
            torch.testing.assert_close(ours["state"][index][name], value, rtol=0, atol=1e-6)


def test_a_training_is_that_of_one_device(tmp_path: Path, one: dict) -> None:
    assert_alike(finish(tmp_path, "two", *SHARDED), one)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "sequence"])
def test_compiled_blocks_train_alike_under_every_strategy(tmp_path: Path, one: dict, strategy: str) -> None:
    """By inductor, which takes minutes on a CPU the first time; the hooks of a strategy are within what it compiles."""
    ours = finish(tmp_path, "compiled", "--trainer.devices", "2", "--trainer.strategy", strategy, "--compile", "true")
    for name, value in one["state_dict"].items():
        if not name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam magnifies
            torch.testing.assert_close(ours["state_dict"][name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("first, then", [(SHARDED, []), ([], SHARDED)])
def test_a_run_goes_on_with_another_strategy(tmp_path: Path, one: dict, first: list[str], then: list[str]) -> None:
    process = start(tmp_path, "run", *first)
    last = tmp_path / "supervised" / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75, process.stderr
    assert 5 <= torch.load(last, weights_only=True)["global_step"] < 36
    assert_alike(finish(tmp_path, "run", *then), one)


@pytest.mark.soak
@pytest.mark.parametrize("study, recipe", [
    ("mae", ["--config", "mae/configs/digits.yaml", "--model.patch_size", "2", "--model.picture_epochs", "0"]),
    ("diffusion", ["--config", "diffusion/configs/digits.yaml", "--model.patch_size", "2", "--model.picture_epochs",
                   "0", "--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation",
                   "bilinear"]),
])  # fmt: skip
def test_other_studies(tmp_path: Path, scalars: Callable, study: str, recipe: list[str]) -> None:
    for name, more in (("one", []), ("two", SHARDED)):
        finish(tmp_path, name, *more, study=study, recipe=recipe)
    one, two = (scalars(tmp_path / study / name) for name in ("one", "two"))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
        values = [value for _, value in one[tag]]
        assert [value for _, value in two[tag]] == pytest.approx(values, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("study, recipe", [
    ("supervised", ["--config", "supervised/configs/rooms.yaml", "--model.patch_size", "6", "--data.source.train", "32",
                    "--data.source.val", "5", "--data.eval_batch_size", "1", "--model.optim.ema", "0.9"]),
    ("diffusion", ["--config", "diffusion/configs/digits.yaml", "--model.patch_size", "4", "--model.picture_epochs",
                   "1", "--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation",
                   "bilinear", "--model.optim.ema", "null", "--model.picture_steps", "2"]),
])  # fmt: skip
def test_a_device_may_evaluate_alone(tmp_path: Path, study: str, recipe: list[str]) -> None:
    """Three images against two, and a picture of samples that the first device draws; the training goes on after it."""
    last = finish(tmp_path, "two", *SHARDED, "--hang_timeout", "60", study=study, recipe=recipe)
    assert last["epoch"] == 1 and all(value.isfinite().all() for value in last["state_dict"].values())


def held(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = VisionTransformer(image_size=8, patch_size=1, channels=1, classes=10, width=16, depth=2, heads=2)
    shard(net, init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    parameters = sum(p.to_local().numel() for p in net.parameters())
    gradients = sum(p.grad.to_local().numel() for p in net.parameters())
    moments = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
    torch.save((parameters, gradients, moments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_each_device_holds_its_shard_alone(tmp_path: Path) -> None:
    mp.start_processes(held, (str(tmp_path),), nprocs=2, start_method="fork")
    net = VisionTransformer(image_size=8, patch_size=1, channels=1, classes=10, width=16, depth=2, heads=2)
    whole = sum(p.numel() for p in net.parameters())
    counts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in range(3):
        assert sum(count[kind] for count in counts) == whole
        assert max(count[kind] for count in counts) < 0.6 * whole


def test_two_nets_that_play_are_refused(tmp_path: Path) -> None:
    recipe = ["--config", "diffusion/configs/autoencoder_digits.yaml"]
    process = start(tmp_path, "gan", *SHARDED, study="diffusion", recipe=recipe)
    assert process.wait() == 2
    assert "trainer.strategy: fsdp2 shards one net, and AutoencoderTraining" in process.stderr
