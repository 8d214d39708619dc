"""diffusers' DiT beside ours: of the same size, doing at least the same work on the same loss."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.benchmark import interleaving
from diffusion import peers
from diffusion.dit import DiT


def net() -> DiT:
    torch.manual_seed(0)
    return DiT(8, 2, 4, 10, width=32, depth=2, heads=2)


def test_their_model_has_our_blocks_and_at_least_our_work():
    ours, theirs = net(), peers.Diffusers(net())
    x, t, y, drops = torch.randn(2, 4, 8, 8), torch.arange(2), torch.arange(2), torch.rand(2)
    flops = []
    for model in (ours, theirs):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            assert model(x, t, y, drops).shape == (2, 8, 8, 8)
        flops.append(counter.get_total_flops())
    assert 1 <= flops[1] / flops[0] < 1.25  # each of their blocks embeds the timestep by itself
    shapes = [sorted(tuple(p.shape) for p in block.parameters()) for block in (
        ours.blocks[0], theirs.model.transformer_blocks[0])]
    assert not [shape for shape in shapes[0] if shape[0] == 4 * 32 and shape not in shapes[1]]


def test_both_learn_the_same_batch():
    for side in (net(), peers.Diffusers(net())):
        step = peers.Step(side, (4, 4, 8, 8), 10)
        step.optimizer.param_groups[0]["lr"] = 3e-3
        losses = [step().item() for _ in range(12)]
        assert losses[-1] < losses[0]


def test_row_of_the_peers(monkeypatch):
    monkeypatch.setattr(interleaving, "interleaved", lambda *_: {"ours": [0.1, 0.2], "theirs": [0.2, 0.2]})
    [row] = (dict(zip(peers.COLUMNS, row, strict=True)) for row in peers.measure(net(), 2, rounds=2))
    assert row["model"] == "/2, 2 x 32" and row["latents"] == "8x8x4" and row["batch"] == "2"
    assert (row["ours"], row["beside"]) == ("fp32", "diffusers, eager fp32")
    assert row["times as fast (quartiles)"] == "1.500 (1.250 to 1.750)"
    assert float(row["ours ms"]) == pytest.approx(150)


def test_as_on_a_gpu_ours_are_compiled_in_bf16_and_the_others_are_not(monkeypatch):
    """On the CPU, where compiling takes long and is left out."""
    compiled, seen = [], {}

    def raced(ours, theirs, rounds, device):
        for step in (ours, theirs):
            blocks = step.net.model.transformer_blocks if isinstance(step.net, peers.Diffusers) else step.net.blocks
            dtypes = seen.setdefault(step.net, set())
            [linear, *_] = (part for part in blocks[0].modules() if isinstance(part, torch.nn.Linear))
            linear.register_forward_hook(lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype))
            step()
        return 0.1, 0.2, interleaving.Spread(2.0, 2.0, 2.0)

    monkeypatch.setattr(peers, "compile_blocks", compiled.append)
    monkeypatch.setattr(peers, "raced", raced)
    ours = net()
    rows = [dict(zip(peers.COLUMNS, row, strict=True)) for row in peers.measure(ours, 2, rounds=1, fast=True)]
    assert [(row["ours"], row["beside"]) for row in rows] == [
        ("bf16, compiled", "diffusers, eager fp32"), ("bf16, compiled", "ours, eager fp32")]
    assert compiled == [ours] and seen.pop(ours) == {torch.bfloat16}
    assert [type(peer) for peer in seen] == [peers.Diffusers, DiT] and set.union(*seen.values()) == {torch.float32}
