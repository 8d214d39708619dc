"""The backbone against timm's VisionTransformer on copied weights, in fp32."""

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from common.model import VisionTransformer

WIDTHS = {192: 3, 384: 6, 768: 12, 1024: 16}  # width -> heads
FULL = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
SHAPES = {1: (4, 6), 2: (8, 8), 16: (32, 48)}  # patch -> image: non-square, square, non-square


def reference(image_size, patch_size, width, depth, heads, class_token=True, pool="cls", classes=10, **options):
    return timm_vit.VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        class_token=class_token,
        global_pool="token" if pool == "cls" else "avg",
        **options,
    ).eval()


def scramble(model: nn.Module) -> None:
    """Give every parameter a value of its own: zero biases and unit norms would hide swapped or missing ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def assert_equal_logits(theirs: nn.Module, ours: VisionTransformer) -> None:
    ours.load_state_dict(theirs.state_dict())  # strict: the same names, nothing missing, nothing left over
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 3, *ours.image_size)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours.eval()(images), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("class_token, pool", [(True, "cls"), (True, "avg"), (False, "avg")])
@pytest.mark.parametrize("patch_size", [1, 2, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_two_blocks_at_every_width(width, patch_size, class_token, pool):
    torch.manual_seed(width + patch_size)
    heads, image_size = WIDTHS[width], SHAPES[patch_size]
    theirs = reference(image_size, patch_size, width, 2, heads, class_token, pool)
    scramble(theirs)
    ours = VisionTransformer(
        image_size, patch_size, 3, 10, width=width, depth=2, heads=heads, class_token=class_token, pool=pool
    )
    assert_equal_logits(theirs, ours)


@pytest.mark.parametrize("image_size", [(8, 8), (6, 4)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_both_patches_square_and_not(image_size, patch_size):
    torch.manual_seed(0)
    theirs = reference(image_size, patch_size, 192, 2, 3)
    scramble(theirs)
    assert_equal_logits(theirs, VisionTransformer(image_size, patch_size, classes=10, depth=2))


@pytest.mark.parametrize("size", FULL)
def test_each_size_at_full_depth(size):
    torch.manual_seed(0)
    theirs = reference(4, 1, *FULL[size])
    # timm's own initial values here: moved weights through 24 blocks amplify fp32 rounding beyond the tolerance.
    assert_equal_logits(theirs, VisionTransformer(4, 1, classes=10, size=size))


def test_qk_norm():
    torch.manual_seed(0)
    theirs = reference(8, 2, 192, 2, 3, qk_norm=True)
    scramble(theirs)
    assert_equal_logits(theirs, VisionTransformer(8, 2, classes=10, depth=2, qk_norm=True))


def test_no_position_and_no_head():
    torch.manual_seed(0)
    theirs = reference(8, 2, 192, 2, 3, pos_embed="none", classes=0)
    scramble(theirs)
    assert_equal_logits(theirs, VisionTransformer(8, 2, classes=0, depth=2, position="none"))


def test_gradients_equal_timm():
    torch.manual_seed(0)
    theirs = reference(6, 1, 192, 2, 3)
    scramble(theirs)
    ours = VisionTransformer(6, 1, classes=10, depth=2)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 6, 6)
    for model in (theirs, ours):
        nn.functional.cross_entropy(model(images), torch.tensor([1, 7])).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].reshape_as(parameter), atol=1e-5, rtol=1e-4, msg=name)


def test_initial_values_have_the_distribution_of_timm():
    torch.manual_seed(0)
    theirs, ours = reference(8, 1, 192, 1, 3, classes=100), VisionTransformer(8, 1, classes=100, depth=1)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other, error = expected[name], 5 / parameter.numel() ** 0.5  # five standard errors
        spread = other.std(correction=0).item()
        assert parameter.std(correction=0).item() == pytest.approx(spread, rel=error), name
        assert parameter.mean().item() == pytest.approx(other.mean().item(), abs=1.5 * error * spread), name


@pytest.mark.parametrize("image_size, patch_size", [(32, 1), (32, 2), (28, 1), (224, 16)])
@pytest.mark.parametrize("size", FULL)
def test_parameter_counts_equal_timm(size, image_size, patch_size):
    with torch.device("meta"):
        theirs = reference(image_size, patch_size, *FULL[size], classes=1000)
        ours = VisionTransformer(image_size, patch_size, size=size)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
