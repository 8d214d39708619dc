"""Order, global batch, resuming: what an epoch sees does not depend on how it is split, or where it stopped."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from common.data.loader import EvaluationOrder, GlobalBatchData, TrainOrder, rescale_progress
from common.errors import InputError
from common.training.checkpoints import Checkpoints

# images, global batch, micro-batch, ranks
SPLITS = [(24, 24, 24, 1), (25, 8, 8, 1), (25, 8, 4, 1), (25, 8, 2, 2), (50, 16, 4, 4), (23, 9, 3, 1), (30, 6, 1, 3)]


def order(images: int, batch: int, micro: int, ranks: int = 1, rank: int = 0, epoch: int = 0, done: int = 0, seed=0):
    return TrainOrder(images, batch, micro, seed, lambda: (epoch, done), rank, ranks)


def steps(images: int, batch: int, micro: int, ranks: int = 1, **options) -> list[dict[int, int]]:
    """place -> index of every optimiser step, over all ranks."""
    result = defaultdict(dict)
    for rank in range(ranks):
        accumulation = batch // (micro * ranks)
        for i, draws in enumerate(order(images, batch, micro, ranks, rank, **options)):
            assert len(draws) == micro
            for draw in draws:
                assert draw.place not in result[i // accumulation]
                result[i // accumulation][draw.place] = draw.index
    return list(result.values())


@pytest.mark.parametrize("images, batch, micro, ranks", SPLITS)
def test_an_epoch_sees_every_index_at_most_once_and_drops_the_last_partial_batch(images, batch, micro, ranks):
    seen = [index for step in steps(images, batch, micro, ranks) for index in step.values()]
    assert len(seen) == len(set(seen)) == images // batch * batch
    assert set(seen) <= set(range(images))
    assert len(order(images, batch, micro, ranks)) == images // batch * (batch // (micro * ranks))


@pytest.mark.parametrize("images, batch, micro, ranks", SPLITS)
def test_the_global_batch_does_not_depend_on_its_division(images, batch, micro, ranks):
    whole = steps(images, batch, batch, epoch=3, seed=5)
    assert steps(images, batch, micro, ranks, epoch=3, seed=5) == whole
    assert all(sorted(step) == list(range(batch)) for step in whole)


@pytest.mark.parametrize("images, batch, micro, ranks", [split for split in SPLITS if split[2] % 2 == 0])
def test_mixup_partners_lie_mirrored_in_one_micro_batch(images, batch, micro, ranks):
    for rank in range(ranks):
        for draws in order(images, batch, micro, ranks, rank):
            places = torch.tensor([draw.place for draw in draws])
            assert (places + places.flip(0) == batch - 1).all()


def test_epochs_and_seeds_shuffle_differently():
    epochs = [steps(100, 100, 100, epoch=epoch, seed=seed)[0] for epoch, seed in [(0, 0), (1, 0), (0, 1)]]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(draw.epoch == 4 for draws in order(8, 4, 2, epoch=4) for draw in draws)


def test_going_on_yields_the_rest_of_the_epoch():
    whole = list(order(50, 16, 4, 2, rank=1, epoch=2))
    for done in range(len(whole)):
        assert list(order(50, 16, 4, 2, rank=1, epoch=2, done=done)) == whole[done:]


def test_the_position_is_read_when_the_first_batch_is_asked_for():
    position = (0, 0)
    batches = iter(TrainOrder(40, 4, 4, 0, lambda: position))
    position = (1, 3)
    assert next(batches) == list(order(40, 4, 4, epoch=1))[3]


@pytest.mark.parametrize("images, batch, ranks", [(10, 4, 1), (10, 5, 1), (11, 4, 3), (3, 256, 1)])
def test_evaluation_sees_every_image_once_without_padding(images, batch, ranks):
    orders = [EvaluationOrder(images, batch, rank, ranks) for rank in range(ranks)]
    assert all(len(one) == len(list(one)) for one in orders)
    seen = [draw.index for one in orders for draws in one for draw in draws]
    assert sorted(seen) == list(range(images))
    if ranks == 1:
        assert seen == list(range(images))


# From the global batch to micro-batches


def trainer_of(module: SimpleNamespace, ranks: int = 1, limit: float = 1.0) -> SimpleNamespace:
    """What a datamodule asks of the Trainer, on the first of the ranks."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    return SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": ranks}, seed=0, strategy=strategy,
                           lightning_module=module, limit_train_batches=limit)


def divided(images: int, batch_size: int, batch_per_device: int | str, ranks=1, fit=1, limit=1.0) -> GlobalBatchData:
    data = GlobalBatchData(batch_size, batch_per_device)
    data.sets = {"train": torch.zeros(images), "val": torch.zeros(1)}
    module = SimpleNamespace(images_that_fit=lambda _: fit, whole_batch=False, make_room=lambda *_: None)
    data.trainer = trainer_of(module, ranks, limit)
    data.setup("fit")
    return data


@pytest.mark.parametrize("images, batch_size, most, ranks, expected", [
    (50_000, 1024, 256, 1, (1024, 256, 4, 48)),
    (50_000, 1024, 300, 1, (1024, 256, 4, 48)),
    (50_000, 1024, 4096, 8, (1024, 128, 1, 48)),
    (50_000, 96, 36, 2, (96, 24, 2, 520)),  # even rather than larger: mixup's partners stay together
    (1020, 1024, 1024, 1, (1020, 1020, 1, 1)),  # a set smaller than the batch is one batch
    (1020, 1024, 128, 1, (1020, 102, 10, 1)),
    (100, 9, 9, 1, (9, 9, 1, 11)),
])  # fmt: skip
def test_division(images, batch_size, most, ranks, expected):
    data = divided(images, batch_size, most, ranks)
    found = data.global_batch, data.micro_batch, data.trainer.accumulate_grad_batches, data.steps_per_epoch
    assert found == expected
    assert divided(images, batch_size, "auto", ranks, fit=most).micro_batch == data.micro_batch


@pytest.mark.parametrize("limit, steps", [(1.0, 12), (0.5, 6), (0.3, 3), (6, 6), (1000, 12)])
def test_a_limited_epoch_has_fewer_steps(limit, steps):
    assert divided(100, 8, 4, limit=limit).steps_per_epoch == steps


def test_a_limit_counts_global_batches():
    """A run that goes on in other micro-batches has the same steps; Lightning counts micro-batches."""
    for micro in (2, 4, 8):
        data = divided(100, 8, micro, limit=10)
        assert (data.steps_per_epoch, data.trainer.limit_train_batches) == (10, 10 * 8 // micro)


def test_a_loss_over_the_whole_batch_is_not_divided():
    data = GlobalBatchData(8, 4)
    data.sets = {"train": torch.zeros(100), "val": torch.zeros(1)}
    room = []  # for how many images it was asked
    module = SimpleNamespace(images_that_fit=lambda _: 8, whole_batch=True, makes_room="another loss",
                             make_room=lambda _, n: room.append(n))  # fmt: skip
    data.trainer = trainer_of(module)
    with pytest.raises(InputError, match="data.batch_size: .* needs the 8 images .* holds 4;.* another loss, or set"):
        data.setup("fit")
    data.batch_per_device = "auto"
    data.setup("fit")
    assert data.micro_batch == 8 and room == [8, 8]


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(InputError, match="batch_size: 1022 images do not divide over 4 devices; 1020 or 1024 would"):
        divided(50_000, 1022, 512, 4)
    with pytest.raises(InputError, match="data.batch_size: 1022 images on 1 .* at most 128; 1024 would"):
        divided(50_000, 1022, 128)


def test_every_batch_that_a_message_names_divides():
    refused = 0
    for images in (13, 61, 127, 5000):
        for batch in (*range(1, 24), 61, 97, 127, 254, 1000, 1021, 6000):
            for most in (1, 2, 3, 7, 8, 15, 32, 64):
                for ranks in (1, 2, 3, 4):
                    try:
                        data = divided(images, batch, most, ranks)
                        assert data.micro_batch <= most
                        assert data.micro_batch * data.trainer.accumulate_grad_batches * ranks == data.global_batch
                    except InputError as error:
                        refused += 1
                        named = re.search(r"; (\d+)(?: or (\d+))? would", str(error))
                        for number in filter(None, named.groups()):
                            assert divided(images, int(number), 10**9 if "over" in str(error) else most, ranks), error
                            assert int(number) <= images, error
    assert refused > 300


@pytest.mark.parametrize("options, name", [
    ({"batch_size": 0}, "data.batch_size: 0"),
    ({"batch_size": 8, "batch_per_device": -1}, "data.batch_per_device: -1"),
    ({"batch_size": 8, "eval_batch_size": 0}, "data.eval_batch_size: 0"),
    ({"batch_size": 8, "workers": -1}, "data.workers: -1"),
])  # fmt: skip
def test_impossible_sizes_are_named(options, name):
    with pytest.raises(InputError, match=name):
        GlobalBatchData(**options)


# Under Lightning


class Seen(L.Callback):
    """(step, place) -> (epoch, index) of all that was trained on; stops at `stop` as if the machine had failed."""

    def __init__(self, stop: int | None = None) -> None:
        self.draws, self.stop = {}, stop

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: dict, i: int) -> None:
        if trainer.global_step == self.stop:
            raise RuntimeError("out of order")
        for place, epoch, index in torch.stack([batch["place"], batch["epoch"], batch["index"]]).T.tolist():
            self.draws[trainer.global_step, place] = epoch, index


@pytest.mark.parametrize("saved, accumulation, expected", [(1, 4, 112), (4, 2, 14), (7, 1, 4), (2, 2, 28)])
@pytest.mark.parametrize("pending", [0, 1])  # at the end of an epoch, and of a batch, which is then not yet completed
def test_progress_is_rescaled(saved, accumulation, expected, pending):
    counts = {"ready": 28, "started": 28, "processed": 28, "completed": 28 - pending}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    checkpoint = {"accumulation": saved, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    rescale_progress(checkpoint, accumulation)
    for found in (progress["total"], progress["current"]):
        assert found == {"ready": expected, "started": expected, "processed": expected, "completed": expected - pending}


def final_weights(trainer: L.Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.net.parameters()])


# 44 images in batches of 8 are 5 steps an epoch; the last checkpoint before each stop lies within the second epoch.
@pytest.mark.parametrize("before, after", [(8, 4), (8, 2), (2, 8), (4, 2), (2, 4)])
@pytest.mark.parametrize("stop", [7, 9])
def test_a_run_goes_on_with_another_accumulation(train: Callable, tmp_path: Path, before, after, stop):
    undisturbed = Seen()
    options = {"epochs": 3, "mixup": 0.8, "drop_path": 0.2}
    whole = train(undisturbed, **options)

    first, rest = Seen(stop), Seen()
    with pytest.raises(RuntimeError, match="out of order"):
        train(first, Checkpoints(every_n_steps=2), batch_per_device=before, folder="other", **options)
    resumed = train(rest, batch_per_device=after, folder="other",
                    ckpt_path=tmp_path / "other" / "checkpoints" / "last.ckpt", **options)  # fmt: skip

    assert min(rest.draws)[0] == stop - 1  # the checkpoint's step, not its epoch's start
    assert first.draws | rest.draws == undisturbed.draws
    assert resumed.global_step == whole.global_step == 15
    torch.testing.assert_close(final_weights(resumed), final_weights(whole), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workers", [2])
def test_epochs_follow_each_other_with_workers_too(command: Callable, tmp_path: Path, workers):
    weights = []
    for name, more in [("a", ["--data.workers", workers]), ("b", [])]:
        assert command("fit", "--run_name", name, "--model.drop_path", "0.1", *more).code == 0
        checkpoint = torch.load(tmp_path / "runs/supervised" / name / "checkpoints/last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
