"""Sequence parallelism against one process: outputs, every gradient, memory, runs of the command, refusals."""

import copy
import os
import re
import socket
import sys
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import run
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from common.benchmark.memory import kept_bytes
from common.errors import InputError
from common.model import VisionTransformer
from common.model.transformer import Attention
from common.parallel.sequence import divide_tokens
from common.training.checkpoints import read
from common.training.cli import main
from diffusion.dit import DiT
from mae.model import MaskedAutoencoder
from supervised import Classification

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "supervised" / "configs" / "digits.yaml"


def on_ranks(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of several processes that know each other."""
    # Forked: fresh processes would import for longer than they compute.
    mp.start_processes(_rank, (ranks, work, str(folder), arguments), nprocs=ranks, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save(work(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# One step


class Case(NamedTuple):
    """A net, and what becomes of random images (B, 3, 5, 5): its output and its loss, a mean over them."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def loss_of(output: Tensor) -> Tensor:
    """Different for every element, and with no gradient that is zero."""
    return (output.float() - torch.linspace(-1, 1, output[0].numel()).view_as(output[0])).square().mean()


def classify(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(images, drops=images.flatten(1)[:, :6].sigmoid())
    return logits, loss_of(logits)


class Masked(nn.Module):
    """Encodes with a key mask that differs from image to image, as segments do."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor, drops: Tensor) -> Tensor:
        tokens = self.vit.embed(images)
        there = torch.cat([torch.ones(len(images), 1), images[:, 0].flatten(1)], dim=1) > 0
        return self.vit.forward_head(self.vit.norm(self.vit.encode(tokens, drops, there)))


def reconstruct(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    loss, prediction, _ = net(images, images[:, 0].flatten(1), 0.5)  # 12 of 25 tokens are visible
    return prediction, loss


def denoise(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    labels = (10 * images[:, 0, 0, 0]).long() % 3
    output = net(images, 100 * images[:, 0, 0, 1].abs(), labels, drops=images[:, 0, 0, 2].sigmoid())
    return output, loss_of(output)


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(**{"image_size": 5, "patch_size": 1, "classes": 7, "width": 24, "depth": 3, "heads": 4,
                                "drop_path": 0.4, **options})  # fmt: skip


def dit(**options: Any) -> DiT:
    return DiT(**{"input_size": 5, "patch_size": 1, "channels": 3, "classes": 3, "width": 24, "depth": 2, "heads": 4,
                  "label_dropout": 0.5, **options})  # fmt: skip


CASES = {
    "heads": Case(vit, classify),  # 26 tokens
    "keys": Case(partial(vit, heads=3), classify),
    "average": Case(partial(vit, class_token=False, pool="avg"), classify),  # 25 tokens
    "keys, average": Case(partial(vit, class_token=False, pool="avg", heads=3), classify),
    "recomputed": Case(partial(vit, checkpoint_blocks=3), classify),
    "keys, partly recomputed": Case(partial(vit, heads=3, checkpoint_blocks=2), classify),
    "qk_norm": Case(partial(vit, qk_norm=True), classify),
    "keys, qk_norm": Case(partial(vit, qk_norm=True, heads=3), classify),
    "mask": Case(lambda: Masked(vit(checkpoint_blocks=1)), classify),
    "keys, mask": Case(lambda: Masked(vit(heads=3)), classify),
    "mae": Case(partial(MaskedAutoencoder, 5, 1, width=24, depth=2, heads=3, decoder_width=16, decoder_depth=2,
                        decoder_heads=4), reconstruct),
    "dit": Case(dit, denoise),
    "dit, recomputed": Case(partial(dit, heads=3, checkpoint_blocks=2), denoise),
}  # fmt: skip


def lively(build: Callable[[], nn.Module]) -> nn.Module:
    """With weights that make every parameter matter; some start at zero."""
    torch.manual_seed(0)
    net = build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.train()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def step(net: nn.Module, run: Callable, batch: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16, cache_enabled=False):
        output, loss = run(net, batch)
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"output": output.detach(), **gradients}


def divided_step(case: Case, devices: int, precision: torch.dtype) -> tuple[dict[str, Tensor], set[int]]:
    """A step of a group's part of the images, and the numbers of tokens that an MLP of this rank has seen."""
    net = lively(case.build)
    divide_tokens(net, dist.new_subgroups(devices)[0])
    seen = set()
    for module in net.modules():
        if isinstance(module, Attention):
            module.proj.register_forward_hook(lambda _, inputs, __: seen.add(inputs[0].shape[1]))
    groups = dist.get_world_size() // devices
    part = images().chunk(groups)[dist.get_rank() // devices]
    replica = nn.parallel.DistributedDataParallel(net, static_graph=True, gradient_as_bucket_view=True)
    return step(replica, case.run, part, precision), seen


def assert_as_one_process(case: Case, ranks: int, devices: int, folder: Path, precision=torch.float32, **bounds: float):
    expected = step(lively(case.build), case.run, images(), precision)
    bounds = bounds or {"rtol": 1e-5, "atol": 1e-5}
    results = on_ranks(ranks, divided_step, folder, case, devices, precision)
    groups = ranks // devices
    for rank, (found, _) in enumerate(results):
        whole = {**expected, "output": expected["output"].chunk(groups)[rank // devices]}
        assert found.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], **bounds, msg=lambda text, name=name: name + text)
    return [seen for _, seen in results]


@pytest.mark.parametrize("name", CASES)
def test_two_devices_give_the_output_and_the_gradients_of_one(name, tmp_path):
    assert_as_one_process(CASES[name], 2, 2, tmp_path)


def test_three_devices_have_nine_eight_and_eight_of_25_tokens(tmp_path):
    seen = assert_as_one_process(CASES["keys, average"], 3, 3, tmp_path)
    assert seen == [{9}, {8}, {8}]


@pytest.mark.parametrize("name", ["recomputed", "keys", "mae", "dit"])
def test_two_groups_of_two_devices_share_a_batch(name, tmp_path):
    seen = assert_as_one_process(CASES[name], 4, 2, tmp_path)
    if name != "mae":
        assert seen == 2 * [{13}, {13 if name != "dit" else 12}]
    else:
        assert seen == 2 * [{7, 13}, {6, 13}]  # 13 visible tokens and 26, the class token's among them


@pytest.mark.parametrize("name", ["qk_norm", "keys, qk_norm"])
def test_bf16(name, tmp_path):
    assert_as_one_process(CASES[name], 2, 2, tmp_path, torch.bfloat16, rtol=0.05, atol=0.01)


def without_gradients() -> dict[str, list[Tensor]]:
    """What the net, an average of its weights and the maps say on the first rank, while the other does nothing."""
    net = lively(CASES["heads"].build)
    divide_tokens(net, dist.new_subgroups(2)[0])
    classify(net, images())  # the copy is made in the middle of training
    average = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()  # of no concern to the copy
        if dist.get_rank() == 0:
            return {"logits": average.eval()(images()), "maps": average.attention_maps(images(), [0, 2])}
    return {}


def test_where_nothing_is_trained_a_device_works_by_itself(tmp_path):
    net = lively(CASES["heads"].build).eval()
    with torch.no_grad():
        expected = {"logits": net(images()), "maps": net.attention_maps(images(), [0, 2])}
    found, _ = on_ranks(2, without_gradients, tmp_path)
    assert torch.equal(found["logits"], expected["logits"])
    assert all(torch.equal(found["maps"][layer], expected["maps"][layer]) for layer in (0, 2))


def kept(blocks: int, heads: int, recomputed: int = 0, divided: bool = False) -> int:
    torch.manual_seed(0)
    net = VisionTransformer(16, 1, classes=0, width=64, depth=blocks, heads=heads, checkpoint_blocks=recomputed)
    if divided:
        divide_tokens(net, dist.new_subgroups(dist.get_world_size())[0])
    return kept_bytes(lambda: net(torch.zeros(1, 3, 16, 16)), net.parameters())


def kept_of_blocks(heads: int, recomputed: bool) -> int:
    return kept(4, heads, 4 * recomputed, divided=True) - kept(2, heads, 2 * recomputed, divided=True)


# Per token 16 vectors: with heads exchanged one more, the attention's output on its way back; with keys and values
# gathered these 2 are whole. A recomputed block keeps its input alone.
@pytest.mark.parametrize("heads, recomputed, share", [
    (4, False, 17 / 16 / 2), (1, False, (14 / 2 + 2) / 16), (4, True, 1 / 2), (1, True, 1 / 2),
])  # fmt: skip
def test_what_a_device_keeps_of_a_block(heads, recomputed, share, tmp_path):
    whole = kept(4, heads, 4 * recomputed) - kept(2, heads, 2 * recomputed)
    for found in on_ranks(2, kept_of_blocks, tmp_path, heads, recomputed):
        assert found / whole == pytest.approx(share, rel=0.02)


# The command

# 10 of 37 steps an epoch.
RUN = ["--model.width", "24", "--model.depth", "2", "--model.heads", "4", "--model.checkpoint_blocks", "1",
       "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.optim.ema", "0.9", "--model.optim.warmup_epochs",
       "1", "--trainer.gradient_clip_val", "1", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "0.28",
       "--data.batch_size", "32", "--checkpoint.every_n_steps", "5", "--trainer.accelerator", "cpu",
       "--trainer.log_every_n_steps", "1"]  # fmt: skip
SHARED = ["--trainer.strategy", "sequence"]
BY_TWO = ["--trainer.strategy", "common.parallel.sequence.SequenceStrategy", "--trainer.strategy.devices_per_image",
          "2"]  # fmt: skip
SAMPLES = ["--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation", "bilinear",
           "--model.patch_size", "2", "--model.width", "16", "--model.depth", "1", "--model.heads", "2",
           "--model.optim.warmup_epochs", "1", "--model.picture_steps", "2", "--trainer.max_epochs", "1",
           "--trainer.accelerator", "cpu", "--hang_timeout", "60"]  # fmt: skip


def fit_on_ranks(folder: Path, ranks: int, *arguments: str, study: str = "supervised", run: list[str] = RUN,
                 code: int = 0) -> None:
    """`python -m STUDY fit` on several ranks, as a launcher would start them; each has to end with this exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [study, "fit", "--config", str(ROOT / study / "configs" / "digits.yaml"), *run, *arguments,
             "--trainer.devices", str(ranks)]  # fmt: skip
    mp.start_processes(_fit, (port, str(folder), words, code), nprocs=ranks, start_method="fork")


def _fit(rank: int, port: int, folder: str, words: list[str], code: int) -> None:
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # which Lightning has found when it was imported, before the fork
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    sys.argv = words
    with pytest.raises(SystemExit) as leaving:
        main(words[0])
    assert (leaving.value.code or 0) == code


def tensors(run: Path) -> dict[str, Tensor]:
    """Weights and their average at the end of a run; the keys' bias, whose gradient is rounding, left out."""
    checkpoint = read(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 20
    average = {f"ema.{name}": value for name, value in checkpoint["ema"]["state_dict"].items()}
    found = {**checkpoint["state_dict"], **average}
    return {name: value.view(3, -1)[::2] if name.endswith("qkv.bias") else value for name, value in found.items()}


def curves(run: Path, scalars: Callable) -> dict[str, list[tuple[int, float]]]:
    """Those of training and of both evaluations, but for the times."""
    named = ("train/loss", "train/grad_norm", "train/lr")
    return {tag: points for tag, points in scalars(run).items() if tag in named or tag.startswith(("val/", "val_raw/"))}


def assert_same_run(run: Path, other: Path, scalars: Callable) -> None:
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5, msg=lambda text, name=name: name + text)
    ours, theirs = curves(run, scalars), curves(other, scalars)
    assert ours.keys() == theirs.keys() and len(ours["train/loss"]) == 20 and "val_raw/acc1" in ours
    for tag in ours:
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]]
        for (step, value), (_, expected) in zip(ours[tag], theirs[tag], strict=True):
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True), (tag, step)


@pytest.fixture
def alone(command: Callable, tmp_path: Path) -> Path:
    """The folder of the run by one process."""
    assert command("fit", *RUN, "--run_name", "alone", small=False).code == 0
    return tmp_path / "runs" / "supervised" / "alone"


def test_twenty_steps_of_the_command_equal_those_of_one_process(alone, scalars, tmp_path):
    words = ["fit", "--config", DIGITS, *RUN, "--run_name", "shared", "--trainer.devices", "2", *SHARED]
    done = run("supervised", *words, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "micro-batch per device     32" in done.stdout
    assert_same_run(alone.with_name("shared"), alone, scalars)


def test_two_groups_of_two_devices_in_two_micro_batches(alone, scalars, tmp_path):
    fit_on_ranks(tmp_path, 4, *BY_TWO, "--data.batch_per_device", "8", "--run_name", "groups")
    assert_same_run(alone.with_name("groups"), alone, scalars)


def test_a_run_goes_on_with_and_without_shared_images(alone, command, tmp_path):
    """By one process, by two from step 5 on, and by one again from step 10 on."""
    run = ["--run_name", "changing"]
    last = alone.with_name("changing") / "checkpoints" / "last.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "on_train_batch_start", partialmethod(_fail_at, 7))
        assert command("fit", *RUN, *run, small=False).code == 1
        assert read(last)["global_step"] == 5
        patch.setattr(Classification, "on_train_batch_start", partialmethod(_fail_at, 13))
        fit_on_ranks(tmp_path, 2, *SHARED, *run, code=1)
        assert read(last)["global_step"] == 10
    assert command("fit", *RUN, *run, small=False).code == 0
    found, expected = tensors(alone.with_name("changing")), tensors(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)


def _fail_at(module: Classification, step: int, *_: Any) -> None:
    if module.trainer.global_step == step:
        raise RuntimeError("the machine has failed")


def test_a_picture_that_the_first_rank_samples_alone(tmp_path):
    fit_on_ranks(tmp_path, 2, *SHARED, "--run_name", "samples", study="diffusion", run=SAMPLES)
    assert (tmp_path / "runs/diffusion/samples/figures/samples.png").is_file()


# What cannot be divided


@pytest.mark.parametrize("options, message", [
    (["--trainer.devices", 4, *BY_TWO[:3], 3], "devices_per_image: 3 does not divide the 4 devices; 1 or 2 or 4 would"),
    (["--trainer.devices", 2, *BY_TWO[:3], 0], "devices_per_image: 0 does not divide the 2 devices; 1 or 2 would"),
    (["--trainer.devices", 8, *BY_TWO, "--data.batch_size", 126], "126 images do not divide over 4 "),
])  # fmt: skip
def test_the_devices_must_fit_together(command, options, message):
    refused = command("check", "--trainer.accelerator", "cpu", *options)
    assert refused.code == 2 and message in refused.err


def test_a_check_knows_who_shares_images(command):
    checked = command("check", "--trainer.accelerator", "cpu", "--trainer.devices", 8, *BY_TWO)
    assert checked.code == 0 and re.search(r"devices +8 *\n.*per device +32 ", checked.out), checked


def refusals() -> list[str]:
    group = dist.new_subgroups(3)[0]
    tokens = VisionTransformer(2, 2, 3, 5, class_token=False, pool="avg", width=8, depth=1, heads=1)
    divide_tokens(tokens, group)
    messages = []
    for wrong in (lambda: tokens(torch.zeros(1, 3, 2, 2)), lambda: divide_tokens(nn.Linear(2, 2), group)):
        with pytest.raises(InputError) as error:
            wrong()
        messages.append(str(error.value))
    return messages


def test_nets_that_cannot_be_divided_are_refused(tmp_path):
    for few, none in on_ranks(3, refusals, tmp_path):
        assert "1 of an image are fewer than the 3 devices that share it" in few
        assert "Linear has none; use ddp" in none
