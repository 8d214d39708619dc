"""The masked autoencoder against its published definition (He et al. 2022), computed anew image by image."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call

from common.errors import InputError
from common.training.optim import Recipe, parameter_groups
from mae import MaskedAutoencoder
from mae.model import random_masking

GRID = (4, 5)  # 20 tokens, of which 10, 5 and 1 stay visible at 0.5, 0.75 and 0.9: int(20 * (1 - 0.9)) is not 2
HEADS = (2, 3)  # of the encoder and the decoder
NET = {"width": 16, "depth": 2, "heads": HEADS[0], "decoder_width": 24, "decoder_depth": 3, "decoder_heads": HEADS[1]}


def net(patch_size: int = 2, channels: int = 3, **options) -> MaskedAutoencoder:
    """A small net; every parameter gets a value of its own, since zero biases would hide swapped or missing ones."""
    torch.manual_seed(1)
    height, width = GRID
    model = MaskedAutoencoder((height * patch_size, width * patch_size), patch_size, channels, **{**NET, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: MaskedAutoencoder, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, model.channels, *model.image_size, generator=generator)
    return images, torch.rand(batch, model.tokens, generator=generator)


# The published definition


def published(
    weights: dict[str, Tensor],
    images: Tensor,
    noise: Tensor,
    mask_ratio: float,
    heads: tuple[int, int] = HEADS,
    norm_pix_loss: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction (B, L, P * P * C) and mask (B, L), from weights in the layout of MAE's own release."""
    kernel = weights["patch_embed.proj.weight"]
    patch_size = kernel.shape[-1]
    tokens = F.conv2d(images, kernel, weights["patch_embed.proj.bias"], stride=patch_size).flatten(2).transpose(1, 2)
    tokens = tokens + weights["pos_embed"][:, 1:]
    order = np.argsort(noise.numpy(), axis=1, kind="stable")
    kept = order[:, : int(noise.shape[1] * (1 - mask_ratio))]
    visible = torch.stack([image[ids] for image, ids in zip(tokens, kept, strict=True)])
    first = (weights["cls_token"] + weights["pos_embed"][:, :1]).repeat(len(images), 1, 1)
    x = through_blocks(torch.cat([first, visible], dim=1), weights, "blocks", heads[0])
    x = linear(norm(x, weights, "norm"), weights, "decoder_embed")
    places = [torch.cat([weights["mask_token"][0]] * noise.shape[1]) for _ in images]
    for image, ids, place in zip(x, kept, places, strict=True):
        place[ids] = image[1:]
    x = torch.cat([x[:, :1], torch.stack(places)], dim=1) + weights["decoder_pos_embed"]
    x = through_blocks(x, weights, "decoder_blocks", heads[1])
    prediction = linear(norm(x, weights, "decoder_norm"), weights, "decoder_pred")[:, 1:]

    mask = torch.ones_like(noise)
    for row, ids in zip(mask, kept, strict=True):
        row[ids] = 0
    errors = [((guess[row == 1] - target(image, patch_size, norm_pix_loss)[row == 1]) ** 2).mean(dim=1)
              for guess, row, image in zip(prediction, mask, images, strict=True)]  # fmt: skip
    return torch.cat(errors).mean(), prediction, mask


def through_blocks(x: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    depth = len({key.split(".")[1] for key in weights if key.startswith(f"{name}.")})
    options = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6),
               "qk_norm": f"{name}.0.attn.q_norm.weight" in weights}  # fmt: skip
    for index in range(depth):
        start = f"{name}.{index}."
        own = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        x = functional_call(Block(x.shape[-1], heads, **options), own, x, strict=True)
    return x


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def target(image: Tensor, patch_size: int, norm_pix_loss: str) -> Tensor:
    """The vectors (L, P * P * C) of one image (C, H, W): patches row by row, inside one row, column, channel."""
    values, (channels, height, width) = image.tolist(), image.shape
    vectors = torch.tensor([
        [values[c][top + row][left + column]
         for row in range(patch_size) for column in range(patch_size) for c in range(channels)]
        for top in range(0, height, patch_size) for left in range(0, width, patch_size)
    ])  # fmt: skip
    if norm_pix_loss == "none":
        return vectors
    together = vectors if norm_pix_loss == "patch" else vectors.reshape(1, -1)
    mean = together.mean(dim=1, keepdim=True)
    variance = ((together - mean) ** 2).sum(dim=1, keepdim=True) / (together.shape[1] - 1)
    return (vectors - mean) / (variance + 1e-6) ** 0.5


def published_table(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the column in the first half of the channels and of the row in the second; zeros first."""
    rows = [[0.0] * width]
    for row in range(grid[0]):
        for column in range(grid[1]):
            halves = []
            for place in (column, row):
                angles = [place / 10000 ** (k / (width // 4)) for k in range(width // 4)]
                halves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(halves)
    return torch.tensor(rows)[None]


def published_layout(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Copies of the weights, the patch projection as a convolution and fixed tables computed anew."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    kernel = weights["patch_embed.proj.weight"]
    kernel = kernel.reshape(len(kernel), model.patch_size, model.patch_size, model.channels).permute(0, 3, 1, 2)
    weights["patch_embed.proj.weight"] = kernel.contiguous()
    if model.position == "sincos":
        weights["pos_embed"] = published_table(model.grid, model.width)
        weights["decoder_pos_embed"] = published_table(model.grid, model.decoder_width)
    return weights


# Equality


@pytest.mark.parametrize("mask_ratio, visible", [(0.5, 10), (0.75, 5), (0.9, 1)])
@pytest.mark.parametrize("position", ["learned", "sincos"])
@pytest.mark.parametrize("patch_size, channels, norm_pix_loss", [
    (patch_size, channels, norm_pix_loss)
    for patch_size in (1, 2, 4) for channels in (1, 3) for norm_pix_loss in ("none", "patch", "image")
    if (patch_size, channels, norm_pix_loss) != (1, 1, "patch")
])  # fmt: skip
def test_loss_prediction_and_mask_are_the_published_ones(
    patch_size, channels, norm_pix_loss, position, mask_ratio, visible
):
    model = net(patch_size, channels, position=position, norm_pix_loss=norm_pix_loss)
    images, noise = inputs(model)
    images[1] *= 1e-3  # almost flat: the epsilon decides
    with torch.no_grad():
        loss, prediction, mask = model(images, noise, mask_ratio)
        expected = published(published_layout(model), images, noise, mask_ratio, norm_pix_loss=norm_pix_loss)
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction, expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(mask, expected[2]) and mask.sum(dim=1).tolist() == [20 - visible] * 2
    assert prediction.std() > 0.1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_receives_the_published_gradient(qk_norm):
    model = net(norm_pix_loss="patch", qk_norm=qk_norm)
    weights = {name: value.requires_grad_() for name, value in published_layout(model).items()}
    images, noise = inputs(model)
    model(images, noise, 0.75)[0].backward()
    published(weights, images, noise, 0.75, norm_pix_loss="patch")[0].backward()
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all((f"{name}.0.attn.q_norm.weight" in weights) == qk_norm for name in ("blocks", "decoder_blocks"))
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if name == "patch_embed.proj.weight":
            expected = expected.permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)
        # Softmax does not feel what all keys of a head have in common.
        assert (parameter.grad.abs().max() > 1e-5) != name.endswith("k_norm.bias"), name


@pytest.mark.parametrize("patch_size", [1, 2])
def test_fixed_tables_have_the_column_first(patch_size):
    model = net(patch_size, position="sincos")
    # The twelfth token lies in row 2 and column 1; frequencies are 10000^(-k / 4) at width 16.
    places = [1, 0.1, 0.01, 0.001], [2, 0.2, 0.02, 0.002]
    by_hand = [function(angle) for angles in places for function in (math.sin, math.cos) for angle in angles]
    torch.testing.assert_close(model.pos_embed[0, 12], torch.tensor(by_hand), atol=1e-6, rtol=0)
    for table, width in [(model.pos_embed, 16), (model.decoder_pos_embed, 24)]:
        torch.testing.assert_close(table, published_table(GRID, width), atol=1e-6, rtol=0)
        assert not table[0, 0].any()
    assert not {"pos_embed", "decoder_pos_embed"} & dict(model.named_parameters()).keys()


def test_initial_weights_have_the_published_distribution():
    torch.manual_seed(0)
    # Xavier's uniform for every linear map, the patch projection as one too; tokens and tables of deviation 0.02.
    model = MaskedAutoencoder((32, 48), 2, width=192, depth=1, heads=3, decoder_width=256, decoder_depth=1)
    for name, parameter in model.named_parameters():
        error = 5 / parameter.numel() ** 0.5  # five standard errors
        if name in ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed"):
            assert parameter.std().item() == pytest.approx(0.02, rel=error), name
        elif parameter.ndim == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=error), name
        elif name != "patch_embed.proj.bias":  # MAE's is a convolution's, which keeps torch's default
            expected = 1.0 if name.endswith("weight") else 0.0  # of a norm; all biases
            assert (parameter == expected).all(), name


# What is masked, and what that hides


def test_equal_draws_keep_their_order():
    noise = torch.tensor([[0.5, 0.1, 0.5, 0.1, 0.9, 0.5], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    ids_keep, ids_restore, mask = random_masking(noise, 0.5)
    assert ids_keep.tolist() == [[1, 3, 0], [5, 4, 3]]
    assert ids_restore.tolist() == [[2, 0, 3, 1, 5, 4], [5, 4, 3, 2, 1, 0]]
    assert mask.tolist() == [[0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0]]
    many = random_masking(torch.zeros(1, 1024), 0.75)[0]  # where torch's sort would not be stable by itself
    assert many.tolist() == [list(range(256))]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_encoder_sees_the_visible_tokens_alone(patch_size):
    model = net(patch_size)
    images, noise = inputs(model)
    latent, mask, _ = model.forward_encoder(images, noise, 0.75)
    assert latent.shape == (2, 1 + 5, 16)
    pixels = mask.view(2, *GRID).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    others = torch.where(pixels[:, None] == 1, torch.randn_like(images), images)
    assert torch.equal(model.forward_encoder(others, noise, 0.75)[0], latent)
    for row, column in (pixels[0] == 0).nonzero().tolist():
        changed = images.clone()
        changed[0, 0, row, column] += 1
        found = model.forward_encoder(changed, noise, 0.75)[0]
        assert (found[0] != latent[0]).any(dim=-1).all(), "every token attends to every visible one"
        assert torch.equal(found[1], latent[1])


@pytest.mark.parametrize("norm_pix_loss", ["none", "patch", "image"])
def test_the_loss_is_of_the_masked_tokens_alone(norm_pix_loss):
    model = net(norm_pix_loss=norm_pix_loss)
    images, noise = inputs(model)
    mask = random_masking(noise, 0.75)[2]
    prediction = torch.randn(2, 20, 12, requires_grad=True)
    model.forward_loss(images, prediction, mask).backward()
    targets = torch.stack([target(image, 2, norm_pix_loss) for image in images])
    expected = 2 * (prediction.detach() - targets) / (2 * 15 * 12)  # 15 masked tokens an image, 12 values each
    torch.testing.assert_close(prediction.grad[mask == 1], expected[mask == 1], atol=1e-6, rtol=1e-5)
    assert not prediction.grad[mask == 0].any()


@pytest.mark.parametrize("norm_pix_loss", ["none", "patch", "image"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_reconstruct_inverts_the_normalisation(patch_size, norm_pix_loss):
    model = net(patch_size, norm_pix_loss=norm_pix_loss)
    images = 3 + 2 * inputs(model)[0]
    targets = torch.stack([target(image, patch_size, norm_pix_loss) for image in images])
    torch.testing.assert_close(model.reconstruct(images, targets), images, atol=1e-5, rtol=1e-5)
    assert model.forward_loss(images, targets, torch.ones(2, 20)) < 1e-10


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_loss_of_bf16_is_fp32_and_close(precision):
    model = net(norm_pix_loss="image")
    images, noise = inputs(model, batch=8)
    with torch.no_grad():
        expected = model(images, noise, 0.75)[0]
        if precision == "bf16-true":
            model, images = model.bfloat16(), images.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss, prediction, _ = model(images, noise, 0.75)
    assert prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02) and loss != expected


# What is refused, and how it is optimised


@pytest.mark.parametrize("options, message", [
    ({"decoder_heads": 5}, r"model.decoder_heads=5 does not divide decoder_width=24; nearest that do: 4 and 6"),
    ({"heads": 3}, r"model.heads=3 does not divide width=16; nearest that do: 2 and 4"),
    ({"position": "none"}, r"model.position=none would make all masked tokens the same; choose learned or sincos"),
    ({"image_size": (8, 9)}, r"model.patch_size=2 does not divide image_size=8x9; nearest that do: 1"),
    ({"decoder_depth": 0}, r"model.decoder_depth=0 must be at least 1"),
    ({"decoder_width": 0}, r"model.decoder_width=0 must be at least 1"),
    ({"patch_size": 1, "channels": 1, "norm_pix_loss": "patch"},
     r"norm_pix_loss=patch: a patch of one pixel and one channel has no variance; choose none or image"),
])  # fmt: skip
def test_options_that_do_not_fit_are_named_with_what_would(options, message):
    with pytest.raises(InputError, match=message):
        MaskedAutoencoder(**{"image_size": (8, 10), "patch_size": 2, **NET, **options})


def test_layer_wise_decay_leaves_the_decoder_at_the_full_rate():
    model = net(qk_norm=True)
    groups = parameter_groups(model, Recipe(lr=1.0, weight_decay=0.3, layer_decay=0.85), lr=1.0)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    layers_below = {"patch_embed": 3, "cls_token": 3, "pos_embed": 3, "blocks.0": 2, "blocks.1": 1, "norm": 0,
                    "mask_token": 0, "decoder_embed": 0, "decoder_pos_embed": 0, "decoder_blocks": 0,
                    "decoder_norm": 0, "decoder_pred": 0}  # fmt: skip
    for name, parameter in model.named_parameters():
        key = next(key for key in layers_below if f"{name}.".startswith(f"{key}."))
        assert rates[id(parameter)] == pytest.approx(0.85 ** layers_below[key]), name


def test_tokens_tables_norms_and_biases_are_exempt_from_weight_decay():
    model = net(qk_norm=True)
    groups = parameter_groups(model, Recipe(lr=1.0, weight_decay=0.3), lr=1.0)
    exempt = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        of_linear_map = name.endswith("weight") and "norm" not in name
        assert (id(parameter) in exempt) != of_linear_map, name
