"""Tokens of segments against loops over pixels, a plain Vision Transformer, and attention over shorter sequences."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.segmentation import slic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from common.data import Augment, Digits, ImageFolder, Shapes
from common.data.loader import Draw
from common.errors import InputError
from common.model import Attention, Block, VisionTransformer
from common.model.flops import forward_flops
from common.training.checkpoints import read
from common.training.optim import Recipe
from locality_ablation.grouping import SegmentClassification, SegmentTokens, SegmentTransformer
from locality_ablation.segmentation import Segmentation, Slic
from locality_ablation.segmented_images import SegmentedImages

CONFIG = Path(__file__).parents[2] / "locality_ablation" / "configs" / "digits.yaml"
NET = {"image_size": (8, 12), "patch_size": 4, "classes": 5, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def shaken(model: VisionTransformer) -> VisionTransformer:
    """Its weights are as far from zero as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def net(limit: int, **options) -> SegmentTransformer:
    return shaken(SegmentTransformer(limit, **{**NET, **options}))


def plain_net(**options) -> VisionTransformer:
    return shaken(VisionTransformer(**{**NET, **options}))


def irregular(batch: int, height: int, width: int, segments: int) -> torch.Tensor:
    """int64 (B, H, W): as many segments as asked for in the first image, and one fewer in each after it."""
    maps = torch.stack([torch.randint(segments - i, (height, width)) for i in range(batch)])
    for i in range(batch):  # all of them occur
        maps[i].view(-1)[torch.randperm(height * width)[: segments - i]] = torch.arange(segments - i)
    return maps


# Tokens and positions


def test_a_token_is_the_projection_of_the_mean_pixel():
    tokens, images, segments = SegmentTokens(3, 16, limit=9), torch.randn(3, 3, 5, 7), irregular(3, 5, 7, 6)
    found, centroids, pixels = tokens(images, segments)
    assert found.shape == (3, 9, 16) and centroids.shape == (3, 9, 2) and pixels.shape == (3, 9)
    for b in range(3):
        for slot in range(9):
            inside = [(y, x) for y in range(5) for x in range(7) if segments[b, y, x] == slot]
            assert pixels[b, slot] == len(inside)
            if not inside:
                continue
            projected = torch.stack([tokens.proj(images[b, :, y, x]) for y, x in inside])
            torch.testing.assert_close(found[b, slot], projected.mean(0), atol=1e-6, rtol=1e-5)
            # Centres of pixels, where the image reaches from -1 to 1.
            place = [sum(2 * (x + 0.5) / 7 - 1 for _, x in inside), sum(2 * (y + 0.5) / 5 - 1 for y, _ in inside)]
            torch.testing.assert_close(centroids[b, slot], torch.tensor(place) / len(inside), atol=1e-6, rtol=1e-5)
    assert pixels.sum() == 3 * 35


def positions(model: SegmentTransformer, segments: torch.Tensor) -> torch.Tensor:
    """What a segment's place adds to its token."""
    images = torch.randn(len(segments), 3, *segments.shape[1:])
    return model.embed_segments(images, segments)[0] - model.patch_embed(images, segments)[0]


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_a_segment_that_is_a_patch_has_the_patchs_row(position):
    model = net(6, position=position)
    patches = torch.arange(6).view(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    found = positions(model, patches[None])
    torch.testing.assert_close(found[0], model.pos_embed[0, 1:], atol=1e-5, rtol=0)


def test_a_centroid_between_patches_weighs_their_rows():
    """On the 2x3 grid of 4x4 patches, whose centres are 2, 6, 10 from the left and 2, 6 from the top."""
    model = net(4)
    rows = model.pos_embed[0, 1:].view(2, 3, -1)
    segments = torch.full((1, 8, 12), 3)
    segments[0, 0:4, 0:8] = 0  # centre (4, 2): half of two patches
    segments[0, 2:6, 8:10] = 1  # centre (9, 4): a quarter of the second column, three of the third, of both rows
    segments[0, 7, 0] = 2  # centre (0.5, 7.5): beyond the outermost centres, where nothing is extrapolated
    found = positions(model, segments)[0]
    torch.testing.assert_close(found[0], (rows[0, 0] + rows[0, 1]) / 2, atol=1e-5, rtol=0)
    expected = (rows[:, 1] * 0.25 + rows[:, 2] * 0.75).mean(0)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], rows[1, 0], atol=1e-5, rtol=0)


def test_any_centroid_by_hand():
    model, segments = net(7), irregular(2, 8, 12, 7)
    rows = model.pos_embed[0, 1:].view(2, 3, -1).detach()
    found = positions(model, segments)
    for b in range(2):
        for slot in range(7 - b):
            y, x = ((segments[b] == slot).nonzero().double().mean(0) + 0.5).tolist()
            down, right = min(max(y / 4 - 0.5, 0), 1), min(max(x / 4 - 0.5, 0), 2)
            column, rest = min(int(right), 1), right - min(int(right), 1)
            expected = sum(
                weight * rows[row, column + step]
                for row, part in ((0, 1 - down), (1, down))
                for step, weight in ((0, part * (1 - rest)), (1, part * rest))
            )
            torch.testing.assert_close(found[b, slot], expected, atol=1e-5, rtol=0)


def test_no_positions_add_nothing():
    assert not positions(net(7, position="none"), irregular(2, 8, 12, 7)).any()


# The mask, and what it leaves out


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("part", ["attention", "block"])
def test_masked_attention_equals_that_over_the_shorter_sequence(part, qk_norm):
    layer = Attention(24, 3, qk_norm) if part == "attention" else Block(24, 3, qk_norm=qk_norm)
    x, mask = torch.randn(4, 11, 24), torch.rand(4, 11) < 0.6
    mask[:, 0], mask[3] = True, True
    found = layer(x, mask=mask)
    for b in range(4):
        torch.testing.assert_close(found[b, mask[b]], layer(x[b : b + 1, mask[b]])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[3], layer(x)[3], atol=1e-5, rtol=1e-5)
    assert (found[:3] - layer(x)[:3]).abs().max() > 0.01


@pytest.mark.parametrize("checkpoint_blocks", [0, 1, 2])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_masked_encoder_and_its_gradients_equal_those_of_the_shorter_sequence(checkpoint_blocks, drop_path):
    model = plain_net(drop_path=drop_path, checkpoint_blocks=checkpoint_blocks).train()
    x, mask, drops = torch.randn(3, 7, 16), torch.rand(3, 7) < 0.6, torch.rand(3, 4)
    mask[:, 0] = True
    whole = model.encode(x, drops, mask)[mask]
    short = torch.cat([model.encode(x[b : b + 1, mask[b]], drops[b : b + 1])[0] for b in range(3)])
    torch.testing.assert_close(whole, short, atol=1e-5, rtol=1e-5)
    parameters = list(model.blocks.parameters())
    gradients = (torch.autograd.grad(result.square().sum(), parameters) for result in (whole, short))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_room_for_more_segments_changes_nothing(position):
    tight = net(7, position=position)
    roomy = SegmentTransformer(40, **{**NET, "position": position}).eval()
    roomy.load_state_dict(tight.state_dict())
    images, segments = torch.randn(4, 3, 8, 12), irregular(4, 8, 12, 7)
    expected = tight(images, segments)
    torch.testing.assert_close(roomy(images, segments), expected, atol=1e-5, rtol=1e-5)
    for b in range(4):  # and neither do the other images
        torch.testing.assert_close(tight(images[b : b + 1], segments[b : b + 1])[0], expected[b], atol=1e-5, rtol=1e-5)


def test_the_order_of_segments_changes_nothing():
    model, images, segments = net(9), torch.randn(2, 3, 8, 12), irregular(2, 8, 12, 6)
    shuffled = torch.randperm(9)[segments]
    torch.testing.assert_close(model(images, shuffled), model(images, segments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"position": "none"}, {"position": "sincos"}, {"channels": 1}], ids=str)
def test_segments_of_single_pixels_are_a_pixel_model(options):
    plain = plain_net(patch_size=1, **options)
    model = SegmentTransformer(96, **{**NET, "patch_size": 1, **options}).eval()
    model.load_state_dict(plain.state_dict())
    images = torch.randn(3, plain.channels, 8, 12)
    pixels = torch.arange(96).view(1, 8, 12).expand(3, -1, -1)
    torch.testing.assert_close(model(images, pixels), plain(images), atol=1e-5, rtol=1e-5)


def test_segments_that_are_patches_are_a_patch_model_of_their_means():
    plain = plain_net(patch_size=2)
    model = SegmentTransformer(30, **{**NET, "patch_size": 2}).eval()
    weights = plain.state_dict()
    with torch.no_grad():  # one weight for all pixels of a patch
        per_channel = weights["patch_embed.proj.weight"].view(16, 4, 3).mean(1)
        plain.patch_embed.proj.weight.copy_(per_channel.repeat(1, 4) / 4)
    model.load_state_dict({**weights, "patch_embed.proj.weight": per_channel})
    patches = torch.arange(24).view(4, 6).repeat_interleave(2, 0).repeat_interleave(2, 1)[None].expand(3, -1, -1)
    images = torch.randn(3, 3, 8, 12)
    torch.testing.assert_close(model(images, patches), plain(images), atol=1e-5, rtol=1e-5)


def test_the_mean_of_all_tokens_is_refused():
    for options in ({"pool": "avg"}, {"pool": "avg", "class_token": False}):
        with pytest.raises(InputError, match="model.pool='avg': the mean would count slots without a segment; use cls"):
            SegmentTransformer(7, **{**NET, **options})


@pytest.mark.parametrize("options", [{}, {"channels": 1, "width": 24, "patch_size": 2}, {"position": "none"}], ids=str)
def test_flops_equal_torchs_counter(options):
    model = net(17, **options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(3, model.channels, 8, 12), irregular(3, 8, 12, 9))
    assert counter.get_total_flops() == 3 * forward_flops(model)


# Mixtures


def prepared(step: int, **options) -> tuple[SegmentClassification, dict]:
    """A module at an optimiser step, and a batch of images whose numbers of segments and labels differ."""
    module = SegmentClassification(optim=Recipe(lr=0.1), **options)
    module._trainer = SimpleNamespace(seed=0, global_step=step)
    module.net = net(12, classes=8)
    return module, {"image": torch.randn(8, 3, 8, 12), "segments": irregular(8, 8, 12, 12), "label": torch.arange(8)}


def mixture(module: SegmentClassification, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and mask that reach the blocks, without the class token's, and the targets."""
    reached = []
    module.net.encode = lambda x, drops=None, mask=None: reached.extend([x[:, 1:], mask[:, 1:]]) or x
    targets = module.logits(batch, None)[1]
    return *(part.detach() for part in reached), targets


def pixels_of(batch: dict) -> torch.Tensor:
    return torch.stack([torch.bincount(labels.flatten(), minlength=12) for labels in batch["segments"]])


@pytest.mark.parametrize("step", range(5))
def test_mixup_adds_what_is_there_slot_by_slot(step):
    module, batch = prepared(step, mixup=0.8, label_smoothing=0.2)
    embedded, pixels = module.net.embed_segments(batch["image"], batch["segments"])[0].detach(), pixels_of(batch)
    tokens, mask, targets = mixture(module, batch)
    share = ((targets.diagonal() - 0.2 / 8) / 0.8)[0]
    assert 0 < share < 1
    for b in range(8):
        smoothed = [F.one_hot(torch.tensor(label), 8) * 0.8 + 0.2 / 8 for label in (b, 7 - b)]
        torch.testing.assert_close(targets[b], share * smoothed[0] + (1 - share) * smoothed[1])
        for slot in range(12):
            parts = [part * embedded[image, slot] for image, part in ((b, share), (7 - b, 1 - share))
                     if pixels[image, slot] > 0]  # fmt: skip
            assert mask[b, slot] == bool(parts)
            if parts:
                torch.testing.assert_close(tokens[b, slot], sum(parts), atol=1e-5, rtol=1e-5)


def test_cutmix_takes_a_run_of_slots_and_shares_targets_by_pixels():
    """Which slots came from the partner is read off the tokens; over steps runs of many lengths and places."""
    runs = set()
    for step in range(20):
        module, batch = prepared(step, cutmix=1.0, label_smoothing=0.2)
        embedded, pixels = module.net.embed_segments(batch["image"], batch["segments"])[0].detach(), pixels_of(batch)
        tokens, mask, targets = mixture(module, batch)
        taken = (tokens != embedded).any(-1).any(0)
        assert torch.equal(tokens, torch.where(taken[:, None], embedded.flip(0), embedded))
        places = taken.nonzero()[:, 0].tolist()
        assert places == list(range(min(places, default=0), max(places, default=-1) + 1))
        runs.add((min(places, default=0), len(places)))
        for b in range(8):
            own = sum(int(pixels[b, slot]) for slot in range(12) if slot not in places)
            other = sum(int(pixels[7 - b, slot]) for slot in places)
            present = [bool(pixels[7 - b if slot in places else b, slot]) for slot in range(12)]
            assert mask[b].tolist() == present
            expected = torch.full((8,), 0.2 / 8)
            expected[b] += 0.8 * own / (own + other)
            expected[7 - b] += 0.8 * other / (own + other)
            torch.testing.assert_close(targets[b], expected)
    assert len({length for _, length in runs}) > 6 and len({first for first, _ in runs}) > 4


def test_both_mixtures_take_turns():
    kinds = []
    for step in range(40):
        module, batch = prepared(step, mixup=0.8, cutmix=1.0)
        embedded = module.net.embed_segments(batch["image"], batch["segments"])[0].detach()
        tokens = mixture(module, batch)[0]
        own, other = ((tokens == whole).all(-1) for whole in (embedded, embedded.flip(0)))
        kinds.append(bool((own | other).all()))
    assert 8 < sum(kinds) < 32


def test_a_batch_that_is_not_mixed_keeps_its_labels():
    module, batch = prepared(0)
    tokens, mask, targets = mixture(module, batch)
    embedded, _ = module.net.embed_segments(batch["image"], batch["segments"])
    assert torch.equal(tokens, embedded) and targets is batch["label"]
    assert torch.equal(mask, pixels_of(batch) > 0)


def test_an_odd_batch_cannot_be_mixed():
    module, batch = prepared(0, mixup=0.8)
    with pytest.raises(InputError, match="data.batch_size: mixup pairs images, and 7 on a device are odd"):
        module.logits({name: value[:7] for name, value in batch.items()}, None)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8}, {"cutmix": 1.0}], ids=str)
def test_micro_batches_have_the_gradient_of_the_whole(mixing):
    module, batch = prepared(3, label_smoothing=0.1, **mixing)
    batch["merged"] = torch.linspace(0, 0.7, 8)
    parts = [[0, 1, 6, 7], [2, 3, 4, 5]]  # partners together

    def gradients(which: list[list[int]]) -> list[torch.Tensor]:
        steps = [module.training_step({name: value[part] for name, value in batch.items()}, 0) for part in which]
        loss = torch.stack([step["loss"] for step in steps]).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(module.net.parameters()))]

    for whole, divided in zip(gradients([list(range(8))]), gradients(parts), strict=True):
        torch.testing.assert_close(divided, whole, atol=1e-6, rtol=1e-4)
    assert module.training_step(batch, 0)["merged"].item() == pytest.approx(35.0)


def test_every_parameter_receives_a_gradient():
    module, batch = prepared(1, mixup=0.8, cutmix=1.0)
    batch["merged"] = torch.zeros(8)
    module.training_step(batch, 0)["loss"].backward()
    assert [name for name, p in module.net.named_parameters() if p.grad is None or not p.grad.any()] == []


# Data


class Bright(Segmentation):
    """Three levels of the red channel: what a pixel's segment says of it can be checked in any process."""

    def cut(self, image: np.ndarray) -> np.ndarray:
        return (image[..., 0] * 255).round().astype(int) // 86


def data(source, training: bool, way: Segmentation | None = None, **options) -> SegmentedImages:
    made = SegmentedImages(way or Slic(2, 12, limit=15), source=source, batch_size=4, **options)
    made.trainer = SimpleNamespace(seed=3, training=training, predicting=bool(made.images),
                                   lightning_module=SimpleNamespace(data_class=SegmentedImages))  # fmt: skip
    for split in ["predict"] if made.images else ["train", "val"]:
        made.sets[split] = made.load(split)
    return made


def loaded(made: SegmentedImages, split: str, workers: int = 0, epoch: int = 1) -> dict[str, torch.Tensor]:
    which = [[Draw(epoch, index, index) for index in range(8)]]
    loader = DataLoader(made.sets[split], batch_sampler=which, collate_fn=lambda batch: batch, num_workers=workers)
    return made.on_after_batch_transfer(next(iter(loader)), 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """8 smooth PNGs of different sizes, in two classes."""
    for i in range(8):
        path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8))
        smooth.resize((30 + i, 24), Image.BICUBIC).save(path)
    (tmp_path / "pictures" / "val").symlink_to("train")
    return tmp_path / "pictures"


RECIPES = {
    "plain": Augment(),
    "crop": Augment(crop_scale=(0.3, 0.8), flip=0.5, interpolation="bicubic"),
    "rand_augment": Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic", rand_augment="rand-m9-mstd0.5"),
}


@pytest.mark.parametrize("source", ["memory", "files"])
@pytest.mark.parametrize("stage", [*RECIPES, "evaluation", "prediction"])
@pytest.mark.parametrize("workers", [0, 1])
def test_segments_are_those_of_the_image_that_comes_with_them(source, stage, workers, folder):
    images = Shapes(24, train=8) if source == "memory" else ImageFolder(str(folder))
    training = stage in RECIPES
    made = data(images, training, Bright(), image_size=(12, 16), mean=[0.0], std=[1.0],
                augment=RECIPES.get(stage, RECIPES["crop"]), eval_crop=0.875,
                images=str(folder / "train") if stage == "prediction" else None)  # fmt: skip
    split = "predict" if stage == "prediction" else "train" if training else "val"
    batch = loaded(made, split, workers)
    assert batch["segments"].dtype == torch.int64 and batch["segments"].shape == (8, 12, 16)
    assert batch["image"].shape == (8, 3, 12, 16) and batch["image"].dtype == torch.float32
    for image, segments in zip(batch["image"], batch["segments"], strict=True):
        levels = ((image[0] * 255).round().long() // 86).flatten().tolist()
        names: dict[int, int] = {}
        assert segments.flatten().tolist() == [names.setdefault(level, len(names)) for level in levels]
    assert batch["segments"].amax((1, 2)).max() == 2 and batch["merged"].tolist() == [0.0] * 8


@pytest.mark.parametrize("stage", ["crop", "rand_augment"])
def test_augmentation_changes_what_is_segmented(stage):
    made = data(Shapes(24, train=8), True, image_size=16, augment=RECIPES[stage])
    first, second = loaded(made, "train"), loaded(made, "train", epoch=2)
    assert ((first["segments"] != second["segments"]).flatten(1).any(1)).all()


@pytest.mark.parametrize("source", ["memory", "files"])
def test_workers_change_nothing(source, folder):
    images = Shapes(24, train=8) if source == "memory" else ImageFolder(str(folder))
    made = data(images, True, Slic(2, 20, limit=9), image_size=16, augment=RECIPES["crop"])
    one, other = loaded(made, "train"), loaded(made, "train", workers=1)
    assert one.keys() == other.keys() and one["merged"].any()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_slic_is_that_of_the_image(folder):
    made = data(ImageFolder(str(folder)), False, Slic(3, 12), image_size=(24, 30), mean=[0.0], std=[1.0])
    batch = loaded(made, "val")
    with Image.open(folder / "val" / "a" / "0.png") as picture:
        theirs = slic(np.array(picture), n_segments=12, max_num_iter=3, start_label=0)
    pairs = {*zip(theirs.ravel().tolist(), batch["segments"][0].flatten().tolist(), strict=True)}
    assert len(pairs) == len(np.unique(theirs)) == int(batch["segments"][0].max()) + 1  # one name for each


@pytest.mark.parametrize("augment", [{"jitter": (0.4, 0.4, 0.4, 0.1)}, {"jitter": (0.0, 0.0, 0.0, 0.1)},
                                     {"grayscale": 0.2}], ids=str)  # fmt: skip
def test_colour_that_changes_after_the_cut_is_refused(augment):
    with pytest.raises(InputError, match="data.augment: jitter and grayscale.*after they were segmented"):
        data(Shapes(24, train=8), True, image_size=16, augment=Augment(**augment))


# Runs


SEGMENTS = ["--model", "locality_ablation.SegmentClassification", "--data", "locality_ablation.SegmentedImages",
            "--data.segmentation", "locality_ablation.Slic", "--data.segmentation.iterations", "3",
            "--data.segmentation.segments", "12", "--data.segmentation.limit", "8", "--trainer.max_epochs", "1",
            "--trainer.log_every_n_steps", "1"]  # fmt: skip


@pytest.fixture
def segmented(command: Callable, tmp_path: Path) -> Callable[..., Path]:
    def run(subcommand: str, name: str, *args) -> Path:
        arguments = ["--run_name", name, *SEGMENTS, *args]
        outcome = command(subcommand, *arguments, study="locality_ablation", config=CONFIG)
        assert outcome.code == 0, outcome.err
        return tmp_path / "runs" / "locality_ablation" / name

    return run


def shares(split: str) -> list[float]:
    """The share of each image's pixels that leave their segment for the limit of 8, in percent."""
    way = Slic(3, 12, limit=8)
    return [100 * way(image).merged for image in Digits().read(Path(), split).images]


def test_a_run_logs_what_was_merged_and_every_stage_works(segmented, scalars, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "one.png")
    options = ["--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.optim.ema", "0.9"]
    folder = segmented("fit", "a", *options)
    curves = scalars(folder)
    assert [step for step, _ in curves["train/merged"]] == list(range(1, 10))
    expected = {split: shares(split) for split in ("train", "val", "test")}
    assert min(expected["val"]) < max(expected["val"])
    mean = sum(expected["train"]) / len(expected["train"])
    assert sum(value for _, value in curves["train/merged"]) / 9 == pytest.approx(mean, abs=1)  # but for the rest
    for _, value in curves["train/merged"]:  # 128 images
        assert value == pytest.approx(mean, abs=5 * np.std(expected["train"]) / math.sqrt(128))
    for tag in ("val/merged", "val_raw/merged"):
        assert curves[tag][-1][1] == pytest.approx(sum(expected["val"]) / 300, rel=1e-5)

    segmented("test", "a", *options)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["test/merged"] == pytest.approx(sum(expected["test"]) / 300, rel=1e-5)
    segmented("predict", "a", *options, "--data.images", tmp_path)
    with open(folder / "predictions.csv") as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == ["one.png"]
    segmented("check", "a", *options)


def test_a_validation_is_that_of_the_weights_on_segments(segmented):
    """From the checkpoint, by a net and segments that are put together here."""
    folder = segmented("fit", "a")
    weights = read(folder / "checkpoints" / "last.ckpt")["state_dict"]
    model = SegmentTransformer(8, image_size=8, patch_size=4, channels=1, classes=10, width=16, depth=1, heads=2).eval()
    model.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    images, labels = Digits().read(Path(), "val")
    segments = torch.stack([Slic(3, 12, limit=8)(image).labels for image in images]).long()
    with torch.no_grad():
        logits = model(images / 255 * 2 - 1, segments)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert metrics["val/acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_workers_do_not_change_a_run(segmented):
    weights = [read(segmented("fit", name, *options) / "checkpoints" / "last.ckpt")["state_dict"]
               for name, options in (("a", []), ("b", ["--data.workers", "1"]))]  # fmt: skip
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("options, message", [
    (["--model.pool", "avg"], "model.pool='avg'"),
    (["--data.segmentation.limit", "256"], "data.segmentation.limit: 256"),
    (["--model.probe", "true"], "model.probe: true"), (["--data.segmentation.iterations", "0"], "0 iterations"),
])  # fmt: skip
def test_what_segments_cannot_do_is_refused(command, options, message):
    outcome = command("fit", *SEGMENTS, *options, study="locality_ablation", config=CONFIG)
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err


def test_images_without_segments_are_refused(command):
    arguments = ["--model", "locality_ablation.SegmentClassification"]
    outcome = command("fit", *arguments, study="locality_ablation", config=CONFIG)
    assert outcome.code == 2 and "takes SegmentedImages" in outcome.err
