"""The tables and figures of the paper as they ship."""

import os
import shlex
from pathlib import Path

import pytest
from forked import ROOT

from common.paper.cost import price
from common.paper.exhibits import read_exhibits
from common.paper.listing import show

GENERATED_IDS = ("T1", "T2")
IDS = ("T3a", "T3b", "T3c", "T3d", "F2a", "F2b", "F9", "F6", "F7", "F8", "App-D")
MAE_IDS = ("T4a", "T4b")
DIFFUSION_IDS = ("T5", "T6", "F3")
LOCALITY_IDS = ("F4", "F5-left", "F5-right", "PE", "T7", "T8", "T9", "scope", "shuffle")


def test_generated_tables():
    exhibits = read_exhibits()
    assert {name: exhibits[name].scale("demo").prints for name in GENERATED_IDS} == {
        "T1": ("common.paper.tables", "designs"), "T2": ("common.paper.tables", "sizes")}
    assert not any(exhibits[name].scale(scale).arms for name in GENERATED_IDS for scale in ("demo", "paper"))
    assert "  python -m common.paper.tables sizes" in show(exhibits["T2"], exhibits["T2"].scales)


def test_supervised_exhibits():
    exhibits = read_exhibits()
    assert set(IDS) <= set(exhibits)
    for name in (*GENERATED_IDS, *IDS):
        assert set(exhibits[name].scales) == {"demo", "gpu", "paper"}
    for name in IDS:
        assert exhibits[name].unknown  # no absolute value of these is known in full
    tokens = {arm.name: (arm.overrides["data.image_size"] // arm.overrides["model.patch_size"]) ** 2
              for arm in exhibits["F2a"].scale("paper").arms}
    assert tokens == dict.fromkeys(["224/16", "112/8", "56/4", "28/2", "14/1"], 196)
    assert [arm.overrides["model.patch_size"] for arm in exhibits["F2b"].scale("paper").arms] == [16, 8, 4, 2, 1]
    assert [arm.overrides["model.optim.lr"] for arm in exhibits["F9"].scale("paper").arms] == [8e-3, 4e-3]
    shown = list(show(exhibits["F2a"], {"paper": exhibits["F2a"].scale("paper")}))
    assert any(line.startswith("  which extends: supervised/configs/imagenet28.yaml") for line in shown)
    assert exhibits["T3a"].differences == {"T/1 - T/2": 1.5, "S/1 - T/1": 1.3}
    assert exhibits["App-D"].values == {"B/1": 57.2, "B/2": 56.7} and exhibits["App-D"].metric == "shape_bias"
    of_t3a = {start.shown("fit") for start in exhibits["T3a"].scale("gpu").starts()}
    for name in ("F6", "F7", "F8"):
        assert all(start.shown("fit") in of_t3a for start in exhibits[name].scale("gpu").starts())


@pytest.mark.parametrize("name", MAE_IDS)
def test_mae_exhibits(name):
    """From scratch with the very options of an arm of T3a; fine-tuned from a run of the same model."""
    exhibits = read_exhibits()
    assert set(exhibits[name].scales) == {"demo", "gpu", "paper"} and exhibits[name].unknown

    def same_model(arm):
        return {key: value for key, value in arm.overrides.items() if key.startswith("model.") and "optim" not in key}

    for scale in exhibits[name].scales.values():
        scratch2, scratch1, before2, before1, tuned2, tuned1 = scale.arms
        plain = [(arm.config, arm.overrides) for arm in exhibits["T3a"].scale(scale.name).arms]
        assert all((arm.config, arm.overrides) in plain for arm in (scratch2, scratch1))
        for before, tuned, patch in [(before2, tuned2, 2), (before1, tuned1, 1)]:
            assert tuned.runs == {"init_from": before.name} and same_model(tuned) == same_model(before)
            assert tuned.overrides["model.patch_size"] == patch
            assert (tuned.study, tuned.config.stem) == ("mae", f"{before.config.stem}_finetune")
    depth = {"T4a": {}, "T4b": {"model.depth": 6}}[name]
    sizes = {"T4a": "tiny", "T4b": "small"}
    assert same_model(exhibits[name].scale("demo").arms[0]) == {"model.patch_size": 2, **depth}
    assert same_model(exhibits[name].scale("paper").arms[0]) == {"model.patch_size": 2, "model.size": sizes[name]}
    lengths = [(arm.overrides["trainer.max_epochs"], arm.overrides["model.optim.warmup_epochs"])
               for arm in exhibits[name].scale("gpu").arms]
    assert lengths == [(20, 2), (20, 2), (40, 2), (40, 2), (20, 2), (20, 2)]


def test_diffusion_exhibits():
    """T6 goes on from the runs of T5, which F3 draws; all of the demo's are of one autoencoder and one classifier."""
    exhibits = read_exhibits()
    assert {name: exhibits[name].values for name in DIFFUSION_IDS} == {
        "T5": {"L/2 unguided": 8.90, "XL/2 unguided": 10.67}, "T6": {"L/1": 2.68, "L/2": 2.89}, "F3": {}}
    for scale, compared in [("demo", ["nano/2", "nano/1"]), ("gpu", ["T/2", "T/1"]), ("paper", ["L/2", "L/1"])]:
        arms = {name: {start.arm.name: start for start in exhibits[name].scale(scale).compared()}
                for name in DIFFUSION_IDS}
        unguided, original = (arms["T5"].pop(arm, None) for arm in ("L/2 unguided", "XL/2 unguided"))
        assert all(list(arms[name]) == compared for name in DIFFUSION_IDS)
        if scale == "paper":
            assert unguided.sampling == arms["T5"]["L/2"].sampling | {"guidance": 1}
            assert unguided.sources["copy_of"].shown("fit") == arms["T5"]["L/2"].shown("fit")
            assert price(unguided)._replace(test_flops=0).flops == 0
            # 118.64 G multiply-adds a forward by its paper (DiT, Table 4), which counts matrix products of tokens.
            assert original.sampling == unguided.sampling and price(original).images == 470 * 5004 * 256
            assert price(original).training_flops == pytest.approx(3 * 2 * 118.64e9, rel=0.01)
        for arm, start in arms["T5"].items():
            # GPUs would wait while one of them encodes ImageNet: that is a command before all (imagenet256.yaml).
            prepare = ("prepare",) * (scale == "demo")
            assert start.shown("fit") == arms["F3"][arm].shown("fit") and start.stages == (*prepare, "fit", "test")
            of_latents = start.arm.overrides.get("data.latents")
            assert start.arm.prepare == (("diffusion.latents", of_latents) if prepare else ())
            before = arms["T6"][arm].sources["continue_from"]
            assert before.shown("fit") == start.shown("fit") and before.stages == (*prepare, "fit")
            assert arms["T6"][arm].arm.overrides.get("data.latents") == of_latents
            epochs = {"demo": 400, "gpu": 80, "paper": 1400}[scale]
            assert arms["T6"][arm].arm.overrides["trainer.max_epochs"] == epochs
    assert exhibits["T5"].scale("paper").starts()[0].sampling == {
        "samples": 50_000, "solver": "ddpm", "steps": 250, "guidance": 1.5, "guidance_channels": 3, "seed": 0}
    folders = {str(start.sources[option].located[0]) for seed in range(3)
               for start in exhibits["T5"].scale("demo").compared(3)[2 * seed :][:2] for option in start.sources}
    assert folders == {"runs/diffusion/autoencoder_digits-s0", "runs/supervised/digits-nano-p2-s0"}
    assert exhibits["T5"].scale("demo").metric == "test/fd_digits-nano-p2-s0"
    assert exhibits["T5"].scale("paper").columns == (
        "test/fid", "test/sfid", "test/inception_score", "test/precision", "test/recall")


def test_locality_exhibits():
    """The demo's shares of all pairs are the paper's, and an arm that two figures share is one run."""
    exhibits = read_exhibits()
    left, right = exhibits["F5-left"], exhibits["F5-right"]
    assert left.values == {"T 0": 82.4, "T 25K": 57.2} and left.differences == {"T 25K - T 0": -25.2}
    swaps = {scale: [arm.overrides.get("model.permutation.swaps", 0) for arm in left.scale(scale).arms]
             for scale in left.scales}
    assert swaps["paper"] == [0, 1000, 5000, 10_000, 15_000, 20_000, 25_000]
    for scale, pairs in [("demo", 16 * 16 // 2), ("gpu", 32 * 32 // 2)]:
        assert swaps[scale] == [round(pairs * t / 25_088) for t in swaps["paper"]]
    for scale in ("demo", "gpu", "paper"):
        (_, *arms), deltas = right.scale(scale).arms, [2, 4, 8, *[16, 32] * (scale == "paper"), None]
        twice = [swaps[scale][3]] * len(deltas) + [swaps[scale][5]] * len(deltas)
        assert [arm.overrides["model.permutation.swaps"] for arm in arms] == twice
        assert [arm.overrides.get("model.permutation.delta") for arm in arms] == deltas * 2
        folders = [{start.located[0] for start in exhibit.scale(scale).starts()} for exhibit in (left, right)]
        assert len(folders[0] & folders[1]) == 3
    assert exhibits["PE"].differences == {"none - sincos": -1.5}
    for name in ("T7", "T8", "T9", "scope", "shuffle"):
        assert not exhibits[name].values and set(exhibits[name].scales) == {"demo", "gpu", "paper"}
    assert not exhibits["F4"].scale("demo").arms


@pytest.mark.parametrize("name", GENERATED_IDS + IDS + MAE_IDS + DIFFUSION_IDS + LOCALITY_IDS)
def test_every_arm_parses_on_the_real_command_line(name, monkeypatch):
    """Every override is a key of its config, and no two arms of a scale fall into one run folder."""
    monkeypatch.chdir(ROOT)
    for scale in read_exhibits()[name].scales.values():
        starts = scale.starts(1)
        assert len({start.located[0] for start in starts}) == len(scale.arms)
        for start in starts:
            assert start.located[0].parent == Path("runs", start.arm.study)
            assert start.located[0].name.split("-")[0] == start.arm.config.stem
            for stage in start.stages:
                words = start.arm.prepare if stage == "prepare" else (start.arm.study, stage)
                assert shlex.split(start.shown(stage)) == ["python", "-m", *words, *start.arguments]


def test_an_arm_shares_the_run_of_the_plain_command(monkeypatch):
    """The demo's run is an arm of T3a: it is trained once."""
    monkeypatch.chdir(ROOT)
    from common.training.cli import run_folder

    config = os.path.join("supervised", "configs", "digits.yaml")
    arms = {start.arm.name: start for start in read_exhibits()["T3a"].scale("demo").starts(1)}
    assert arms["nano/1"].located[0] == run_folder("supervised", ["--config", config, "--model.patch_size", "1"])
