"""That both sides run at their mask ratio, and that the tables hold what their columns say. Nothing here is timed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from timm.models.vision_transformer import Block as TimmBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mae.step
from common.benchmark import interleaving
from common.benchmark.memory import kept_bytes
from common.errors import InputError
from common.training.optim import Recipe
from mae import benchmark, peers
from mae.benchmark import MEMORY_COLUMNS, TIME_COLUMNS, main, measure
from mae.cost import activation_bytes
from mae.model import MaskedAutoencoder
from mae.step import MASKED, WHOLE, Decoder, Step


def small(image: int = 4, width: int = 8, depth: int = 1, decoder_depth: int = 1) -> MaskedAutoencoder:
    return MaskedAutoencoder(image, 1, 3, width=width, depth=depth, heads=2, decoder_width=16,
                             decoder_depth=decoder_depth, decoder_heads=2)  # fmt: skip


def counted(step: Callable[[], float]) -> Callable[[], float]:
    """FLOPs of a step by torch's counter, where the benchmark would take its seconds."""

    def flops() -> float:
        # The counter knows batched matrix products; the fused CPU kernel it would pass over.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        return float(counter.get_total_flops())

    return flops


def test_both_sides_run_at_their_mask_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "timed", counted)
    times, _ = measure(small(), batch=2, rounds=1)
    row = dict(zip(TIME_COLUMNS, times, strict=True))
    # By hand: 16 pixels, 4 of them visible; a block is 24 N D^2 + 4 N^2 D.
    decoder = 122_944 + 2 * 16 * 16 * 3  # a block of N = 17, D = 16, and the prediction
    masked = 2 * 16 * 3 * 8 + 8_480 + 2 * 5 * 8 * 16 + decoder  # embedding, a block of N = 5, D = 8, decoder_embed
    whole = 2 * 16 * 3 * 8 + 35_360 + 2 * 17 * 8 * 16 + decoder
    # Two images; the backward is two forwards, but pixels get no gradient.
    assert row["ms at 0.75"] == f"{1000 * 2 * (3 * masked - 2 * 16 * 3 * 8)}"
    assert row["ms at 0"] == f"{1000 * 2 * (3 * whole - 2 * 16 * 3 * 8)}"
    assert row["ratio of FLOPs"] == f"{masked / whole:.3f}" == "0.818"
    assert row["measured ratio (quartiles)"].startswith("0.818 ") and row["apart"] == "-0.0 %"


def test_row_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"masked": [1.0, 3.0, 4.0], "whole": [2.0, 4.0, 8.0]}
    monkeypatch.setattr(benchmark, "interleaved", lambda sides, rounds: {side: seconds[side] for side in sides})
    times, _ = measure(small(), batch=1, rounds=3)
    # Pairs 1/2, 3/4, 1/2; the ratio of the medians would be 3/4. By formula 135,008 / 164,960.
    assert times == ("16 x 1 x 2", "3000", "4000", "0.500 (0.500 to 0.625)", "0.818", "-38.9 %")


@pytest.mark.parametrize("mask_ratio", [MASKED, WHOLE])
def test_a_step_moves_every_parameter_that_has_a_gradient(mask_ratio: float) -> None:
    net = small()
    step = Step(net, batch=2)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    losses = [step(mask_ratio).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    still = {name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])}
    # Nothing is masked at ratio 0, and AdamW leaves alone what has no gradient and no decay.
    assert still == (set() if mask_ratio else {"mask_token"})


def test_gradients_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mae.step, "RECIPE", Recipe(lr=0.0))  # the weights stay, and so must the gradients
    net = small()
    step = Step(net, batch=2)
    step(MASKED)
    once = net.mask_token.grad.clone()
    step(MASKED)
    assert once.any() and torch.equal(net.mask_token.grad, once)


def test_the_loss_is_over_all_tokens() -> None:
    net = small()
    step = Step(net, batch=2)
    _, prediction, _ = net(step.images, step.noise, MASKED)
    pixels = step.images.permute(0, 2, 3, 1).reshape(2, 16, 3)
    torch.testing.assert_close(step.loss(MASKED), F.mse_loss(prediction, pixels))


def test_kept_bytes_count_a_storage_once_and_no_weights() -> None:
    linear = torch.nn.Linear(4, 8)
    x = torch.randn(2, 4, requires_grad=True)
    # x and the weight for the product, 2 x 8 before and after GELU, the square of the latter; in fp32.
    kept = kept_bytes(lambda: F.gelu(linear(x)).square().sum(), linear.parameters())
    assert kept == 4 * (2 * 4 + 2 * 8 + 2 * 8)
    assert kept_bytes(lambda: (x * x).sum(), ()) == 4 * 2 * 4


@pytest.mark.parametrize("mask_ratio", [MASKED, WHOLE])
@pytest.mark.parametrize("half", ["depth", "decoder_depth"])
def test_blocks_keep_what_the_formula_says(half: str, mask_ratio: float) -> None:
    # The difference of two depths leaves the blocks of one half alone.
    nets = [small(image=8, width=64, **{half: depth}) for depth in (3, 1)]
    deep, shallow = (kept_bytes(partial(Step(net, 4).loss, mask_ratio), net.parameters()) for net in nets)
    formula = activation_bytes(nets[0], mask_ratio) - activation_bytes(nets[1], mask_ratio)
    assert (deep - shallow) / 4 == pytest.approx(formula, rel=0.05)


def test_row_of_the_memory() -> None:
    net = small(image=16, width=64)
    _, memory = measure(net, batch=2, rounds=1)
    row = dict(zip(MEMORY_COLUMNS, memory, strict=True))
    kept = [kept_bytes(partial(Step(net, 1).loss, ratio), net.parameters()) for ratio in (0.75, 0.0)]
    assert [row["MB at 0.75"], row["MB at 0"]] == [f"{count / 1e6:.1f}" for count in kept]
    assert row["ratio"] == f"{kept[0] / kept[1]:.3f}" and kept[0] < kept[1]
    # By hand: 16 fp32 vectors a token; 65 or 257 tokens of 64 numbers, and 257 of 16.
    masked, whole = (64 * (tokens * 64 + 257 * 16) for tokens in (65, 257))
    assert [row["blocks at 0.75"], row["blocks at 0"]] == [f"{count / 1e6:.1f}" for count in (masked, whole)]
    assert row["ratio of blocks"] == f"{masked / whole:.3f}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_command_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(benchmark, "DECODERS", (Decoder(16, 1, 2), Decoder(32, 2, 4)))
    demo = peers.cases()[:2]
    monkeypatch.setattr(peers, "cases", lambda device: [case._replace(batch=3) for case in demo])
    threads = torch.get_num_threads()
    arguments = ["--size", "nano", "--patch_size", "2", "--image", "8", "--batch", "1", "--rounds", "1"]
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert f"`python -m mae.benchmark {' '.join(arguments)}`" in output and "medians over 1 rounds" in output
    assert "nano/2 at 8x8, batch 1, fp32" in output
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert rows[0] == list(TIME_COLUMNS) and rows[4] == list(MEMORY_COLUMNS) and rows[8] == list(peers.COLUMNS)
    assert len(rows) == 8 + 4
    # The peers' cases are their own, whatever the options of masking are.
    assert [row[:4] for row in rows[10:]] == [[f"/{patch}, 4 x 48", "2 x 48", "8x8x1", "3"] for patch in (1, 2)]
    assert [row[0] for row in rows[2:4]] == [row[0] for row in rows[6:8]] == ["16 x 1 x 2", "32 x 2 x 4"]


def test_the_decoders_are_those_of_the_acceptance() -> None:
    assert benchmark.DECODERS == ((192, 8, 3), (256, 8, 8), (512, 8, 16))


@pytest.mark.parametrize("arguments, message", [
    (["--rounds", "0"], "--rounds 0: give a whole number, 1 or more"),
    (["--batch", "-1"], "--batch -1: give a whole number"),
    (["--size", "huge"], "model.size='huge' is not known"),
    (["--patch_size", "3"], "model.patch_size=3 does not divide image_size=32x32"),
])  # fmt: skip
def test_values_that_make_no_sense(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments)


def test_the_peer_is_the_same_function_with_timm_s_blocks() -> None:
    net = small(image=8, width=32)
    steps = Step(net, 3), Step(peers.through_timm(net), 3)
    assert isinstance(steps[1].net.blocks[0], TimmBlock) and isinstance(steps[1].net.decoder_blocks[0], TimmBlock)
    for _ in range(3):  # and takes the same steps
        ours, theirs = (step(MASKED).item() for step in steps)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_cases_are_the_demo_s_and_cifar_s() -> None:
    assert [(f"{case.size}/{case.patch_size}", case.side, case.channels, case.batch) for case in peers.cases()] == [
        ("nano/1", 8, 1, 128), ("nano/2", 8, 1, 128), ("tiny/1", 32, 3, 2), ("tiny/2", 32, 3, 8)]
    config = yaml.safe_load((Path(benchmark.__file__).parent / "configs" / "digits.yaml").read_text())
    demo = config["model"]["init_args"]
    decoder = Decoder(*(demo[f"decoder_{name}"] for name in Decoder._fields))
    assert [case.decoder for case in peers.cases()] == [decoder] * 2 + [(192, 4, 3)] * 2
    net = peers.cases()[1].net()
    assert (net.image_size, net.channels, net.tokens, net.decoder_width) == ((8, 8), 1, 16, 48)
    assert peers.cases(torch.device("cuda")) == [("tiny", 1, 32, 3, (192, 4, 3), 256)]


def test_row_of_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaving, "interleaved", lambda *_: {"ours": [0.1, 0.2], "theirs": [0.2, 0.2]})
    row = dict(zip(peers.COLUMNS, peers.measure(small(image=8, width=32), 2, rounds=2), strict=True))
    assert row["image"] == "8x8x3" and row["ours ms"] == "150.0"
    assert row["times as fast (quartiles)"] == "1.500 (1.250 to 1.750)"


def test_as_on_a_gpu_both_are_compiled_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by a compiler that compiles nothing."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block, backend="", **options: compile(block, backend="eager", **options))
    ours, theirs = peers.sides(small(image=8, width=32), fast=True)
    losses, seen = [], []
    for net in (ours, theirs):
        assert all(block._compiled_call_impl for block in (*net.blocks, *net.decoder_blocks))
        net.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        losses.append(Step(net, 2, bf16=True)(MASKED).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and set(seen) == {torch.bfloat16}
