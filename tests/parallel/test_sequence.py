"""Tokens that are spread over processes give the outputs and gradients of one process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from common.benchmark.memory import kept_bytes
from common.model import VisionTransformer
from common.parallel.sequence import spread
from diffusion.dit import DiT
from mae.model import MaskedAutoencoder

ROOT = Path(__file__).parent.parent.parent
SMALL = {"width": 24, "depth": 3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(images: Tensor, **options: object) -> tuple[nn.Module, Callable[[], Tensor]]:
    net = VisionTransformer(image_size=(3, 5), patch_size=1, channels=1, classes=7, **SMALL, **options)
    return net, lambda: net(images, drops=random(2, 6, seed=1).sigmoid() if net.drop_path else None)


def mae(images: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    net = MaskedAutoencoder(image_size=(3, 5), patch_size=1, channels=1, decoder_width=16, decoder_depth=2,
                            decoder_heads=2, heads=3, **SMALL)  # fmt: skip
    noise = random(2, 15, seed=1).sigmoid()  # 3 visible tokens, and the class token: 2 on each of two devices
    return net, lambda: torch.cat([net(images, noise)[0][None], net(images, noise)[1].flatten()])


def dit(images: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    net = DiT(input_size=(3, 5), patch_size=1, channels=1, classes=4, heads=2, checkpoint_blocks=1, label_dropout=0.0,
              **SMALL)
    return net, lambda: net(images, torch.tensor([3, 400]), torch.tensor([1, 2]))


NETS = {
    "exchanged heads, class token": lambda images: vit(images, heads=4),
    "gathered keys and values": lambda images: vit(images, heads=3, drop_path=0.4),
    "mean of the tokens, odd": lambda images: vit(images, heads=2, class_token=False, pool="avg", qk_norm=True),
    "recomputed blocks": lambda images: vit(images, heads=4, checkpoint_blocks=3),
    "recomputed blocks, gathered": lambda images: vit(images, heads=3, checkpoint_blocks=2),
    "masked autoencoder": mae,
    "diffusion transformer": dit,
}


def outputs_and_gradients(name: str, rank: int | None = None, group: object = None) -> list[Tensor]:
    """Of two images; with `rank` the gradients of the mean over processes, as DDP takes it."""
    torch.manual_seed(0)
    net, forward = NETS[name](random(2, 1, 3, 5))
    for index, parameter in enumerate(net.parameters()):  # DiT's gates are 0 at first, and would hide its blocks
        parameter.data = 0.2 * random(*parameter.shape, seed=index)
    net.train()
    if rank is not None:
        spread(net, group)
    out = forward()
    (out * random(*out.shape, seed=5)).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters() if p.requires_grad]
    if rank is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return [out.detach(), *gradients]


def part(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    dist.init_process_group("gloo", f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    for name in NETS:
        if ranks == 2 or "autoencoder" not in name:  # whose encoder sees 4 tokens
            found = outputs_and_gradients(name, rank, dist.group.WORLD)
            torch.save(found, f"{folder}/{ranks}-{rank}-{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("parts")
    mp.start_processes(part, (str(folder), request.param), nprocs=request.param, start_method="fork")
    return folder, request.param


@pytest.mark.parametrize("name", NETS)
def test_outputs_and_gradients_are_those_of_one_process(parts: tuple[Path, int], name: str) -> None:
    folder, ranks = parts
    files = [folder / f"{ranks}-{rank}-{name}.pt" for rank in range(ranks)]
    if not files[0].exists():
        assert ranks == 3 and name == "masked autoencoder"
        return
    expected = outputs_and_gradients(name)
    assert sum(gradient.abs().max() > 1e-3 for gradient in expected[1:]) > len(expected) * 0.8
    for file in files:
        for ours, theirs in zip(torch.load(file), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def kept(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(kept_by(dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def kept_by(group: object = None) -> tuple[int, int]:
    """Bytes that an image of 256 tokens keeps for its backward, without and with recomputed blocks."""
    found = []
    for recomputed in (0, 4):
        net = VisionTransformer(16, 1, classes=10, width=96, depth=4, heads=4, checkpoint_blocks=recomputed)
        if group is not None:
            spread(net, group)
        found.append(kept_bytes(lambda net=net: net(random(1, 3, 16, 16)), net.parameters()))
    return tuple(found)


def test_a_device_keeps_the_activations_of_its_tokens_alone(tmp_path: Path) -> None:
    mp.start_processes(kept, (str(tmp_path),), nprocs=2, start_method="fork")
    whole = kept_by()
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt")
        assert part[0] < 0.56 * whole[0] and part[1] < 0.8 * whole[1]  # the embedding and the joined tokens are whole


def command(runs: Path, name: str, *more: object) -> subprocess.CompletedProcess:
    options = ["--config", "supervised/configs/digits.yaml", "--runs", runs, "--run_name", name, "--model.patch_size",
               "2", "--model.mixup", "0.8", "--model.drop_path", "0.2", "--model.optim.ema", "0.9", "--data.batch_size",
               "64", "--model.optim.warmup_epochs", "1", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
               "--checkpoint.every_n_steps", "4"]  # fmt: skip
    words = [sys.executable, "-m", "supervised", "fit", *options, *more]
    return subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_training_is_that_of_one_process(tmp_path: Path) -> None:
    """17 tokens on two devices with 3 heads, mixup, dropped paths and an average; and two images at a time on four."""
    outcomes = [command(tmp_path, "one"),
                command(tmp_path, "two", "--trainer.devices", 2, "--trainer.strategy", "sequence"),
                command(tmp_path, "four", "--trainer.devices", 4, "--trainer.strategy",
                        "common.parallel.sequence.SequenceStrategy", "--trainer.strategy.devices_per_image", 2)]
    assert [outcome.returncode for outcome in outcomes] == [0, 0, 0], [outcome.stderr for outcome in outcomes]
    assert "micro-batch per device     64" in outcomes[1].stdout
    assert "micro-batch per device     32" in outcomes[2].stdout
    one, *others = (torch.load(tmp_path / "supervised" / name / "checkpoints" / "last.ckpt", weights_only=True)
                    for name in ("one", "two", "four"))
    for other in others:
        for ours, theirs in [(other["state_dict"], one["state_dict"]),
                             (other["ema"]["state_dict"], one["ema"]["state_dict"])]:
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                kept = torch.ones(len(value), dtype=torch.bool)
                if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam magnifies
                    kept.view(3, -1)[1] = False
                torch.testing.assert_close(ours[name][kept], value[kept], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("options, message", [
    (["--trainer.devices", 2, "--trainer.strategy", "common.parallel.sequence.SequenceStrategy",
      "--trainer.strategy.devices_per_image", 3],
     "trainer.strategy.devices_per_image: 3 does not divide the 2 devices"),
    (["--trainer.devices", 2, "--trainer.strategy", "sequence", "--model.patch_size", 8, "--model.class_token", "false",
      "--model.pool", "avg"], "sequence spreads 1 tokens over 2 devices"),
])  # fmt: skip
def test_what_cannot_be_spread_is_refused(tmp_path: Path, options: list[object], message: str) -> None:
    refused = command(tmp_path, "refused", *options)
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr
