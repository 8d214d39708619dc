"""The diffusion Transformer against its published definition (Peebles and Xie 2023), computed anew in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.model.flops import parameters
from common.training.optim import Recipe, parameter_groups
from diffusion import DiT
from diffusion.dit import modulate, sinusoids

NET = {"input_size": (4, 6), "patch_size": 2, "channels": 4, "classes": 5, "width": 16, "depth": 2, "heads": 2}
TIMESTEPS, LABELS = torch.tensor([0, 1, 500, 999]), torch.tensor([0, 4, 5, 2])  # 5 is the null class


def net(**options) -> DiT:
    """A small net; every parameter gets a value of its own, since zeros would hide swapped or missing ones."""
    torch.manual_seed(1)
    model = DiT(**{**NET, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def latents(model: DiT, batch: int = 4) -> Tensor:
    return torch.randn(batch, model.channels, *model.input_size, generator=torch.Generator().manual_seed(2))


# The published definition


def published(weights: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor | None, heads: int = 2) -> Tensor:
    """The output from weights in the layout of DiT's own release, in fp64."""
    weights, x = {name: value.double() for name, value in weights.items()}, x.double()
    kernel = weights["x_embedder.proj.weight"]
    patch_size, depth = kernel.shape[-1], len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    tokens = F.conv2d(x, kernel, weights["x_embedder.proj.bias"], stride=patch_size)
    grid = tokens.shape[2:]
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"]
    # The release computes angles in fp32, and so has an error of 3e-5 in that of t = 999.
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    c = linear(silu(linear(c, weights, "t_embedder.mlp.0")), weights, "t_embedder.mlp.2")
    if y is not None:
        c = c + weights["y_embedder.embedding_table.weight"][y]
    for index in range(depth):
        tokens = published_block(tokens, c, weights, f"blocks.{index}", heads)
    shift, scale = linear(silu(c), weights, "final_layer.adaLN_modulation.1").tensor_split(2, dim=1)
    patches = linear(norm(tokens) * (1 + scale[:, None]) + shift[:, None], weights, "final_layer.linear")
    return published_unpatchify(patches, grid, patch_size)


def published_block(x: Tensor, c: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    modulation = linear(silu(c), weights, f"{name}.adaLN_modulation.1")[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.tensor_split(6, dim=2)
    q, k, v = (part.unflatten(2, (heads, -1)) for part in
               linear(norm(x) * (1 + scale1) + shift1, weights, f"{name}.attn.qkv").tensor_split(3, dim=2))
    if f"{name}.attn.q_norm.weight" in weights:
        q, k = (norm(part) * weights[f"{name}.attn.{which}_norm.weight"] + weights[f"{name}.attn.{which}_norm.bias"]
                for part, which in [(q, "q"), (k, "k")])  # fmt: skip
    logits = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
    mixed = torch.einsum("bhqk,bkhc->bqhc", logits.exp() / logits.exp().sum(dim=3, keepdim=True), v).flatten(2)
    x = x + gate1 * linear(mixed, weights, f"{name}.attn.proj")
    hidden = linear(norm(x) * (1 + scale2) + shift2, weights, f"{name}.mlp.fc1")
    gelu = hidden / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return x + gate2 * linear(gelu, weights, f"{name}.mlp.fc2")


def published_unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Patches row by row, inside one row, column, channel."""
    h, w = grid
    channels = patches.shape[2] // patch_size**2
    images = patches.new_empty(len(patches), channels, h * patch_size, w * patch_size)
    for row in range(h * patch_size):
        for column in range(w * patch_size):
            token = row // patch_size * w + column // patch_size
            start = (row % patch_size * patch_size + column % patch_size) * channels
            images[:, :, row, column] = patches[:, token, start : start + channels]
    return images


def published_table(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the column in the first half of the channels and of the row in the second."""
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[place / 10000 ** (k / (width // 4)) for k in range(width // 4)] for place in (column, row)]
            rows.append([f(angle) for half in angles for f in (math.sin, math.cos) for angle in half])
    return torch.tensor(rows, dtype=torch.float64)[None]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6) ** 0.5


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def published_layout(model: DiT) -> dict[str, Tensor]:
    """The weights with the patch projection as a convolution, and a fixed table computed anew."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    kernel = weights["x_embedder.proj.weight"].unflatten(1, (model.patch_size, model.patch_size, model.channels))
    weights["x_embedder.proj.weight"] = kernel.permute(0, 3, 1, 2)
    if model.position == "sincos":
        weights["pos_embed"] = published_table(model.grid, model.width)
    return weights


@pytest.mark.parametrize("options", [
    {"position": "sincos"},
    {"position": "sincos", "input_size": 6, "learn_variance": False},
    {"patch_size": 1},
    {"patch_size": 1, "input_size": (3, 2), "channels": 1, "qk_norm": True},
    {"input_size": 4, "depth": 3},
    {"classes": 0},
])  # fmt: skip
def test_the_output_is_the_published_one(options):
    model = net(**options)
    x, y = latents(model), LABELS if model.classes else None
    with torch.no_grad():
        output = model(x, TIMESTEPS, y)
    expected = published(published_layout(model), x, TIMESTEPS, y)
    assert output.shape == (4, model.out_channels, *model.input_size)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.3


def test_a_published_checkpoint_loads(tmp_path):
    """DiT's release for 4 x 4 latents and 5 classes at width 16 and depth 2, by names and shapes."""
    shapes = {"pos_embed": (1, 4, 16), "x_embedder.proj.weight": (16, 4, 2, 2), "x_embedder.proj.bias": (16,),
              "t_embedder.mlp.0.weight": (16, 256), "t_embedder.mlp.0.bias": (16,),
              "t_embedder.mlp.2.weight": (16, 16), "t_embedder.mlp.2.bias": (16,),
              "y_embedder.embedding_table.weight": (6, 16),
              "final_layer.linear.weight": (32, 16), "final_layer.linear.bias": (32,),
              "final_layer.adaLN_modulation.1.weight": (32, 16), "final_layer.adaLN_modulation.1.bias": (32,)}
    for block in ("blocks.0", "blocks.1"):
        for name, inputs, outputs in [("attn.qkv", 16, 48), ("attn.proj", 16, 16), ("mlp.fc1", 16, 64),
                                      ("mlp.fc2", 64, 16), ("adaLN_modulation.1", 16, 96)]:  # fmt: skip
            shapes |= {f"{block}.{name}.weight": (outputs, inputs), f"{block}.{name}.bias": (outputs,)}
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
    weights["pos_embed"] = published_table((2, 2), 16).float()
    torch.save(weights, tmp_path / "released.pt")
    model = DiT(**{**NET, "input_size": 4}, position="sincos").eval()
    torch.testing.assert_close(model.pos_embed, weights["pos_embed"])
    model.load_state_dict(torch.load(tmp_path / "released.pt", weights_only=True))  # strict
    x = latents(model)
    with torch.no_grad():
        output = model(x, TIMESTEPS, LABELS)
    torch.testing.assert_close(output, published(weights, x, TIMESTEPS, LABELS).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("t, error", [(0, 0), (0.5, 1e-6), (1, 1e-6), (37, 5e-6), (999, 1e-4)])
def test_the_sinusoids_of_a_timestep(t, error):
    angles = [t / 10000 ** (k / 128) for k in range(128)]
    expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    assert sinusoids(torch.tensor([t]))[0].tolist() == pytest.approx(expected, rel=0, abs=error)


# Starting values


def test_the_output_is_zero_before_training_and_every_block_the_identity():
    torch.manual_seed(0)
    model = DiT(**NET).eval()
    x = latents(model)
    assert torch.equal(model(x, TIMESTEPS, LABELS), torch.zeros(4, 8, 4, 6))
    tokens, condition = torch.randn(4, 6, 16), torch.randn(4, 16)
    assert torch.equal(model.blocks[1](tokens, condition), tokens)


def test_initial_values():
    torch.manual_seed(0)
    model = DiT(16, 2, size="tiny", depth=1)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight",
                 "pos_embed"):  # fmt: skip
        assert values.pop(name).std() == pytest.approx(0.02, rel=0.03), name
    for name, value in values.items():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not value.any(), name
        else:
            bound = (6 / sum(value.shape)) ** 0.5  # Xavier's, of the patch projection as a linear layer
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.03), name


@pytest.mark.parametrize("options", [{}, {"position": "sincos", "qk_norm": True, "patch_size": 1}, {"classes": 0}])
def test_every_parameter_learns_two_steps_away_from_the_zeros(options):
    torch.manual_seed(0)
    model = DiT(**{**NET, **options})
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = latents(model), LABELS if model.classes else None
    moving = []
    for _ in range(3):
        optimiser.zero_grad()
        (model(x, TIMESTEPS, y, torch.ones(4)) - 1).square().mean().backward()
        moving.append({name for name, parameter in model.named_parameters() if parameter.grad.any()})
        optimiser.step()
    assert moving[0] == {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert moving[2] == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("size, patch_size, millions, digits", [
    ("small", 2, 33, 0), ("base", 2, 130, 0), ("xlarge", 2, 675, 0),  # the paper's
    ("large", 2, 457.84, 2), ("large", 1, 457.80, 2),
])  # fmt: skip
def test_published_parameter_counts(size, patch_size, millions, digits):
    with torch.device("meta"):
        assert round(parameters(DiT(32, patch_size, size=size, position="sincos")) / 1e6, digits) == millions


@pytest.mark.parametrize("size", ["nano", "tiny", "xlarge"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_parameter_counts_by_hand(size, patch_size):
    with torch.device("meta"):
        model = DiT(32, patch_size, size=size)
    d, values = model.width, 4 * patch_size**2
    blocks = model.depth * (12 * d**2 + 9 * d + 6 * d * (d + 1))
    embeddings = (values + 1) * d + 257 * d + (d + 1) * d + 1001 * d + model.tokens * d
    assert parameters(model) == blocks + embeddings + 2 * d * (d + 1) + 2 * values * (d + 1)


def test_a_fixed_table_does_not_learn():
    model = net(position="sincos")
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    torch.testing.assert_close(model.pos_embed, published_table((2, 3), 16).float())


def test_tables_are_exempt_from_weight_decay():
    model = net()
    decayed = next(group for group in parameter_groups(model, Recipe(lr=1e-4), 1e-4) if group["weight_decay"])
    tables = {id(model.pos_embed), id(model.y_embedder.embedding_table.weight)}
    assert not tables & {id(parameter) for parameter in decayed["params"]}


# Labels and guidance


def test_labels_become_the_null_class_only_where_a_draw_is_below_the_rate():
    model = net(label_dropout=0.25)
    x, drops = latents(model), torch.tensor([0.0, 0.25, 0.249, 0.9])
    labels, dropped = torch.tensor([1, 1, 2, 3]), torch.tensor([5, 1, 5, 3])
    for mode in (model.train(), model.eval()):
        assert torch.equal(mode(x, TIMESTEPS, labels, drops), mode(x, TIMESTEPS, dropped, torch.ones(4)))
    assert torch.equal(model(x, TIMESTEPS, dropped), model(x, TIMESTEPS, labels, drops))
    assert not torch.equal(model(x, TIMESTEPS, labels)[0], model(x, TIMESTEPS, dropped)[0])


def test_training_with_label_dropout_and_without_draws_is_our_own_defect():
    with pytest.raises(AssertionError, match="draws"):
        net().train()(torch.randn(4, 4, 4, 6), TIMESTEPS, LABELS)
    without = net(label_dropout=0.0).train()
    assert len(without.y_embedder.embedding_table.weight) == 5
    without(latents(without), TIMESTEPS, torch.arange(4))
    net(classes=0).train()(latents(without), TIMESTEPS)


@pytest.mark.parametrize("channels, options, guided", [(3, {}, 3), (4, {}, 4), (3, {"channels": 1}, 1),
                                                       (2, {"learn_variance": False}, 2)])  # fmt: skip
def test_guidance_by_hand(channels, options, guided):
    model = net(**options)
    x, labels = latents(model), torch.tensor([0, 4, 3, 2])
    with torch.no_grad():
        output = model.forward_with_guidance(x, TIMESTEPS, labels, 1.5, channels)
        conditional, null = model(x, TIMESTEPS, labels), model(x, TIMESTEPS, torch.full((4,), 5))
    expected = 1.5 * conditional[:, :guided] - 0.5 * null[:, :guided]
    torch.testing.assert_close(output[:, :guided], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[:, guided:], conditional[:, guided:], atol=1e-5, rtol=1e-5)
    assert (conditional - null).abs().amin(dim=(0, 2, 3)).min() > 0  # in every channel, guided or not


def test_guidance_by_three_channels_is_the_default():
    model = net()
    arguments = latents(model), TIMESTEPS, torch.zeros(4, dtype=torch.long), 4.0
    assert torch.equal(model.forward_with_guidance(*arguments), model.forward_with_guidance(*arguments, channels=3))


# Precision and memory


@pytest.mark.parametrize("checkpoint_blocks", [1, 2])
def test_recomputing_blocks_changes_nothing(checkpoint_blocks):
    plain, recomputing = net(), net(checkpoint_blocks=checkpoint_blocks)
    calls = []
    for block in recomputing.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, recomputing):
        model(latents(model), TIMESTEPS, LABELS).square().sum().backward()
    assert len(calls) == 2 + checkpoint_blocks
    for ours, expected in zip(recomputing.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_bf16_autocast_keeps_embeddings_and_the_residual_stream_in_fp32():
    model = net()
    x, seen = latents(model), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    expected = model(x, TIMESTEPS, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, TIMESTEPS, LABELS)
        guided = model.forward_with_guidance(x, TIMESTEPS, LABELS, 1.5)
    (tokens, condition), _, (tokens16, condition16), (last16, _) = seen[:4]
    assert torch.equal(tokens, tokens16) and torch.equal(condition, condition16)
    assert last16.dtype == guided.dtype == torch.float32
    assert 0 < (output - expected).norm() < 0.03 * expected.norm()
    shift, scale = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.001, dtype=torch.bfloat16)
    assert modulate(torch.ones(1, 1, 1), shift, scale).item() == pytest.approx(1.001, abs=1e-5)


def test_true_bf16_keeps_the_sinusoids_in_fp32():
    model = net()
    x = latents(model)
    expected = model(x, TIMESTEPS, LABELS)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does
        angles = sinusoids(torch.tensor([999]))
        output = model.bfloat16()(x, TIMESTEPS, LABELS)  # x in fp32, as the process computes it
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(angles, sinusoids(torch.tensor([999])))
    assert output.dtype == torch.bfloat16 and (output - expected).norm() < 0.05 * expected.norm()


# Mistakes


@pytest.mark.parametrize("options, message", [
    ({"patch_size": 3}, "patch_size=3 does not divide image_size=4x6; nearest that do: 2"),
    ({"heads": 3}, "heads=3 does not divide width=16; nearest that do: 2 and 4"),
    ({"size": "huge"}, "size='huge'.*xlarge"),
    ({"position": "none"}, "position='none'.*learned or sincos"),
    ({"position": "sincos", "width": 18}, "sincos.*width=18"),
    ({"label_dropout": 1.0}, "label_dropout=1.0"),
    ({"checkpoint_blocks": 3}, "checkpoint_blocks=3.*depth=2"),
    ({"channels": 0}, "channels=0"),
    ({"classes": -1}, "classes=-1"),
])  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        DiT(**{**NET, **options})


def test_mistakes_in_a_call_are_named():
    model, x = net(), torch.randn(4, 4, 4, 6)
    with pytest.raises(InputError, match="latents of 6x4 and 4 channels.*input_size=4x6, channels=4"):
        model(x.transpose(2, 3), TIMESTEPS, LABELS)
    with pytest.raises(InputError, match="classes=5 needs labels"):
        model(x, TIMESTEPS)
    with pytest.raises(InputError, match="classes=0 takes no labels"):
        net(classes=0)(x, TIMESTEPS, LABELS)
    with pytest.raises(InputError, match="channels=0 must be at least 1"):
        model.forward_with_guidance(x, TIMESTEPS, LABELS, 1.5, channels=0)
    for options in ({"classes": 0}, {"label_dropout": 0.0}):
        with pytest.raises(InputError, match="guidance needs a net with a null class"):
            net(**options).forward_with_guidance(x, TIMESTEPS, LABELS, 1.5)
