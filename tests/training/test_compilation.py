"""Compiled blocks: the same function under the same names, and one form for all blocks of a row."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from common.model import VisionTransformer
from common.training.compilation import compile_blocks
from common.training.ema import EMA
from diffusion.dit import DiT
from mae.model import MaskedAutoencoder

NET = {"image_size": 4, "patch_size": 1, "size": "nano", "width": 16, "heads": 2}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def vit() -> tuple[VisionTransformer, tuple]:
    net = VisionTransformer(**NET, classes=10, depth=12, drop_path=0.3, checkpoint_blocks=2)
    return net, (torch.randn(5, 3, 4, 4), torch.rand(5, 24))


def mae() -> tuple[MaskedAutoencoder, tuple]:
    net = MaskedAutoencoder(**NET, depth=6, decoder_width=32, decoder_depth=4, decoder_heads=4)
    return net, (torch.randn(5, 3, 4, 4), torch.rand(5, 16))


def dit() -> tuple[DiT, tuple]:
    net = DiT(4, 1, 3, 10, width=16, depth=6, heads=2)
    with torch.no_grad():  # adaLN-Zero is the identity at first
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net, (torch.randn(5, 3, 4, 4), torch.arange(5), torch.arange(5), torch.rand(5))


def result(net, inputs) -> torch.Tensor:
    found = net(*inputs)
    return found[1] if isinstance(found, tuple) else found


@pytest.mark.parametrize("of, forms", [(vit, 2), (mae, 2), (dit, 1)])
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_blocks_compute_the_same_in_as_many_forms_as_there_are_kinds_of_rows(of, forms, bf16, monkeypatch):
    """A net of 12 blocks with as many drop-path rates has two forms: with dropped paths, and without."""
    # Torch's attention on both sides: what is compiled has no other, and another rounds otherwise.
    monkeypatch.setattr("common.model.blocked_attention.has_avx512_bf16", lambda: False)
    torch.manual_seed(0)
    net, inputs = of()
    plain = copy.deepcopy(net.train())
    compile_blocks(net, backend="aot_eager")
    for each in (net, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            result(each, inputs).float().square().sum().backward()
    assert counters["stats"]["unique_graphs"] == forms and not counters["graph_break"]
    assert list(net.state_dict()) == list(plain.state_dict())
    for (name, ours), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        error = (ours.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-6)
        assert error < (0.03 if bf16 else 1e-5), name


def test_an_average_is_compiled_where_the_net_is(train):
    for compiled in (False, True):
        module = train(EMA(0.9)).lightning_module
        module.compiled = compiled
        average = EMA(0.9)
        average.on_train_start(module.trainer, module)
        average.last_step = -1
        average.on_train_batch_end(module.trainer, module)
        assert all((block._compiled_call_impl is not None) == compiled for block in average.net.blocks)


@pytest.mark.parametrize("option, times", [([], 0), (["--compile", "false"], 0), (["--compile", "true"], 1)])
def test_compiling_is_asked_for_on_a_cpu(option, times, command, monkeypatch):
    calls = []
    monkeypatch.setattr("common.training.module.compile_blocks", lambda net: calls.append(net))
    assert command("fit", *option, "--trainer.max_epochs", "1").code == 0
    assert len(calls) == times
