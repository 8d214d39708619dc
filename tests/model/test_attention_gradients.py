"""Outputs and gradients of the attention kernels that torch may choose, against its plain one in double precision."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.model.transformer import Attention

# All sequences of the configs, and those beside them: fused kernels work in tiles of powers of two.
LENGTHS = [64, 65, 196, 197, 225, 256, 257, 784, 785, 1024, 1025, 3072, 3073, 4096, 4097]
MASKED = 225  # the class token and the slots of segments, some of which are empty
HEAD = 64  # channels of a head, of Tiny to Large
# Nano's, two decoders', and DiT-XL's, at one length: (tokens, channels of a head).
SHAPES = [*((tokens, HEAD) for tokens in LENGTHS), (257, 16), (257, 32), (257, 72)]
SEVERAL = 2  # images, and heads

# Errors of a whole tensor, relative to its norm, and of the worst token, relative to the mean norm of one. Three times
# the largest measured on a CPU over all shapes and four seeds: 8.3e-7 and 8.0e-6 in fp32, 8.1e-3 and 4.9e-2 in bf16,
# whose steps are 3.9e-3. A token that a kernel forgets, of 3073 and 4097, is off by 0.2 to 0.6 of its norm.
BOUNDS = {"32-true": (2.5e-6, 2.4e-5), "bf16-mixed": (2.4e-2, 1.5e-1)}


def attended(tokens: int, head: int, backend: SDPBackend, precision: str, device: str) -> dict[str, Tensor]:
    """The output, and the gradients of input and weights for a random one of the output."""
    torch.manual_seed(tokens)
    width = SEVERAL * head
    attention = Attention(width, SEVERAL)
    x, gradient = 2 * torch.randn(SEVERAL, tokens, width), torch.randn(SEVERAL, tokens, width)
    mask = None
    if tokens == MASKED:
        mask = torch.ones(SEVERAL, tokens, dtype=torch.bool, device=device)
        mask[0, 201:] = mask[1, ::3] = False
    dtype = torch.float64 if precision == "64-true" else torch.float32
    attention, x = attention.to(device, dtype), x.to(device, dtype).requires_grad_()
    # What this backend cannot do is an error: torch falls back on no other.
    with sdpa_kernel(backend), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
        out = attention(x, mask)
    out.backward(gradient.to(out))
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


@cache
def reference(tokens: int, head: int, device: str) -> dict[str, Tensor]:
    return attended(tokens, head, SDPBackend.MATH, "64-true", device)


def errors(tokens: int, head: int, backend: SDPBackend, precision: str, device: str) -> tuple[float, float]:
    """The largest of whole tensors, and of single tokens; not finite where a value is not."""
    whole, token = [], []
    truth = reference(tokens, head, device)
    for name, values in attended(tokens, head, backend, precision, device).items():
        off = values.double() - truth[name]
        whole.append(off.norm() / truth[name].norm())
        if name in ("out", "x"):
            token.append(off.norm(dim=-1).max() / truth[name].norm(dim=-1).mean())
    return torch.stack(whole).max().item(), torch.stack(token).max().item()


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("tokens, head", SHAPES)
def test_the_fused_kernel_of_a_cpu(tokens, head, precision):
    whole, token = errors(tokens, head, SDPBackend.FLASH_ATTENTION, precision, "cpu")
    assert whole < BOUNDS[precision][0] and token < BOUNDS[precision][1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens, head", SHAPES)
def test_the_fused_kernels_of_a_gpu(tokens, head):
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            found[backend.name] = errors(tokens, head, backend, "bf16-mixed", "cuda")
        except RuntimeError as error:  # flash takes no mask, and a build of torch may lack one
            if "No available kernel" not in str(error):
                raise
    assert found, "no fused kernel"
    for name, (whole, token) in found.items():
        assert whole < BOUNDS["bf16-mixed"][0] and token < BOUNDS["bf16-mixed"][1], name


SOUND = F.scaled_dot_product_attention


def without_the_last_key(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    return SOUND(q, k[:, :, :-1], v[:, :, :-1])


def without_the_last_value_s_gradient(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    return SOUND(q, k, torch.cat([v[:, :, :-1], v[:, :, -1:].detach()], dim=2))


def with_swapped_heads(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    return SOUND(q, k, v.flip(1))


def without_the_mask(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    return SOUND(q, k, v)


def with_another_scale(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    return SOUND(q, k, v, scale=0.9 * q.shape[-1] ** -0.5)


@pytest.mark.parametrize("tokens, wrong", [
    (3073, without_the_last_key), (3073, without_the_last_value_s_gradient), (4097, with_another_scale),
    (4097, with_swapped_heads), (MASKED, without_the_mask),
])  # fmt: skip
def test_a_wrong_kernel_exceeds_the_bounds(tokens: int, wrong: Callable[..., Tensor], monkeypatch):
    reference(tokens, HEAD, "cpu")
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    whole, token = errors(tokens, HEAD, SDPBackend.FLASH_ATTENTION, "bf16-mixed", "cpu")
    assert whole > 2 * BOUNDS["bf16-mixed"][0] or token > 2 * BOUNDS["bf16-mixed"][1]
