"""The formulas' FLOPs of every net of the paper, at its full size, against torch's own counter; on the meta device.

The autoencoder has no formula: its cost is counted, and compared with a real step in tests/diffusion/test_objective.py.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.paper.cost import _built
from common.paper.exhibits import ROOT, Arm, Start, read_exhibits
from common.training.cli import StudyCLI
from common.training.module import Experiment
from diffusion import DiT
from diffusion.dit import SINUSOIDS
from locality_ablation.dictionary import DictionaryTransformer
from locality_ablation.grouping import SegmentTransformer
from mae import MaskedAutoencoder
from supervised.depth_net import DepthNet

# What other scales have and the paper's has not: latents of an own autoencoder, pixels in their place, entries of a
# dictionary that are projected, few segments.
SMALLER = [("demo", "T5", "nano/1"), ("gpu", "T5", "T/1"), ("gpu", "T7", "dictionary"), ("gpu", "T9", "SLIC 1")]
# Configs that no exhibit trains.
FURTHER = ["mae/imagenet28", "mae/imagenet224", "mae/cifar100_probe", "mae/imagenet28_probe", "mae/imagenet224_probe"]
# Overrides that leave the net as it is. One that is missing here makes a case more.
BESIDE = re.compile(r"seed_everything|trainer\.|model\.(optim|permutation)\.|data\.(augment|eval_interpolation)"
                    r"|data\.segmentation\.iterations")  # fmt: skip
# One of each kind of net, with their training.
KINDS = ["T3a T/2", "T3d S/2", "T4a pre-training/2", "gpu T5 T/1", "T7 dictionary", "gpu T7 dictionary",
         "gpu T9 SLIC 1"]  # fmt: skip


def starts() -> dict[str, Start]:
    """One for each net."""
    exhibits = read_exhibits()
    found = {f"{exhibit.id} {start.arm.name}": start for exhibit in exhibits.values() if "paper" in exhibit.scales
             for start in exhibit.scale("paper").starts(1)}
    for scale, id, arm in SMALLER:
        found |= {f"{scale} {id} {arm}": start for start in exhibits[id].scale(scale).starts(1)
                  if start.arm.name == arm}
    for name in FURTHER:
        study, config = name.split("/")
        found[name] = Start(Arm(name, study, ROOT / study / "configs" / f"{config}.yaml", {}, {}), 0, {})
    nets = {}
    for name, start in found.items():
        overrides = {key: value for key, value in start.arm.overrides.items() if not BESIDE.match(key)}
        nets.setdefault((start.arm.study, start.arm.config.name, str(overrides)), name)
    return {name: found[name] for name in nets.values()}


CASES = starts()


@pytest.fixture(scope="module", autouse=True)
def quick_parsing() -> Iterator[None]:
    """Without the config that a run would store, which takes most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudyCLI, "_resolved", lambda *_: {})
        yield


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@cache
def built(name: str) -> tuple[Experiment, nn.Module]:
    module, _, net = _built(alone(CASES[name]))
    return module, net.eval()


def alone(start: Start) -> Start:
    """Of the runs that it uses only the one that shapes the net, and with a name, which it need not find."""
    arm = replace(start.arm, overrides={**start.arm.overrides, "run_name": "any"})
    sources = {option: alone(source) for option, source in start.sources.items() if option == "data.autoencoder"}
    return replace(start, arm=arm, sources=sources)


def output(module: Experiment, net: nn.Module, batch: int) -> Tensor:
    with torch.device("meta"):
        if isinstance(net, DiT):
            labels = torch.zeros(batch, dtype=torch.long)
            return net(torch.zeros(batch, net.channels, *net.input_size), labels, labels, torch.zeros(batch))
        vit = module.backbone(net)
        images = torch.zeros(batch, vit.channels, *vit.image_size)
        if isinstance(net, MaskedAutoencoder):
            latent, _, ids_restore = net.forward_encoder(images, torch.zeros(batch, net.tokens), module.mask_ratio)
            return net.forward_decoder(latent, ids_restore)
        if isinstance(net, SegmentTransformer):
            return net(images, torch.zeros(batch, *vit.image_size, dtype=torch.long))
        return net(images.byte() if isinstance(net, DictionaryTransformer) else images)


def counted(name: str, batch: int, training: bool) -> int:
    """Of a forward, and of its backward in `training`."""
    # The counter knows batched matrix products. A fused kernel it may pass over.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        out = output(*built(name), batch)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_forward_flops_equal_torchs_counter(name):
    module, net = built(name)
    cost = module.cost(net)
    assert counted(name, 2, training=False) == 2 * cost.forward_flops
    assert cost.training_flops == (1 if getattr(module, "probe", False) else 3) * cost.forward_flops


def unneeded(net: nn.Module) -> int:
    """FLOPs of an image's input gradients that no training computes: of what the net is given, nothing learns."""
    if isinstance(net, DictionaryTransformer):
        return 0  # its entries do
    if isinstance(net, DiT):
        return 2 * net.width * (net.tokens * net.channels * net.patch_size**2 + SINUSOIDS)
    vit = net.backbone if isinstance(net, DepthNet) else net
    pixels = 1 if isinstance(net, SegmentTransformer) else vit.patch_size**2
    return 2 * vit.width * vit.tokens * vit.channels * pixels


@pytest.mark.parametrize("name", KINDS)
def test_training_flops_are_torchs_and_the_input_gradients_besides(name):
    module, net = built(name)
    saved = unneeded(net)
    assert counted(name, 2, training=True) == 2 * (module.cost(net).training_flops - saved)
    assert saved < 0.01 * module.cost(net).training_flops


def test_training_flops_of_a_probe_leave_out_its_head_s_gradient():
    module, net = built("mae/cifar100_probe")
    head = 2 * net.width * net.classes
    assert counted("mae/cifar100_probe", 2, training=True) == 2 * (module.cost(net).training_flops + head)
    assert head < 0.0001 * module.cost(net).training_flops
