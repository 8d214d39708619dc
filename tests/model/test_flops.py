"""Formulas against torch's own counter, measured activations, and published numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.benchmark.memory import kept_bytes
from common.model import VisionTransformer
from common.model.flops import activation_bytes, forward_flops, parameters, training_flops


def meta(**options) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8, "patch_size": 1, "classes": 10, "size": "nano"},
        {"image_size": (8, 12), "patch_size": 2, "classes": 7, "size": "tiny", "class_token": False, "pool": "avg"},
        {"image_size": 32, "patch_size": 16, "channels": 1, "classes": 0, "size": "small"},
    ],
)
def test_forward_flops_equal_torchs_counter(options):
    model = VisionTransformer(**options)
    # The counter knows batched matrix products; the fused CPU kernel it would pass over.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(3, model.channels, *model.image_size))
    assert counter.get_total_flops() == 3 * forward_flops(model)
    assert training_flops(model) == 3 * forward_flops(model)


def test_published_flops():
    # "An Image is Worth 16x16 Words" and DeiT: 17.6 G multiply-adds for ViT-B/16 at 224.
    assert forward_flops(meta(image_size=224, size="base")) / 2 == pytest.approx(17.6e9, rel=0.01)
    assert forward_flops(meta(image_size=32, patch_size=1, classes=100, class_token=False, pool="avg")) == 20536530432


@pytest.mark.parametrize(
    "size, counts",
    [
        ("tiny", (5.41, 5.56, 5.57, 5.68)),
        ("small", (21.44, 21.73, 21.76, 21.98)),
        ("base", (85.34, 85.92, 85.99, 86.43)),
        ("large", (302.69, 303.47, 303.55, 304.15)),
    ],
)
def test_parameter_counts(size, counts):
    """Millions at CIFAR-100 /2 and /1, ImageNet 28 /2 and /1; and the closed form of the blocks."""
    inputs = [(32, 2, 100), (32, 1, 100), (28, 2, 1000), (28, 1, 1000)]
    for (image_size, patch_size, classes), millions in zip(inputs, counts, strict=True):
        model = meta(image_size=image_size, patch_size=patch_size, classes=classes, size=size)
        d = model.width
        expected = model.depth * (12 * d**2 + 13 * d)
        expected += (3 * patch_size**2 + 1) * d + (model.tokens + 2) * d + 2 * d + (d + 1) * classes
        assert parameters(model) == expected
        assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.0051)


def saved_bytes(model: VisionTransformer, batch: int, precision: str) -> int:
    model = model.double() if precision == "64-true" else model
    images = torch.randn(batch, 3, *model.image_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return kept_bytes(lambda: model(images), model.parameters())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
def test_activation_bytes_equal_what_autograd_keeps(precision, qk_norm):
    options = {"image_size": 8, "patch_size": 1, "classes": 10, "width": 128, "heads": 2, "qk_norm": qk_norm}
    # The difference of two depths leaves the blocks alone, without embedding and head.
    shallow, deep = VisionTransformer(depth=1, **options), VisionTransformer(depth=3, **options)
    measured = saved_bytes(deep, 8, precision) - saved_bytes(shallow, 8, precision)
    formula = activation_bytes(deep, 8, precision) - activation_bytes(shallow, 8, precision)
    assert formula == pytest.approx(measured, rel=0.04)


def test_checkpointed_blocks_keep_their_input():
    plain = activation_bytes(meta(image_size=32, patch_size=1, size="tiny"), 4)
    vectors = 4 * 1025 * 192 * 4
    assert plain == 12 * 16 * vectors
    half = activation_bytes(meta(image_size=32, patch_size=1, size="tiny", checkpoint_blocks=6), 4)
    assert half == (6 * 16 + 6) * vectors
    everything = activation_bytes(meta(image_size=32, patch_size=1, size="tiny", checkpoint_blocks=12), 4)
    assert everything == (16 + 12) * vectors
