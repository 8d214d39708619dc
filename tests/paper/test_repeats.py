"""What makes runs repeats of one another."""

import json

import pytest

from common.identity import arm_hash, config_hash, covered
from common.runs import changed_source
from common.runs import trained as trained_as


def trained(seed, source=None):
    return {"seed_everything": seed, "model": {"patch_size": 1}, "init_from": source}


@pytest.mark.parametrize("source", [
    "runs/mae/digits-nano-p1-s{}", "runs/mae/digits-nano-p1-s{}-2883cd", "runs/mae/digits-s{}/checkpoints/last.ckpt",
])
def test_seeds_that_start_from_the_run_of_their_own_seed_are_one_arm(source):
    assert len({arm_hash(trained(seed, source.format(seed))) for seed in (0, 1, 12)}) == 1
    assert len({config_hash(trained(seed, source.format(seed))) for seed in (0, 1, 12)}) == 3


@pytest.mark.parametrize("source", ["weights/vit-small.pth", "runs/mae/digits-nano-p1-s0"])
def test_seeds_that_start_from_one_source_are_one_arm(source):
    assert len({arm_hash(trained(seed, source)) for seed in (0, 1, 5)}) == 1


@pytest.mark.parametrize("one, other", [
    (trained(0, "runs/mae/a-s0"), trained(1, "runs/mae/b-s1")),
    (trained(0, "runs/mae/a-s0-2883cd"), trained(1, "runs/mae/a-s1-1df6e7")),
    (trained(0, "runs/mae/a-s0-2883cd"), trained(1, "runs/mae/a-s1")),
    (trained(0, "runs/mae/a-s0x"), trained(1, "runs/mae/a-s1x")),
    (trained(0, "runs/mae/a-s0-long"), trained(1, "runs/mae/a-s1-long")),  # no hash: a name that somebody chose
    (trained(0, "runs/mae/a-s0"), trained(1)),
])
def test_other_weights_are_another_arm(one, other):
    assert arm_hash(one) != arm_hash(other)


def test_options_of_prediction_alone_are_no_part_of_a_run():
    config = {"model": {"class_path": "A", "init_args": {"patch_size": 1, "predict": {"masks": 2}}}}
    assert covered(config) == {"model.class_path": "A", "model.patch_size": 1}
    for key in ("predict", "predictor"):  # a model's own key that only looks like it
        assert covered({"model": {key: "noise"}}) == {f"model.{key}": "noise"}


def test_copies_of_a_run_are_told_apart_by_what_they_are_tested_by():
    """Over the seeds of the run and of its judge; and no other run is."""

    def tested(seed, guidance, copy=True):
        model = {"predict": {"guidance": guidance}, "evaluation": {"extractor": f"runs/supervised/digits-s{seed}"}}
        return {"seed_everything": seed, "model": model, "copy_of": f"runs/diffusion/a-s{seed}" if copy else None}

    assert arm_hash(tested(0, 1.0)) == arm_hash(tested(3, 1.0)) != arm_hash(tested(0, 4.0))
    assert config_hash(tested(0, 1.0)) == config_hash(tested(0, 4.0))
    assert arm_hash(tested(0, 1.0, copy=False)) == arm_hash(tested(0, 4.0, copy=False)) != arm_hash(tested(0, 1.0))


def test_weights_that_were_trained_anew_are_noticed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()

    def train(**results):
        (source / "results.json").write_text(json.dumps({"status": "finished", "step": 9, **results}))

    train(config_hash="a")
    run = {"init_from": {"source": str(source), "trained": trained_as(source)}}
    copy = {"init_from": {}, "copy_of": run["init_from"]}
    assert changed_source(run) is changed_source(copy) is None
    for other in ({"config_hash": "b"}, {"config_hash": "a", "step": 10}):
        train(**other)
        assert changed_source(run) == changed_source(copy) == str(source)
    train(config_hash="a")
    assert changed_source(run) is None  # the same config gives the same weights
    (source / "results.json").unlink()
    assert changed_source(run) is None  # nothing says that they were others
    assert changed_source({}) is None and changed_source({"init_from": {"source": "mae_pretrain.pth"}}) is None
