"""Order, global batch and resuming: what every study's data has in common."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import InputError
from common.randomness import permutation


class Draw(NamedTuple):
    """One image of one batch, and all that its randomness may depend on."""

    epoch: int
    index: int  # in the data set
    place: int  # in the global batch


class TrainOrder(Sampler[list[Draw]]):
    """The micro-batches of one rank, in a shuffle that is a function of (seed, epoch).

    Stateless: where an epoch starts is read from `position` (epoch, micro-batches done) when the first batch is asked
    for. Places i and B-1-i of the global batch, the partners of mixup, lie at mirrored places of one micro-batch.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        micro: int,
        seed: int,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert batch % (micro * ranks) == 0 and batch <= images
        self.images, self.batch, self.seed, self.position = images, batch, seed, position
        self.accumulation = batch // (micro * ranks)
        chunks = [_mirrored_places(batch, micro, rank + ranks * k) for k in range(self.accumulation)]
        self.places = [torch.tensor(chunk) for chunk in chunks]

    def __len__(self) -> int:
        return self.images // self.batch * self.accumulation  # the last partial batch is dropped

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, done = self.position()
        order = permutation("order", self.seed, epoch, n=self.images)
        for micro_step in range(done, len(self)):
            step, k = divmod(micro_step, self.accumulation)
            places = self.places[k]
            indices = order[step * self.batch + places]
            yield [Draw(epoch, *pair) for pair in zip(indices.tolist(), places.tolist(), strict=True)]


def _mirrored_places(batch: int, micro: int, chunk: int) -> list[int]:
    if micro % 2:
        return list(range(chunk * micro, (chunk + 1) * micro))
    first = range(chunk * micro // 2, (chunk + 1) * micro // 2)
    return [*first, *(batch - 1 - i for i in reversed(first))]


class EvaluationOrder(Sampler[list[Draw]]):
    """Every image once, in order, dealt out to the ranks without padding, so that counts are exact."""

    def __init__(self, images: int, batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.indices, self.batch = range(rank, images, ranks), batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        for start in range(0, len(self.indices), self.batch):
            yield [Draw(0, index, 0) for index in self.indices[start : start + self.batch]]


class GlobalBatchData(L.LightningDataModule):
    """Loaders over data sets that answer `__getitems__(draws)` with a whole batch, a dict of tensors.

    A study says what a split is (`load`) and what happens on the device (`on_after_batch_transfer`).

    Args:
        batch_size: the global batch, over all devices, nodes and micro-batches; clamped to the training set.
        batch_per_device: the most images that a device holds at once; `auto` derives it from the device's memory.
        workers: loader processes per device.
        eval_batch_size: images per device in validation, test and prediction.
    """

    def __init__(
        self,
        batch_size: int,
        batch_per_device: int | Literal["auto"] = "auto",
        workers: int = 0,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        for name, value in [("batch_size", batch_size), ("batch_per_device", batch_per_device),
                            ("eval_batch_size", eval_batch_size)]:
            if value != "auto" and value < 1:
                raise InputError(f"data.{name}: {value} is not a positive number of images")
        if workers < 0:
            raise InputError(f"data.workers: {workers} is negative; 0 loads in the main process")
        self.batch_size, self.batch_per_device = batch_size, batch_per_device
        self.workers, self.eval_batch_size = workers, eval_batch_size
        self.sets: dict[str, Dataset] = {}
        self.arrived: Callable[[], None] = lambda: None  # called when a batch has come out of a loader

    @property
    def held_bytes(self) -> int:
        """Of images that lie on the device throughout."""
        return 0

    def load(self, split: str) -> Dataset:
        """The data set of a split: train, val, test or predict."""
        raise InputError(f"{type(self).__name__} has no split {split!r}")

    def without_files(self) -> int:
        """Makes a net for these data buildable where the files are not at hand; the number of training images."""
        raise NotImplementedError

    def random_batch(self, images: int) -> dict[str, Tensor]:
        """Noise in the form of a training batch as a model is given it, to measure a step by."""
        numbers = torch.arange(images)
        return {"image": torch.randn(images, self.channels, *self.image_size), "index": numbers, "place": numbers,
                "epoch": torch.zeros_like(numbers)}  # fmt: skip

    def setup(self, stage: str) -> None:
        for split in {"fit": ["train", "val"], "validate": ["val"]}.get(stage, [stage]):
            if split not in self.sets:
                self.sets[split] = self.load(split)
        if stage == "fit":
            self._divide()

    def _divide(self) -> None:
        """Derives the micro-batch and the number of micro-batches in a step from the global batch and the devices."""
        trainer, module = self.trainer, self.trainer.lightning_module
        _, ranks = self._rank
        self.global_batch = min(self.batch_size, len(self.sets["train"]))
        if self.global_batch % ranks:
            below = self.global_batch // ranks * ranks
            near = [n for n in (below, below + ranks) if 0 < n <= len(self.sets["train"])]
            raise InputError(f"data.batch_size: {self.global_batch} images do not divide over {ranks} devices; "
                             f"{' or '.join(map(str, near)) or 'no batch of so few training images'} would")
        per_device = self.global_batch // ranks
        asked = 1 if self.batch_per_device == "auto" else min(self.batch_per_device, per_device)
        module.make_room(self, per_device if module.whole_batch else asked)
        most = self.batch_per_device
        if most == "auto":
            most = self._most(max(module.images_that_fit(self), 1))
        if module.whole_batch and per_device > most:
            raise InputError(f"data.batch_size: the loss is no mean over images and needs the {per_device} images of a "
                             f"device at once, but it holds {most}; use at most {most * ranks}, more devices, or "
                             f"{module.makes_room}, or set data.batch_per_device={per_device} if they fit")
        self.micro_batch = _micro_batch(per_device, most)
        if not self.micro_batch:
            near = next(n for gap in range(per_device) for n in (per_device + gap, per_device - gap)
                        if n * ranks <= len(self.sets["train"]) and (_micro_batch(n, most) or 1) % 2 == 0)
            raise InputError(f"data.batch_size: {self.global_batch} images on {ranks} device(s) do not divide into "
                             f"micro-batches of at most {most}; {near * ranks} would")
        trainer.accumulate_grad_batches = per_device // self.micro_batch
        # A number of them counts global batches, as all that is given does: a run may go on in other micro-batches.
        steps, limit = len(self._order()) // trainer.accumulate_grad_batches, trainer.limit_train_batches
        self.steps_per_epoch = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if not self.steps_per_epoch:
            raise InputError(f"trainer.limit_train_batches: {limit} leaves no optimiser step in an epoch of {steps}")
        trainer.limit_train_batches = self._batches_per_epoch = self.steps_per_epoch * trainer.accumulate_grad_batches

    def _most(self, images: int) -> int:
        """The least of what fits on any device: all of them must divide the batch alike."""
        strategy = self.trainer.strategy
        return int(strategy.reduce(torch.tensor(images, device=strategy.root_device), reduce_op="min"))

    @property
    def _rank(self) -> tuple[int, int]:
        """Which part of the training images this device has, and of how many; devices may share theirs."""
        shares = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return shares["rank"], shares["num_replicas"]

    def _order(self) -> TrainOrder:
        return TrainOrder(len(self.sets["train"]), self.global_batch, self.micro_batch, self.trainer.seed,
                          self._position, *self._rank)

    def _position(self) -> tuple[int, int]:
        # `processed`, not `current_epoch`: a checkpoint from the end of an epoch has not counted it as completed.
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.ready % self._batches_per_epoch  # all of them: at an epoch's end
        return loop.epoch_progress.current.processed, done

    def loader(self, split: str, order: Iterable[list[Draw]]) -> DataLoader:
        """Batches of these draws, in this order."""
        return DataLoader(
            self.sets[split],
            batch_sampler=order,
            collate_fn=_whole_batch,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_outlast_sigterm if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _evaluation_loader(self, split: str) -> DataLoader:
        trainer = self.trainer
        order = EvaluationOrder(len(self.sets[split]), self.eval_batch_size, trainer.global_rank, trainer.world_size)
        return self.loader(split, order)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.arrived()
        return batch

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", self._order())

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")


def _micro_batch(batch: int, most: int) -> int | None:
    """The largest even divisor up to `most`, or odd one where none is even; None where that wastes half of the room."""
    divisors = [n for n in range(1, min(batch, most) + 1) if batch % n == 0]
    largest = max((n for n in divisors if n % 2 == 0), default=divisors[-1])  # even: mixup pairs images
    return largest if 2 * largest >= min(most, batch) else None


def _outlast_sigterm(_: int) -> None:
    # Slurm signals every process of a job; the main one goes on to the end of its step. Workers end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loaders() -> None:
    """Ends the loader processes that a failed command has left, for instance since one of them was killed.

    At exit Python asks them to end with SIGTERM, which they outlast, and would wait for them for ever.
    """
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for a process that is killed
        for process in left:
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, before)


def _whole_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def rescale_progress(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Lightning counts micro-batches: a run that goes on with another accumulation needs its counts rescaled."""
    saved = checkpoint.get("accumulation", accumulation)
    if saved == accumulation:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        # 1 in a checkpoint from `on_train_batch_end`: its batch is processed and not yet completed.
        pending = counts["processed"] - counts["completed"]
        counts.update(dict.fromkeys(counts, counts["processed"] // saved * accumulation))
        counts["completed"] -= pending
