"""Dictionary tokens: the lookup, the intensities it is made by in every stage, and mixtures of what was looked up."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from common.data import Augment, Digits, ImageData, ImageFolder, Shapes
from common.data.loader import Draw
from common.errors import InputError
from common.model.flops import forward_flops
from common.training.checkpoints import read
from common.training.optim import Recipe, parameter_groups
from locality_ablation.dictionary import DictionaryClassification, DictionaryTokens, DictionaryTransformer

CONFIG = Path(__file__).parents[2] / "locality_ablation" / "configs" / "digits.yaml"
DICTIONARY = ["--model", "locality_ablation.DictionaryClassification", "--model.patch_size", "1"]
SCALES = [((0.5,), (0.5,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,), (1.0,)), ((0.1307,), (0.3081,)),
          ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), ((0.9,), (0.01,)), ((0.0,), (3.0,))]  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def net(**options) -> DictionaryTransformer:
    torch.manual_seed(0)
    options = {"image_size": (4, 6), "patch_size": 1, "classes": 3, "width": 8, "depth": 1, "heads": 2, **options}
    return DictionaryTransformer(**options).eval()


# Tokens


@pytest.mark.parametrize("channels, width", [(3, 768), (3, 24), (1, 256), (1, 16)])
def test_the_lookup_equals_one_by_hand(channels, width):
    tokens = DictionaryTokens(channels, width)
    images = noise(2, channels, 3, 5)
    images[0, 0, 0, 0], images[0, -1, 0, 1] = 0, 255
    found = tokens(images)
    assert found.shape == (2, 15, width)
    for b in range(2):
        for number in range(15):
            y, x = divmod(number, 5)
            entries = [tokens.tables.weight[256 * c + int(images[b, c, y, x])] for c in range(channels)]
            expected = torch.cat(entries)
            if 256 * channels != width:
                expected = tokens.proj.weight @ expected + tokens.proj.bias
            torch.testing.assert_close(found[b, number], expected)


def test_three_channels_at_the_width_of_a_base_need_no_projection():
    parameters = {name: p.numel() for name, p in DictionaryTokens(3, 768).named_parameters()}
    assert parameters == {"tables.weight": 196_608}
    assert sum(p.numel() for p in DictionaryTokens(3, 192).parameters()) == 196_608 + 768 * 192 + 192
    assert sum(p.numel() for p in DictionaryTokens(1, 256).parameters()) == 65_536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_what_is_not_uint8_is_refused(dtype):
    with pytest.raises(InputError, match=f"uint8.*{dtype}"):
        DictionaryTokens(3, 16)(torch.zeros(1, 3, 2, 2).to(dtype))


@pytest.mark.parametrize("patch_size", [2, 4])
def test_patches_are_refused(patch_size):
    with pytest.raises(InputError, match=f"model.patch_size={patch_size}.*single pixels; set 1"):
        net(image_size=8, patch_size=patch_size)


def test_the_transformer_adds_positions_to_the_tokens():
    model, images = net(), noise(2, 3, 4, 6)
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    assert torch.equal(model.embed(images)[:, 1:], tokens)
    assert model(images).shape == (2, 3)


def test_the_tables_do_not_decay():
    groups = parameter_groups(net(), Recipe(lr=0.1, weight_decay=0.3), 0.1)
    tables = [group for group in groups for p in group["params"] if p.shape == (768, 256)]
    assert [group["weight_decay"] for group in tables] == [0.0]
    assert {0.0, 0.3} == {group["weight_decay"] for group in groups}


@pytest.mark.parametrize("options", [
    {"channels": 3, "width": 768, "heads": 12}, {"channels": 3, "width": 24}, {"channels": 1, "width": 256},
    {"channels": 1, "width": 16, "class_token": False, "pool": "avg"},
])  # fmt: skip
def test_flops_equal_torchs_counter(options):
    model = net(depth=2, **options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(noise(3, model.channels, 4, 6))
    assert counter.get_total_flops() == 3 * forward_flops(model)


# Intensities


def data(source, training: bool, images: str | None = None, **options) -> ImageData:
    """As a Trainer would have it, in training or in an evaluation."""
    made = ImageData(source, batch_size=4, images=images, **options)
    made.trainer = SimpleNamespace(seed=3, training=training, predicting=images is not None,
                                   strategy=SimpleNamespace(root_device=torch.device("cpu")))
    for split in ["predict"] if images else ["train", "val"]:
        made.sets[split] = made.load(split)
    return made


def module_of(made: ImageData, step: int = 0, **options) -> DictionaryClassification:
    module = DictionaryClassification(optim=Recipe(lr=0.1), patch_size=1, size="nano", depth=1, **options)
    module._trainer = SimpleNamespace(datamodule=made, seed=0, global_step=step)
    return module


def loaded(made: ImageData, split: str, images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's images as they leave the loader, uint8, and as the module gets them."""
    which = [[Draw(1, index, index) for index in range(images)]]
    batch = next(iter(DataLoader(made.sets[split], batch_sampler=which, collate_fn=lambda batch: batch)))
    return batch["image"], made.on_after_batch_transfer(batch, 0)["image"]


@pytest.mark.parametrize("mean, std", SCALES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_intensity_is_recovered(mean, std, channels):
    mean, std = mean[:channels], std[:channels]
    levels = torch.arange(256, dtype=torch.uint8).expand(1, channels, 1, 256)
    made = data(Digits() if channels == 1 else Shapes(8, train=4), False, image_size=(1, 256), mean=mean, std=std)
    images = made.on_after_batch_transfer({"image": levels}, 0)["image"]
    assert images.dtype == torch.float32
    assert torch.equal(module_of(made).transform(images), levels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mean, std", SCALES, ids=str)
def test_every_intensity_is_recovered_on_a_gpu_that_rounds_products(mean, std):
    levels = torch.arange(256, dtype=torch.uint8).expand(64, 3, 1, 256).cuda()
    made = data(Shapes(8, train=4), False, image_size=(1, 256), mean=mean, std=std)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # the command's, under which normalising multiplies in TF32
    try:
        images = made.on_after_batch_transfer({"image": levels}, 0)["image"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(module_of(made).transform(images), levels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """8 PNGs of noise, of different sizes, in two classes."""
    for i in range(8):
        path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)).save(path)
    (tmp_path / "pictures" / "val").symlink_to("train")
    return tmp_path / "pictures"


RECIPES = {
    "plain": Augment(),
    "crop": Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic"),
    "rand_augment": Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic", rand_augment="rand-m9-mstd0.5"),
    "colour": Augment(crop_scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3),
}


@pytest.mark.parametrize("source", ["memory", "files"])
@pytest.mark.parametrize("stage", [*RECIPES, "evaluation", "prediction"])
def test_the_intensities_are_those_before_normalisation(source, stage, folder):
    """Exactly those of the loader; rounded ones where the device has cropped, resized or jittered after that, which a
    mean of 0 and a deviation of 1 show.
    """
    images = Shapes(24, train=8) if source == "memory" else ImageFolder(str(folder))
    training = stage in RECIPES
    options = {"image_size": (12, 16), "augment": RECIPES.get(stage, RECIPES["plain"]),
               "images": str(folder / "train") if stage == "prediction" else None}  # fmt: skip
    split = "predict" if stage == "prediction" else "train" if training else "val"
    _, before = loaded(data(images, training, mean=[0.0], std=[1.0], **options), split)
    assert before.min() >= 0 and before.max() <= 1
    # A value that lies between two levels within the accuracy of float32 may fall on either.
    torn = ((before * 255) % 1 - 0.5).abs() < 1e-3
    for mean, std in SCALES:
        made = data(images, training, mean=mean, std=std, **options)
        raw, normalised = loaded(made, split)
        found = module_of(made).transform(normalised)
        if stage != "colour" and (source == "files" or stage in ("rand_augment", "prediction")):
            assert torch.equal(found, raw)
        else:
            assert torch.equal(torch.where(torn, 0, found), torch.where(torn, 0, (before * 255).round().byte()))
        assert found.dtype == torch.uint8 and found.unique().numel() > 100
    assert torn.float().mean() < 0.01


def test_files_come_back_as_they_lie_on_the_disk(folder):
    made = data(ImageFolder(str(folder)), False, image_size=(20, 24), mean=SCALES[1][0], std=SCALES[1][1])
    found = module_of(made).transform(loaded(made, "val", 1)[1])
    with Image.open(folder / "val" / "a" / "0.png") as picture:
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), np.array(picture))


# Mixtures


def prepared(step: int, **options) -> tuple[DictionaryClassification, torch.Tensor, torch.Tensor]:
    """A module at an optimiser step, uint8 images and their labels, which differ within a pair."""
    made = SimpleNamespace(image_size=(6, 8), channels=3, class_names=list("abcdefgh"), mean=(0.5,) * 3, std=(0.5,) * 3)
    module = module_of(made, step, heads=2, width=8, **options)
    torch.manual_seed(1)
    module.net = module.build(made)
    return module, noise(8, 3, 6, 8), torch.arange(8)


def own_share(targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Of each image's own label in its target, where the labels of pairs differ."""
    off = label_smoothing / targets.shape[1]
    return (targets.diagonal() - off) / (1 - label_smoothing)


def mixture(module: DictionaryClassification, images: torch.Tensor, labels: torch.Tensor):
    """What reaches the blocks, and the targets."""
    reached = []
    module.net.encode = lambda tokens, drops=None: reached.append(tokens) or tokens
    _, targets = module.logits({"image": images / 255 * 2 - 1, "label": labels}, None)
    return reached[0], targets


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("step", range(4))
def test_mixup_is_linear_in_the_embedded_tokens(step, class_token):
    options = {"class_token": class_token, "pool": "cls" if class_token else "avg"}
    module, images, labels = prepared(step, mixup=0.8, label_smoothing=0.1, **options)
    embedded = module.net.embed(images).detach().clone()
    tokens, targets = mixture(module, images, labels)
    share = own_share(targets, 0.1)
    assert share.std() < 1e-5 and 0 < share[0] < 1
    torch.testing.assert_close(tokens, share[0] * embedded + (1 - share[0]) * embedded.flip(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("step", range(6))
def test_cutmix_of_tokens_is_that_of_the_images(step):
    """Which pixels came from the partner is read off the tokens: a box, whose share is the targets'."""
    module, images, labels = prepared(step, cutmix=1.0, label_smoothing=0.1)
    embedded = module.net.embed(images).detach().clone()
    tokens, targets = mixture(module, images, labels)
    taken = (tokens != embedded).any(-1).any(0)[1:].view(6, 8)
    rows, columns = taken.any(1).nonzero()[:, 0], taken.any(0).nonzero()[:, 0]
    assert taken.sum() == len(rows) * len(columns)  # a box
    torch.testing.assert_close(own_share(targets, 0.1), (1 - taken.float().mean()).expand(8), atol=1e-5, rtol=0)
    cut = torch.where(taken, images.flip(0), images)
    torch.testing.assert_close(tokens, module.net.embed(cut), atol=1e-6, rtol=0)


def test_both_mixtures_take_turns():
    """And some of the boxes are neither empty nor all of the image."""
    kinds = set()
    for step in range(12):
        module, images, labels = prepared(step, mixup=0.8, cutmix=1.0)
        embedded = module.net.embed(images).detach().clone()
        tokens = mixture(module, images, labels)[0][:, 1:]
        own, other = (tokens == embedded[:, 1:]).all(-1), (tokens == embedded.flip(0)[:, 1:]).all(-1)
        kinds.add("cutmix" if (own | other).all() else "mixup")
        if (own | other).all() and own.any() and other.any():
            kinds.add("box")
    assert kinds == {"cutmix", "mixup", "box"}


def test_a_batch_that_is_not_mixed_is_looked_up_as_it_is():
    module, images, labels = prepared(0)
    tokens, targets = mixture(module, images, labels)
    assert torch.equal(tokens, module.net.embed(images)) and targets is labels


def test_every_parameter_receives_a_gradient_through_a_mixture():
    module, images, labels = prepared(1, mixup=0.8, cutmix=1.0)
    batch = {"image": images / 255 * 2 - 1, "label": labels}
    module.training_step(batch, 0).backward()
    assert [name for name, p in module.net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("width", [16, 768])
@pytest.mark.parametrize("position", ["learned", "none"])
def test_fixed_tables_allow_mixtures_too(width, position):
    module, images, labels = prepared(1, mixup=0.8, cutmix=1.0, trainable=False, position=position)
    module.net = net(image_size=(6, 8), classes=8, width=width, trainable=False, position=position)
    module.training_step({"image": images / 255 * 2 - 1, "label": labels}, 0).backward()
    assert module.net.patch_embed.tables.weight.grad is None and module.net.head.weight.grad.any()


# Runs


@pytest.fixture
def trained(command: Callable, tmp_path: Path) -> Callable[..., tuple[dict, Path]]:
    """The weights of a run, and its folder."""

    def run(name: str, *args) -> tuple[dict, Path]:
        options = ["--run_name", name, *DICTIONARY, "--trainer.max_epochs", "1", *args]
        outcome = command("fit", *options, study="locality_ablation", config=CONFIG)
        assert outcome.code == 0, outcome.err
        folder = tmp_path / "runs" / "locality_ablation" / name
        return read(folder / "checkpoints" / "last.ckpt")["state_dict"], folder

    return run


def test_training_leaves_fixed_tables_alone(trained, command, tmp_path):
    decay = ["--model.optim.weight_decay", "0.5"]
    start = trained("start", "--model.trainable", "false", "--model.optim.lr", "0", *decay)[0]
    fixed = trained("fixed", "--model.trainable", "false", *decay)[0]
    free = trained("free", *decay)[0]
    tables = "net.patch_embed.tables.weight"
    assert torch.equal(fixed[tables], start[tables]) and not torch.equal(free[tables], start[tables])
    assert not torch.equal(fixed["net.patch_embed.proj.weight"], start["net.patch_embed.proj.weight"])
    used = torch.unique(Digits().read(Path(), "train").images).tolist()
    unused = [level for level in range(256) if level not in used]
    assert torch.equal(free[tables][unused], start[tables][unused])  # nothing makes an entry fade


def test_every_stage_looks_up_the_intensities_of_the_files(trained, command, monkeypatch, tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(picture).save(tmp_path / "pictures" / "one.png")
    seen, forward = [], DictionaryTokens.forward

    def recorded(self, images: torch.Tensor) -> torch.Tensor:
        seen.append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(DictionaryTokens, "forward", recorded)
    _, folder = trained("a", "--model.optim.ema", "0.9")
    training, validation = torch.cat(seen[:9]), seen[9:]
    images = {split: Digits().read(Path(), split).images for split in ("train", "val", "test")}
    known = {image.numpy().tobytes() for image in images["train"]}
    assert len(training) == 9 * 128 and all(image.numpy().tobytes() in known for image in training)
    assert len(validation) == 4  # two batches, each by the average and by the weights
    assert all(torch.equal(torch.cat(validation[net::2]), images["val"]) for net in (0, 1))
    for stage, more, expected in [
        ("test", [], images["test"]),
        ("predict", ["--data.images", tmp_path / "pictures"], torch.from_numpy(picture)[None, None]),
    ]:
        seen.clear()
        options = ["--run_name", "a", *DICTIONARY, "--trainer.max_epochs", "1", "--model.optim.ema", "0.9", *more]
        assert command(stage, *options, study="locality_ablation", config=CONFIG).code == 0
        assert torch.equal(torch.cat(seen[:: 1 if stage == "predict" else 2]), expected)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert {"val/acc1", "val_raw/acc1", "test/acc1"} <= metrics.keys()


def test_check_knows_the_cost(command):
    outcome = command("check", *DICTIONARY, study="locality_ablation", config=CONFIG)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("options, message", [
    (["--model.patch_size", "2"], "model.patch_size=2"), (["--model.probe", "true"], "model.probe: true"),
])  # fmt: skip
def test_what_a_dictionary_cannot_do_is_refused(command, options, message):
    outcome = command("fit", *DICTIONARY, *options, study="locality_ablation", config=CONFIG)
    assert outcome.code == 2 and message in outcome.err
