"""What a device keeps for the backward where devices divide an image's tokens, measured and by formula."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.benchmark.memory import kept_bytes
from common.model import VisionTransformer
from common.model.flops import BYTES, Precision, block_bytes
from common.parallel.sequence import divide_tokens

SIDE = 32  # of the image that is measured: 1,025 tokens, which no number of devices divides evenly
MEASURED = ("tiny", "base")  # 3 heads, which two devices do not divide, and 12
LARGE = 224  # of the image that is computed
MEASURED_COLUMNS = ("model", "attention", "blocks recomputed", "MB, whole", "MB of each of 2 devices", "by formula")
COMPUTED_COLUMNS = ("devices", "attention", "GB kept, no block recomputed", "GB kept, all recomputed",
                    "GB of one block", "GB of weights", "GB in all, all recomputed")  # fmt: skip


def attention(heads: int, devices: int) -> str:
    if devices == 1:
        return "of one device"
    return "heads exchanged" if heads % devices == 0 else "keys gathered"


def divided_block_bytes(net: VisionTransformer, devices: int, precision: Precision) -> float:
    """Bytes that the device with most tokens keeps of a block, for one image.

    Where heads are exchanged, the attention's output is kept once as it is computed and once as it comes back; where
    keys and values are gathered, these are kept whole.
    """
    tokens = net.num_prefix_tokens + net.tokens
    own = -(-tokens // devices)
    inner = net.width * BYTES[precision][1]
    block = block_bytes(own, net.width, precision, net.qk_norm)
    if devices == 1:
        return block
    return block + (own * inner if net.heads % devices == 0 else 2 * (tokens - own) * inner)


def input_bytes(net: VisionTransformer, devices: int, precision: Precision) -> int:
    """Bytes of the input of a block, of which alone a recomputed one keeps."""
    return -(-(net.num_prefix_tokens + net.tokens) // devices) * net.width * BYTES[precision][0]


def measured(size: str, recomputed: bool, devices: int = 1) -> float:
    """Bytes that one block keeps of an image: half of what two more blocks add."""
    kept = []
    for depth in (2, 4):
        net = VisionTransformer(SIDE, 1, classes=0, size=size, depth=depth, checkpoint_blocks=depth * recomputed)
        if devices > 1:
            divide_tokens(net, dist.group.WORLD)
        kept.append(kept_bytes(lambda net=net: net(torch.zeros(1, 3, SIDE, SIDE)), net.parameters()))
    return (kept[1] - kept[0]) / 2


def _measure(rank: int, folder: str, size: str, recomputed: bool) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    Path(folder, str(rank)).write_text(str(measured(size, recomputed, 2)))
    dist.destroy_process_group()


def measured_rows() -> Iterator[tuple[str, ...]]:
    for size in MEASURED:
        with torch.device("meta"):
            net = VisionTransformer(SIDE, 1, classes=0, size=size)
        for recomputed in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_measure, (folder, size, recomputed), nprocs=2, start_method="fork")
                parts = [float(Path(folder, str(rank)).read_text()) for rank in range(2)]
            formula = (input_bytes if recomputed else divided_block_bytes)(net, 2, "32-true")
            yield (f"{size}/1, {SIDE}x{SIDE}", attention(net.heads, 2), "yes" if recomputed else "no",
                   f"{measured(size, recomputed) / 1e6:.2f}", " and ".join(f"{part / 1e6:.2f}" for part in parts),
                   f"{formula / 1e6:.2f}")  # fmt: skip


def computed_rows(precision: Precision = "bf16-mixed") -> Iterator[tuple[str, ...]]:
    """ViT-B/1 at 224x224, one image."""
    with torch.device("meta"):
        net = VisionTransformer(LARGE, 1, size="base")
    weights = 22 * sum(p.numel() for p in net.parameters())  # with gradients, moments, an average and a bf16 copy
    for devices in (1, 2, 4, 8):
        block = divided_block_bytes(net, devices, precision)
        # The first block's input is the whole image's.
        inputs = input_bytes(net, 1, precision) + (net.depth - 1) * input_bytes(net, devices, precision)
        figures = net.depth * block, inputs, block, weights, inputs + block + weights
        yield str(devices), attention(net.heads, devices), *(f"{figure / 1e9:.2f}" for figure in figures)
