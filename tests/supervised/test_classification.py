"""Classification: the loss, its mixing, and exact accuracies, however a batch is divided."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.training.curves import Curves
from common.training.optim import Recipe
from supervised import Classification
from supervised.classification import TopK

# Accuracies


@pytest.mark.parametrize("classes", [3, 5, 20])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_against_sorting_by_hand(k, classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(37, classes, generator=generator)
    labels = torch.randint(classes, (37,), generator=generator)
    hits = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        better = sum(value > row[label] for value in row)
        hits += better < k
    metric = TopK(k)
    for start in (0, 10, 36):  # batches of 10, 26 and 1
        end = {0: 10, 10: 36, 36: 37}[start]
        metric.update(logits[start:end], labels[start:end])
    assert metric.compute().item() == pytest.approx(100 * hits / 37)
    assert (hits == 37) == (k >= classes)


def test_evaluation_weighs_images_and_not_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(11, 4, generator=generator), torch.randint(4, (11,), generator=generator)
    module = Classification(Recipe(lr=0.1))
    scores = module.metrics(None)
    for start, end in [(0, 8), (8, 11)]:
        module.evaluate(lambda images: images, {"image": logits[start:end], "label": labels[start:end]}, scores)
    values = scores.compute()
    assert values["loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())
    assert values["acc1"].item() == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


# The loss


def prepared(step: int = 0, batch: int = 8, classes: int = 3, **options) -> tuple[Classification, dict]:
    """A classifier whose net returns what it was shown, at an optimiser step, and a batch of one-pixel images."""
    module = Classification(Recipe(lr=0.1), **options)
    module._trainer = SimpleNamespace(seed=0, global_step=step)
    net = torch.nn.Flatten()
    net.classes, net.drop_path, net.depth = classes, 0.0, 1
    net.forward = lambda images, drops=None: images.flatten(1)
    module.net = net
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, classes, 1, 1, generator=generator)
    return module, {"image": images, "label": torch.arange(batch) % classes, "place": torch.arange(batch)}


def test_label_smoothing_is_spread_over_all_classes():
    module, batch = prepared(label_smoothing=0.3)
    targets = F.one_hot(batch["label"], 3) * 0.7 + 0.1
    expected = -(targets * batch["image"].flatten(1).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_mixup_blends_a_batch_with_its_reverse(step):
    module, batch = prepared(step, mixup=0.8, label_smoothing=0.3)
    smoothed = F.one_hot(batch["label"], 3) * 0.7 + 0.1
    images, targets = module.mixed(batch["image"].clone(), batch["label"])
    # Where the labels differ, the targets show the share.
    share = ((targets - smoothed.flip(0)) / (smoothed - smoothed.flip(0)))[(smoothed - smoothed.flip(0)).abs() > 0.1]
    assert share.std() < 1e-5 and 0 < share[0] < 1
    expected = share[0] * batch["image"] + (1 - share[0]) * batch["image"].flip(0)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    loss = module.training_step({**batch, "image": batch["image"].clone()}, 0)
    torch.testing.assert_close(loss, -(targets * expected.flatten(1).log_softmax(1)).sum(1).mean())  # smoothed once


def test_each_step_draws_its_own_share():
    losses = {round(module.training_step(batch, 0).item(), 5) for module, batch in
              (prepared(step, mixup=0.8) for step in range(5))}  # fmt: skip
    assert len(losses) == 5


def test_an_odd_batch_cannot_be_mixed():
    module, batch = prepared(batch=7, mixup=0.8)
    with pytest.raises(InputError, match="data.batch_size: mixup pairs images, and 7 on a device are odd"):
        module.training_step(batch, 0)


@pytest.mark.parametrize("options, message", [
    ({"mixup": -0.1}, "model.mixup: -0.1"), ({"cutmix": -1.0}, "model.cutmix: -1.0"),
    ({"label_smoothing": 1.0}, "model.label_smoothing: 1.0"),
])  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Classification(Recipe(lr=0.1), **options)


class Gradients(L.Callback):
    """The gradient of every step's global batch, by parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Classification, optimizer) -> None:
        self.steps.append({name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()})


@pytest.mark.parametrize("mixing", [{"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_micro_batches_have_the_gradient_of_the_whole(train: Callable, scalars: Callable, mixing):
    """Mixing, its share and its box, smoothing and dropped paths: all of them belong to the global batch."""
    runs = []
    for most in (8, 4, 2):
        gradients = Gradients()
        trainer = train(gradients, Curves(), batch_per_device=most, epochs=1, folder=f"{most}", drop_path=0.3,
                        label_smoothing=0.1, **mixing)  # fmt: skip
        runs.append((gradients.steps, scalars(trainer.logger.log_dir)["train/loss"]))
    (whole, losses), *divided = runs
    for steps, found in divided:
        assert found == [pytest.approx(point, abs=1e-6) for point in losses]
        for step, expected in zip(steps, whole, strict=True):
            for name, gradient in expected.items():
                torch.testing.assert_close(step[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "pool": "avg"}, {"position": "none", "qk_norm": True},
                                     {"pool": "avg", "position": "sincos"}])  # fmt: skip
def test_every_parameter_receives_a_gradient(train: Callable, options):
    gradients = Gradients()
    train(gradients, epochs=1, **options)
    silent = [name for name, gradient in gradients.steps[1].items() if gradient is None or not gradient.any()]
    assert silent == []


# 10 steps of nano at /2 on the digits, in fp32 on a CPU: what a change of the numerics would move.
GOLDEN = {
    "plain": ([], [2.30444, 2.30368, 2.30258, 2.31958, 2.32897, 2.35153, 2.28217, 2.30832, 2.30918, 2.29690]),
    "everything": (["--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.drop_path", "0.2",
                    "--model.label_smoothing", "0.1", "--data.batch_per_device", "32"],
                   [2.31157, 2.30281, 2.29729, 2.31615, 2.32123, 2.33897, 2.28967, 2.30937, 2.30537, 2.30475]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(command: Callable, scalars: Callable, tmp_path: Path, name):
    options, expected = GOLDEN[name]
    small = ["--model.patch_size", "2", "--trainer.max_epochs", "2", "--model.optim.lr", "2e-3",
             "--model.optim.warmup_epochs", "1", "--run_name", "golden",
             "--trainer.log_every_n_steps", "1"]  # fmt: skip
    assert command("fit", *small, *options, small=False).code == 0
    losses = [value for _, value in scalars(tmp_path / "runs/supervised/golden")["train/loss"]][:10]
    assert losses == pytest.approx(expected, abs=1e-4), " ".join(f"{loss:.5f}," for loss in losses)
