"""Outputs and gradients of the attention kernels that may run, against torch's plain one in double precision."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common.benchmark.memory import kept_bytes
from common.model import blocked_attention
from common.model.blocked_attention import LARGEST, BlockedAttention, attend
from common.model.transformer import Attention, Block

# All sequences of the configs, and those beside them: fused kernels work in tiles of powers of two.
LENGTHS = [64, 65, 196, 197, 225, 256, 257, 784, 785, 1024, 1025, 3072, 3073, 4096, 4097]
MASKED = 225  # the class token and the slots of segments, some of which are empty
HEAD = 64  # channels of a head, of Tiny to Large
# Nano's, two decoders', and DiT-XL's, at one length: (tokens, channels of a head).
SHAPES = [*((tokens, HEAD) for tokens in LENGTHS), (257, 16), (257, 32), (257, 72)]
SEVERAL = 2  # images, and heads

# Errors of a whole tensor, relative to its norm, and of the worst token, relative to the mean norm of one. Three times
# the largest of torch's kernels on a CPU over all shapes and four seeds: 8.3e-7 and 8.0e-6 in fp32, 8.1e-3 and 4.9e-2
# in bf16, whose steps are 3.9e-3; attention in blocks has 9.9e-3 and 5.1e-2. A token that a kernel forgets, of 3073 and
# 4097, is off by 0.2 to 0.6 of its norm.
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


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tells the suite whether this CPU multiplies in bf16, and whether in tiles."""

    def tell(bf16: bool, tiles: bool = False) -> None:
        monkeypatch.setattr(blocked_attention, "has_avx512_bf16", lambda: bf16)
        monkeypatch.setattr(blocked_attention, "has_matrix_unit", lambda: tiles)

    return tell


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("tokens, head", SHAPES)
def test_the_fused_kernel_of_a_cpu(tokens, head, precision, processor):
    processor(bf16=False)
    whole, token = errors(tokens, head, SDPBackend.FLASH_ATTENTION, precision, "cpu")
    assert whole < BOUNDS[precision][0] and token < BOUNDS[precision][1]


@pytest.mark.parametrize("tokens, head", [shape for shape in SHAPES if shape[0] ** 2 <= LARGEST and shape[0] != MASKED])
@pytest.mark.parametrize("tiles", [False, True])
def test_attention_in_blocks(tokens, head, tiles, processor, monkeypatch):
    processor(bf16=True, tiles=tiles)
    reference(tokens, head, "cpu")
    called, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: called.append(1) or fused(*given))
    whole, token = errors(tokens, head, SDPBackend.FLASH_ATTENTION, "bf16-mixed", "cpu")
    assert len(called) == tiles  # the forward is torch's where there are tiles, and there alone
    assert whole < BOUNDS["bf16-mixed"][0] and token < BOUNDS["bf16-mixed"][1]


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("held", [1, 2 * 5 * 7, 5 * 5 * 7, 1000])
def test_blocks_of_any_size_are_plain_attention(held, tiles, processor, monkeypatch):
    """Of one head, of two or five of the six, so that the last block is another, and of all; in double precision."""
    processor(bf16=True, tiles=tiles)
    monkeypatch.setattr(blocked_attention, "HELD", held)
    generator = torch.Generator().manual_seed(held)
    q, k, v = (torch.randn(2, tokens, 3, 4, generator=generator).double().transpose(1, 2).requires_grad_()
               for tokens in (5, 7, 7))  # fmt: skip
    gradient = torch.randn(2, 5, 3, 4, generator=generator).double().transpose(1, 2)
    found = BlockedAttention.apply(q, k, v)
    expected = (q @ k.mT / 2).softmax(dim=-1) @ v
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for ours, plain in zip(*(torch.autograd.grad(out, (q, k, v), gradient) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("spread, common, bound", [(4, 0, 0.025), (8, 0, 0.05), (16, 0, 0.1), (1, 20, 0.02),
                                                   (1, 80, 0.03)])  # fmt: skip
@pytest.mark.parametrize("tiles", [False, True])
def test_what_rounding_takes_from_the_logits_of_blocks(spread, common, bound, tiles, processor):
    """They deviate by `spread`, and those of a query have `common` in common, which a softmax does not feel.

    The bounds are twice what was measured; with what they have in common the last one's errors are 0.085 to 0.101.
    """
    processor(bf16=True, tiles=tiles)
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = torch.randn(4, 2, 3, 256, HEAD, generator=generator)
    along = torch.full((HEAD,), (common * HEAD**-0.5) ** 0.5)  # its square, scaled, is `common`
    q, k = ((spread**0.5 * x + along).bfloat16() for x in (q, k))
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = BlockedAttention.apply(*inputs), F.scaled_dot_product_attention(*exact)
    pairs = [(found, expected), *zip(torch.autograd.grad(found, inputs, gradient.bfloat16()),
                                     torch.autograd.grad(expected, exact, gradient.bfloat16().double()), strict=True)]
    assert max(((ours - plain).norm() / plain.norm()).item() for ours, plain in pairs) < bound


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tiles", [False, True])
def test_a_block_s_gradients_are_those_of_torch_s(qk_norm, kept, tiles, processor):
    """Of the normalised queries and keys, which are in fp32, and where a block is computed anew for its backward."""

    def gradients(bf16: bool) -> list[Tensor]:
        processor(bf16, tiles)
        torch.manual_seed(0)
        block, x = Block(2 * HEAD, 2, qk_norm), torch.randn(3, 65, 2 * HEAD, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x) if kept else checkpoint(block, x, use_reentrant=False)
        names = ("qkv.weight", "proj.weight") if not qk_norm else ("qkv.weight", "q_norm.weight", "k_norm.weight")
        return list(torch.autograd.grad(out.square().sum(), [x, *map(block.attn.get_parameter, names)]))

    errors = [((ours - plain).norm() / plain.norm()).item()
              for ours, plain in zip(gradients(True), gradients(False), strict=True)]  # fmt: skip
    assert errors[0] > 0 and max(errors) < 2.4e-2
    assert tiles or min(errors) > 0  # with tiles the output is torch's, and with it proj's gradient


def test_blocks_are_differentiated_once():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    [gradient] = torch.autograd.grad(BlockedAttention.apply(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("tiles", [False, True])
def test_blocks_keep_nothing_but_their_inputs(tiles, processor):
    processor(bf16=True, tiles=tiles)
    q, k, v = (torch.randn(2, 3, 64, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(lambda: BlockedAttention.apply(q, k, v), []) == 3 * 2 * 3 * 64 * 8 * 2


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("precision, dtype, bf16, masked, tokens, blocks", [
    ("bf16-mixed", torch.float32, True, False, 64, True),
    ("bf16-mixed", torch.float32, True, False, 1448, True),
    ("bf16-mixed", torch.float32, True, False, 1449, False),
    ("bf16-mixed", torch.float32, True, True, 64, False),
    ("bf16-mixed", torch.float32, False, False, 64, False),
    ("32-true", torch.float32, True, False, 64, False),
    ("32-true", torch.bfloat16, True, False, 64, True),
    ("64-true", torch.float64, True, False, 64, False),
])  # fmt: skip
def test_blocks_where_they_are_the_faster(precision, dtype, bf16, masked, tokens, blocks, tiles, processor):
    processor(bf16, tiles)
    x = torch.randn(1, 1, tokens, 8, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        out = attend(x, x, x, mask)
    assert ("Blocked" in out.grad_fn.name()) == blocks
    assert out.dtype == (torch.bfloat16 if precision == "bf16-mixed" else dtype)
    out.sum().backward()
    assert x.grad.dtype == dtype


def test_a_compiled_block_has_torch_s(processor):
    processor(bf16=True)
    q = torch.randn(1, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        graph = torch.export.export(Attending(), (q, q, q)).graph
    assert any("scaled_dot_product" in str(node.target) for node in graph.nodes)


class Attending(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens, head", SHAPES)
def test_the_fused_kernels_of_a_gpu(tokens, head):
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            found[backend.name] = errors(tokens, head, backend, "bf16-mixed", "cuda")
        except RuntimeError as error:  # a build of torch may lack one of the others
            if "No available kernel" not in str(error):
                raise
    assert tokens == MASKED and found or "FLASH_ATTENTION" in found  # takes no mask
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
def test_a_wrong_kernel_exceeds_the_bounds(tokens: int, wrong: Callable[..., Tensor], monkeypatch, processor):
    processor(bf16=False)
    reference(tokens, HEAD, "cpu")
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    whole, token = errors(tokens, HEAD, SDPBackend.FLASH_ATTENTION, "bf16-mixed", "cpu")
    assert whole > 2 * BOUNDS["bf16-mixed"][0] or token > 2 * BOUNDS["bf16-mixed"][1]
