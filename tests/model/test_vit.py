"""What the backbone promises beyond equality with timm."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.model import Block, VisionTransformer
from common.model.transformer import drop_path_rates, keep_scale


def lively(**options) -> VisionTransformer:
    """A small model whose position table and weights are large enough to show in the logits."""
    torch.manual_seed(0)
    model = VisionTransformer(**{"image_size": 6, "patch_size": 1, "classes": 5, "size": "nano", **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def permute_pixels(images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return images.flatten(2)[:, :, order].reshape(images.shape)


# An image is a set of pixels


@pytest.mark.parametrize("class_token, pool", [(True, "cls"), (False, "avg")])
def test_without_positions_the_order_of_patches_does_not_matter(class_token, pool):
    model = lively(position="none", class_token=class_token, pool=pool)
    images, order = torch.randn(2, 3, 6, 6), torch.randperm(36)
    torch.testing.assert_close(model(permute_pixels(images, order)), model(images), atol=1e-4, rtol=1e-4)
    assert (model(torch.randn(2, 3, 6, 6)) - model(images)).abs().max() > 0.1


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_learned_table_permuted_alike_undoes_a_permutation_of_pixels(prefix):
    model = lively(class_token=bool(prefix), pool="cls" if prefix else "avg")
    images, order = torch.randn(2, 3, 6, 6), torch.randperm(36)
    before, shuffled = model(images), permute_pixels(images, order)
    assert (model(shuffled) - before).abs().max() > 0.1, "the table must matter while it stays in place"
    with torch.no_grad():
        model.pos_embed[:, prefix:] = model.pos_embed[:, prefix:][:, order]
    torch.testing.assert_close(model(shuffled), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("class_token", [True, False])
def test_all_tokens_in_another_order_equal_the_full_image(class_token):
    model = lively(class_token=class_token, pool="cls" if class_token else "avg")
    images = torch.randn(2, 3, 6, 6)
    ids = torch.stack([torch.randperm(36), torch.randperm(36)])
    prefix = model.num_prefix_tokens
    full, picked = model.forward_features(images), model.forward_features(images, ids=ids)
    torch.testing.assert_close(picked[:, :prefix], full[:, :prefix], atol=1e-4, rtol=1e-4)
    for sample in range(2):
        expected = full[sample, prefix:][ids[sample]]
        torch.testing.assert_close(picked[sample, prefix:], expected, atol=1e-4, rtol=1e-4)


def test_tokens_left_out_are_not_seen():
    model = lively()
    images, ids = torch.randn(2, 3, 6, 6), torch.tensor([[3, 8, 30], [35, 0, 7]])
    other = torch.randn(2, 3, 36)
    for sample in range(2):
        other[sample][:, ids[sample]] = images.flatten(2)[sample][:, ids[sample]]
    picked = model.forward_features(images, ids=ids)
    assert picked.shape == (2, 1 + 3, 48)
    torch.testing.assert_close(model.forward_features(other.reshape(2, 3, 6, 6), ids=ids), picked)


# Training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "pool": "avg", "position": "none"},
        {"pool": "avg", "position": "sincos", "qk_norm": True},
    ],
)
def test_every_parameter_receives_a_gradient(options):
    model = lively(drop_path=0.5, **options).train()
    drops = torch.full((4, 2 * model.depth), 0.99)
    F.cross_entropy(model(torch.randn(4, 3, 6, 6), drops), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("checkpoint_blocks", [2, 4])
def test_recomputing_blocks_changes_nothing(checkpoint_blocks):
    plain = lively(drop_path=0.5).train()
    recomputing = lively(drop_path=0.5, checkpoint_blocks=checkpoint_blocks).train()
    images, drops = torch.randn(4, 3, 6, 6), torch.rand(4, 8)
    calls = []
    for block in recomputing.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, recomputing):
        model(images, drops).square().sum().backward()
    assert len(calls) == 4 + checkpoint_blocks
    for ours, expected in zip(recomputing.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_dropped_paths_against_a_computation_by_hand():
    torch.manual_seed(0)
    block = Block(48, 3)
    x = torch.randn(4, 7, 48)
    draws = torch.tensor([[0.9, 0.9], [0.1, 0.25], [0.25, 0.1], [0.0, 0.249]])  # kept from 0.25 on
    keep = [(1, 1), (0, 1), (1, 0), (0, 0)]
    for sample, (attention, mlp) in enumerate(keep):
        y = x[sample : sample + 1]
        y = y + attention / 0.75 * block.attn(block.norm1(y))
        y = y + mlp / 0.75 * block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x, keep_scale(draws, 0.25))[sample : sample + 1], y)
    assert torch.equal(block(x, torch.zeros(4, 2)), x)


def test_drop_path_rises_linearly_and_each_block_has_its_own_draws():
    model = lively(drop_path=0.3).train()
    assert drop_path_rates(0.3, 4) == pytest.approx(torch.linspace(0, 0.3, 4).tolist())
    assert drop_path_rates(0.3, 1) == [0.0]
    images = torch.randn(1, 3, 6, 6)
    drops = torch.tensor([[0.0, 0.0, 0.09, 0.11, 0.21, 0.19, 0.29, 0.31]])  # rates 0, 0.1, 0.2, 0.3
    x = model.embed(images)
    x = model.blocks[0](x)
    x = x + model.blocks[1].mlp(model.blocks[1].norm2(x)) / 0.9
    x = x + model.blocks[2].attn(model.blocks[2].norm1(x)) / 0.8
    x = x + model.blocks[3].mlp(model.blocks[3].norm2(x)) / 0.7
    torch.testing.assert_close(model(images, drops), model.forward_head(model.norm(x)), atol=1e-5, rtol=1e-5)


def test_training_with_drop_path_and_without_draws_is_our_own_defect():
    model = lively(drop_path=0.1)
    images = torch.randn(1, 3, 6, 6)
    model(images)
    with pytest.raises(AssertionError, match="draws"):
        model.train()(images)


def test_bf16_autocast_keeps_the_residual_stream_in_fp32():
    model = lively(drop_path=0.1, qk_norm=True).train()
    images, drops = torch.randn(2, 3, 6, 6), torch.rand(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode(model.embed(images), drops)
    assert tokens.dtype == torch.float32
    expected = model.encode(model.embed(images), drops)
    assert (tokens - expected).norm() < 0.05 * expected.norm()


def test_layers_for_layer_wise_decay():
    model = lively(pool="avg")
    assert {model.layer_index(name) for name, _ in model.named_parameters()} == {0, 1, 2, 3, 4, 5}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert model.layer_index(name) == 0
    assert model.layer_index("blocks.0.attn.qkv.weight") == 1
    assert model.layer_index("blocks.3.mlp.fc2.bias") == 4
    assert model.layer_index("fc_norm.weight") == model.layer_index("head.bias") == 5
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


# Attention maps


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_maps_reproduce_the_fused_attention(qk_norm):
    model = lively(qk_norm=qk_norm)
    images = torch.randn(2, 3, 6, 6)
    maps = model.attention_maps(images, [0, 2])
    assert set(maps) == {0, 2}
    x = model.embed(images)
    for layer, block in enumerate(model.blocks):
        if layer in maps:
            assert maps[layer].shape == (2, 3, 37, 37)
            torch.testing.assert_close(maps[layer].sum(dim=-1), torch.ones(2, 3, 37))
            tokens = block.norm1(x)
            values = block.attn.qkv(tokens)[..., 96:].reshape(2, 37, 3, 16)
            mixed = torch.einsum("bhqk,bkhc->bqhc", maps[layer], values).flatten(2)
            torch.testing.assert_close(block.attn.proj(mixed), block.attn(tokens), atol=1e-4, rtol=1e-4)
        x = block(x)


# Mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 5}, "patch_size=5 does not divide image_size=32x32; nearest that do: 4 and 8"),
        ({"image_size": (48, 64), "patch_size": 32}, "patch_size=32 does not divide image_size=48x64.*: 16"),
        ({"patch_size": 0}, "patch_size=0 does not divide image_size=32x32; nearest that do: 1"),
        ({"image_size": 0}, "image_size=0x0"),
        ({"class_token": False}, "pool=cls.*class_token=true or pool=avg"),
        ({"pool": "max"}, "pool='max'.*cls or avg"),
        ({"position": "rotary"}, "position='rotary'.*learned, sincos or none"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"checkpoint_blocks": 13}, "checkpoint_blocks=13.*depth=12"),
        ({"classes": -1}, "classes=-1"),
        ({"channels": 0}, "channels=0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        VisionTransformer(**{"image_size": 32, "patch_size": 2, **options})


def test_images_of_another_size_are_named():
    with pytest.raises(InputError, match="images of 8x6 pixels and 3 channels.*image_size=6x6, channels=3"):
        lively()(torch.randn(1, 3, 8, 6))


def test_maps_of_a_missing_layer_are_named():
    with pytest.raises(InputError, match=r"layers=\[4\].*0 to 3"):
        lively().attention_maps(torch.randn(1, 3, 6, 6), [0, 4])


def test_the_model_does_not_import_the_training_framework():
    code = "import sys, common.model.flops; print(sorted({'lightning', 'timm', 'torchvision'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root).stdout
    assert found.strip() == "[]"
