"""FLOPs and memory of a DiT against torch's own counter, measured activations and published numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.benchmark.memory import kept_bytes
from diffusion import DiT
from diffusion.cost import activation_bytes, conditioning_flops, forward_flops


@pytest.mark.parametrize("options", [
    {"input_size": 8, "patch_size": 1, "classes": 10, "size": "nano"},
    {"input_size": (4, 6), "patch_size": 2, "classes": 0, "size": "tiny", "position": "sincos", "qk_norm": True},
    {"input_size": 8, "patch_size": 4, "channels": 3, "size": "nano", "depth": 1, "learn_variance": False},
])  # fmt: skip
def test_forward_flops_equal_torchs_counter(options):
    net = DiT(**options).eval()
    x, y = torch.randn(3, net.channels, *net.input_size), torch.zeros(3, dtype=torch.long) if net.classes else None
    # The counter knows batched matrix products; the fused CPU kernel it would pass over.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x, torch.arange(3), y)
        with FlopCounterMode(display=False) as conditioning:
            condition = net.t_embedder(torch.arange(3))
            for layer in (*net.blocks, net.final_layer):
                layer.adaLN_modulation(condition)
    assert counter.get_total_flops() == 3 * forward_flops(net)
    assert conditioning.get_total_flops() == 3 * conditioning_flops(net)


@pytest.mark.parametrize("patch_size, gigaflops", [(1, 721.9), (2, 161.4)])
def test_cost_of_the_large_model(patch_size, gigaflops):
    """By 24 N d^2 + 4 N^2 d + 12 d^2 of each block and 2 N d (p + 2 p) of the patches, p = 4 P^2 values.

    This leaves out the timestep's MLP and the last modulation, 6.8 MFLOP. Peebles and Xie count 80.71 G multiply-adds
    of DiT-L/2.
    """
    with torch.device("meta"):
        net = DiT(32, patch_size, size="large")
    n, d, p = net.tokens, 1024, 4 * patch_size**2
    formula = 24 * (24 * n * d**2 + 4 * n**2 * d + 12 * d**2) + 2 * n * d * (p + 2 * p)
    assert forward_flops(net) - formula == 2 * (256 * d + d**2) + 4 * d**2 == 6_815_744
    assert round(forward_flops(net) / 1e9, 1) == gigaflops
    if patch_size == 2:
        assert forward_flops(net) / 2e9 == pytest.approx(80.71, abs=0.02)


def kept_of_a_forward(net: DiT, batch: int, precision: str) -> int:
    net = net.bfloat16() if precision == "bf16-true" else net
    x, t, y = torch.randn(batch, 4, *net.input_size), torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return kept_bytes(lambda: net(x, t, y, torch.ones(batch)), net.parameters())


def kept_bytes_of_an_image(net: DiT, precision: str) -> float:
    """Of one image more: what autograd keeps of the weights under autocast is no image's."""
    return (kept_of_a_forward(net, 6, precision) - kept_of_a_forward(net, 2, precision)) / 4


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activation_bytes_equal_what_autograd_keeps(precision, qk_norm):
    options = {"input_size": 12, "patch_size": 1, "width": 128, "heads": 2, "qk_norm": qk_norm}
    # The difference of two depths leaves the blocks alone, without embeddings and the final layer.
    shallow, deep = DiT(depth=1, **options), DiT(depth=3, **options)
    measured = kept_bytes_of_an_image(deep, precision) - kept_bytes_of_an_image(shallow, precision)
    formula = activation_bytes(deep, precision) - activation_bytes(shallow, precision)
    assert formula == pytest.approx(measured, rel=0.02)


def test_activation_bytes_by_hand():
    """Of DiT-L/1's blocks: 20 vectors of every token; 4 in fp32 and 16 in bf16; all in bf16; inputs alone."""
    vector = 1024 * 1024

    def of(precision, **options):
        with torch.device("meta"):
            return activation_bytes(DiT(32, 1, size="large", **options), precision)

    assert of("32-true") == 24 * 20 * vector * 4
    assert of("bf16-mixed") == 24 * (4 * 4 + 16 * 2) * vector
    assert of("bf16-true") == 24 * 20 * vector * 2
    assert of("bf16-mixed", checkpoint_blocks=10) == (14 * 48 + 10 * 4) * vector
    assert of("bf16-mixed", checkpoint_blocks=24) == (48 + 24 * 4) * vector
