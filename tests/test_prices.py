"""What an arm costs: by formula, without its data."""

import json

import pytest

from common.paper import cost
from common.paper.exhibits import Arm, Start, read_exhibits

EXHIBITS = read_exhibits()


def start_of(id: str, scale: str, arm: str) -> Start:
    return next(start for start in EXHIBITS[id].scale(scale).starts() if start.arm.name == arm)


def vit_flops(tokens: int, width: int, depth: int, inputs: int, classes: int) -> int:
    """By hand, of a forward with a class token."""
    n = tokens + 1
    block = 2 * n * width * (3 * width + width + 4 * width + 4 * width) + 2 * 2 * n * n * width
    return 2 * tokens * inputs * width + depth * block + 2 * width * classes


@pytest.mark.parametrize("id, scale, arm, epochs, images, batch, forward", [
    ("T3a", "paper", "T/1", 2400, 50_000, 1024, vit_flops(1024, 192, 12, 3, 100)),
    ("T3b", "paper", "B/2", 300, 1_281_167, 4096, vit_flops(196, 768, 12, 12, 1000)),
    ("T3c", "paper", "S/1", 2400, 1020, 1020, vit_flops(1024, 384, 12, 3, 102)),  # a batch is no more than there is
    ("F2b", "demo", "/4", 20, 2000, 128, vit_flops(16, 48, 4, 48, 8)),
])
def test_a_price_is_that_of_the_formula(id, scale, arm, epochs, images, batch, forward):
    price = cost.computed(start_of(id, scale, arm))
    assert price.images == epochs * (images // batch) * batch
    assert price.training_flops == 3 * forward and price.test_flops == 0
    assert price.flops == 3 * forward * price.images


def test_a_run_that_goes_on_costs_what_is_added():
    whole, further = (cost.price(start_of("T6", "paper", arm)) for arm in ("L/1 at 400", "L/1"))
    assert further.images / whole.images == pytest.approx((1400 - 400) / 400)
    assert further.test_flops > 0 and whole.test_flops == 0
    # 50,000 samples of 250 steps, each with and without its class; a training step is three forwards.
    assert further.test_flops == 50_000 * 250 * 2 * further.training_flops // 3


@pytest.mark.parametrize("id", [id for id, exhibit in EXHIBITS.items() if "gpu" in exhibit.scales])
def test_the_gpu_scale_of_an_exhibit_takes_half_an_hour_at_half_of_the_peak(id):
    flops = sum(cost.price(start).flops for start in EXHIBITS[id].scale("gpu").starts())
    assert flops / (0.5 * cost.H200) <= 30 * 60


def test_latents_are_those_of_the_autoencoder_s_arm():
    """8x8x1 latents of 16x16 images; the paper's, whose autoencoder is a file that is not here, are 32x32x4."""
    small, large = (cost._built(start_of("T5", *which))[2] for which in [("demo", "nano/1"), ("paper", "L/1")])
    assert (small.tokens, small.channels) == (64, 1)
    assert (large.tokens, large.channels) == (1024, 4)


def test_stored_prices_are_those_of_today():
    """One arm of each id and scale; the others are computed alike, by the same command."""
    stored = json.loads(cost.FILE.read_text())
    starts = {cost._key(start): start for exhibit in EXHIBITS.values() for scale in exhibit.scales.values()
              for start in scale.starts(1)}
    assert stored.keys() == starts.keys(), "python -m common.paper.cost computes them anew"
    for number, (key, start) in enumerate(starts.items()):
        assert stored[key]["config"] == cost._digest(start), f"{key}: python -m common.paper.cost computes them anew"
        if number % 12 == 0:
            assert stored[key]["price"] == cost.computed(start)._asdict()


def test_a_changed_config_is_priced_anew(monkeypatch):
    start = start_of("T3a", "demo", "nano/1")
    stored = {cost._key(start): {"config": "older", "price": cost.Price(1, 1, 1, 1, 1)._asdict()}}
    monkeypatch.setattr(cost, "_stored", lambda: stored)
    fresh = cost.Price(2, 2, 2, 2, 2)
    monkeypatch.setattr(cost, "computed", lambda _: fresh)
    assert cost.price(start) == fresh
    stored[cost._key(start)]["config"] = cost._digest(start)
    assert cost.price(start) == cost.Price(1, 1, 1, 1, 1)


def test_a_price_depends_on_what_its_config_starts_from(tmp_path):
    (tmp_path / "base.yaml").write_text("a: 1")
    (tmp_path / "arm.yaml").write_text("extends: base.yaml\nb: 2")
    start = Start(Arm("x", "supervised", tmp_path / "arm.yaml", {}, {}), 0, {})
    before = cost._digest(start)
    (tmp_path / "base.yaml").write_text("a: 2")
    assert cost._digest(start) != before


@pytest.mark.parametrize("flops, scale, text", [
    (3.6e12, "demo", "1 min"), (60 * 60e9 * 120, "demo", "120 min"), (1e9, "demo", "0.1 min"),
    (790e12 * 3600, "gpu", "1 H200 h"),
    (790e12 * 3600 * 1234, "paper", "1,234 H200 h"),
])
def test_durations(flops, scale, text):
    assert cost.duration(flops, scale) == text
