"""Published autoencoders: files written here from the published descriptions, and what is read from them.

Latent diffusion's layout is told twice below, independently of the loader: the names and shapes of its weights, and
what its nets compute with them.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from common.errors import InputError
from diffusion.autoencoder import Autoencoder
from diffusion.published import load_autoencoder

# vq-f8 with 16 times fewer channels: the same names.
SMALL = {"base": 8, "groups": 4, "codebook_size": 16}


# Latent diffusion's layout


def shapes(base: int = 8, codes: int = 16, z: int = 4) -> dict[str, tuple[int, ...]]:
    """Weights of vq-f8: 4 levels of 1, 2, 2, 4 times `base`, 2 residual blocks, attention at the coarsest level."""
    multipliers, named = (1, 2, 2, 4), {}

    def conv(name: str, i: int, o: int, k: int) -> None:
        named[f"{name}.weight"], named[f"{name}.bias"] = (o, i, k, k), (o,)

    def norm(name: str, c: int) -> None:
        named[f"{name}.weight"] = named[f"{name}.bias"] = (c,)

    def block(name: str, i: int, o: int) -> None:
        norm(f"{name}.norm1", i)
        conv(f"{name}.conv1", i, o, 3)
        norm(f"{name}.norm2", o)
        conv(f"{name}.conv2", o, o, 3)
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def attention(name: str, c: int) -> None:
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    def middle(half: str, c: int) -> None:
        block(f"{half}.mid.block_1", c, c)
        attention(f"{half}.mid.attn_1", c)
        block(f"{half}.mid.block_2", c, c)

    conv("encoder.conv_in", 3, base, 3)
    width = base
    for level, multiplier in enumerate(multipliers):
        for i in range(2):
            block(f"encoder.down.{level}.block.{i}", width, base * multiplier)
            width = base * multiplier
            if level == 3:
                attention(f"encoder.down.3.attn.{i}", width)
        if level != 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, z, 3)
    conv("decoder.conv_in", z, width, 3)
    middle("decoder", width)
    for level in (3, 2, 1, 0):
        for i in range(3):
            block(f"decoder.up.{level}.block.{i}", width, base * multipliers[level])
            width = base * multipliers[level]
            if level == 3:
                attention(f"decoder.up.3.attn.{i}", width)
        if level != 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    conv("quant_conv", z, z, 1)
    conv("post_quant_conv", z, z, 1)
    named["quantize.embedding.weight"] = (codes, z)
    return named


def random_weights() -> dict[str, Tensor]:
    """Weights that keep activations near 1, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            value /= math.sqrt(math.prod(shape[1:]))
        elif len(shape) == 1:
            value = 0.3 * value + ("norm" in name and name.endswith("weight"))
        weights[name] = value
    return weights


class LatentDiffusion:
    """What latent diffusion computes with weights of these names; group norms of 4 groups here."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        y = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", y)), padding=1)
        return y + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        query, key, value = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) / math.sqrt(x.shape[1]), -1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, value).view_as(x))

    def middle(self, half: str, x: Tensor) -> Tensor:
        x = self.attention(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)

    def out(self, half: str, x: Tensor) -> Tensor:
        return self.conv(f"{half}.conv_out", F.silu(self.norm(f"{half}.norm_out", x)), padding=1)

    def encode(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images, padding=1)
        for level in range(4):
            for i in range(2):
                x = self.block(f"encoder.down.{level}.block.{i}", x)
                x = self.attention(f"encoder.down.3.attn.{i}", x) if level == 3 else x
            if level != 3:  # padded below and on the right alone
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.out("encoder", self.middle("encoder", x)))

    def decode(self, latents: Tensor) -> Tensor:
        codebook = self.weights["quantize.embedding.weight"]
        nearest = (latents.movedim(1, -1)[..., None, :] - codebook).square().sum(-1).argmin(-1)
        x = self.conv("post_quant_conv", codebook[nearest].movedim(-1, 1))
        x = self.middle("decoder", self.conv("decoder.conv_in", x, padding=1))
        for level in (3, 2, 1, 0):
            for i in range(3):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
                x = self.attention(f"decoder.up.3.attn.{i}", x) if level == 3 else x
            if level != 0:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2), padding=1)
        return self.out("decoder", x)


def checkpoint(path: Path, weights: dict[str, Tensor], **more) -> Path:
    torch.save({"epoch": 9, "global_step": 971043, "state_dict": weights, **more}, path)
    return path


def test_latent_diffusions_checkpoint_computes_what_it_was_trained_to(tmp_path):
    weights = random_weights()
    training = {"loss.logvar": torch.ones(()), "loss.discriminator.main.0.weight": torch.ones(2),
                "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2)}
    net = load_autoencoder(checkpoint(tmp_path / "model.ckpt", weights | training), **SMALL)
    reference = LatentDiffusion(weights)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = net.moments(images)
        expected = reference.encode(images)
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(net.decode(latents), reference.decode(expected), atol=1e-4, rtol=1e-4)
    assert latents.shape == (2, 4, 8, 12) and expected.std() > 0.1
    assert len(net.quantise(latents)[2].unique()) > 2
    assert net.scale == 1 and not net.shift.any()  # published without


def test_the_default_is_the_size_of_the_published_model():
    with torch.device("meta"):
        net = Autoencoder()
    expected = sum(math.prod(shape) for shape in shapes(base=128, codes=16384).values())
    assert sum(p.numel() for p in net.parameters()) == expected


def test_classes_and_code_that_an_old_checkpoint_names_are_neither_needed_nor_run(tmp_path, monkeypatch):
    """Checkpoints of 2021 hold the callbacks of their Lightning, by class; a file could name anything else as well."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    old = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = old

    class Foul:
        def __reduce__(self):
            return shutil.copytree, (str(tmp_path), str(tmp_path / "ran"))

    weights = random_weights()
    path = checkpoint(tmp_path / "model.ckpt", weights, callbacks={old: {"best": torch.ones(())}}, other=Foul())
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    net = load_autoencoder(path, **SMALL)
    assert torch.equal(net.model.encoder.conv_in.weight, weights["encoder.conv_in.weight"])
    assert not (tmp_path / "ran").exists()


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize("change, said", [
    (lambda w: without(w, "decoder.up.3.attn.2.proj_out.bias"), "missing: decoder.up_blocks.0.attentions.2.to_out.0.b"),
    (lambda w: w | {"model_ema.decay": torch.ones(())}, "unknown: model_ema.decay"),
    (lambda w: w | {"encoder.down.4.block.0.conv1.weight": torch.ones(1)}, "unknown: encoder.down.4.block.0.conv1.w"),
    (lambda w: w | {"quant_conv.bias": torch.ones(3)}, "of another shape: quant_conv.bias (3,) for (4,)"),
    (lambda w: w | {"encoder.mid.attn_1.q.weight": torch.ones(32, 32, 3, 3)}, "q.weight (32, 32, 3, 3) for (32, 32)"),
    (lambda w: {f"loss.{key}": value for key, value in w.items()}, "holds no weights"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, said):
    with pytest.raises(InputError) as error:
        load_autoencoder(checkpoint(tmp_path / "model.ckpt", change(random_weights())), **SMALL)
    assert said in str(error.value) and "model.ckpt" in str(error.value)


def test_a_model_without_attention_at_the_coarsest_level_is_another(tmp_path):
    path = checkpoint(tmp_path / "model.ckpt", random_weights())
    with pytest.raises(InputError, match=r"unknown: encoder.down.3.attn.0.norm.weight, .* and \d+ more$"):
        load_autoencoder(path, **SMALL, attention="middle")


# diffusers' layout


KL = {"in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4,
      "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4,
      "act_fn": "silu", "sample_size": 256}  # fmt: skip


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def as_published(folder: Path, model: AutoencoderKL) -> None:
    """The folder of sd-vae-ft-ema: a config of diffusers 0.4.2, and the attention's names of that time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **KL}))  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        weights[name] = value.contiguous()
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in weights
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def test_stable_diffusions_folder(tmp_path):
    theirs = scrambled(AutoencoderKL(**KL))
    as_published(tmp_path / "vae", theirs)
    net = load_autoencoder(tmp_path / "vae")
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        moments = net.moments(images)
        torch.testing.assert_close(net.sample(moments), posterior.mode())
        torch.testing.assert_close(net.sample(moments, noise), posterior.mean + posterior.std * noise)
        torch.testing.assert_close(net.decode(noise), theirs.decode(noise).sample)
    # DiT trains on the latent times 0.18215 and decodes what it draws divided by it; this config does not say so.
    torch.testing.assert_close(net.normalise(noise), noise * 0.18215)
    torch.testing.assert_close(net.denormalise(noise), noise / 0.18215)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_todays_diffusers_saves(tmp_path, safe):
    theirs = scrambled(AutoencoderKL(**KL, scaling_factor=0.5, shift_factor=0.25))
    theirs.save_pretrained(tmp_path / "vae", safe_serialization=safe)
    net = load_autoencoder(tmp_path / "vae")
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(net.decode(latents), theirs.decode(latents).sample)
    torch.testing.assert_close(net.normalise(latents), (latents - 0.25) * 0.5)


def test_a_vq_folder_with_attention_at_the_coarsest_level(tmp_path):
    theirs = scrambled(VQModel(**{**KL, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
                                  "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]},
                               num_vq_embeddings=32))  # fmt: skip
    theirs.quantize.embedding.weight.data.normal_()
    theirs.save_pretrained(tmp_path / "vq")
    net = load_autoencoder(tmp_path / "vq", beta=0.5)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(images).latents
        torch.testing.assert_close(net.moments(images), latents)
        torch.testing.assert_close(net.decode(latents), theirs.decode(latents).sample)
    assert net.scale == 1  # the config's 0.18215 is Stable Diffusion's, which VQModel fills in
    assert net.beta == 0.5


@pytest.mark.parametrize("model, more", [(AutoencoderKL, {}), (VQModel, {"num_vq_embeddings": 32})])
def test_what_a_config_of_diffusers_first_versions_does_not_say_is_what_diffusers_takes(tmp_path, model, more):
    """0.1.2 and 0.2.2 wrote no norm_num_groups: no weight's shape tells that there are 32 groups."""
    said = {"_class_name": model.__name__, "_diffusers_version": "0.1.2", **KL, "block_out_channels": [32, 64], **more}
    for entry in ("norm_num_groups", "act_fn", "layers_per_block"):
        del said[entry]
    scrambled(model.from_config(said)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(said))
    theirs, net = model.from_pretrained(tmp_path / "model").eval(), load_autoencoder(tmp_path / "model")
    images, latents = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(net.moments(images), theirs.quant_conv(theirs.encoder(images)))
        torch.testing.assert_close(net.decode(latents), theirs.decode(latents).sample)
    assert net.config["groups"] == 32 and net.config["res_blocks"] == 1


@pytest.mark.parametrize("change, said", [
    ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny' is not one of VQModel, AutoencoderKL"),
    ({"act_fn": "relu"}, "act_fn=relu is not supported; with the other entries it must be silu"),
    ({"use_quant_conv": False}, "use_quant_conv=False is not supported"),
    ({"latents_std": [1.0]}, "latents_std=[1.0] is not supported"),
    ({"block_out_channels": [8, 12]}, "block_out_channels=[8, 12] is not supported"),
    ({"out_channels": 1}, "out_channels=1 is not supported"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "is not supported"),
    ({"norm_num_groups": 5}, "model.groups=5 does not divide base=8"),
    ({"dropout": 0.1}, "dropout is not known"),
    ({"norm_num_groups": ...}, "model.groups=32 does not divide base=8"),  # 32 is diffusers' default
    ({"block_out_channels": ...}, "down_block_types=['DownEncoderBlock2D', 'DownEncoderBlock2D'] is not supported"),
    (b"{", "not JSON"),
    (b"[]", "holds a list"),
    (None, "there is no such file"),
])
def test_configs_that_cannot_be_expressed(tmp_path, change, said):
    as_published(tmp_path / "vae", AutoencoderKL(**KL))
    file = tmp_path / "vae" / "config.json"
    if isinstance(change, dict):
        config = {**json.loads(file.read_text()), **change}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    elif change is None:
        file.unlink()
    else:
        file.write_bytes(change)
    with pytest.raises(InputError) as error:
        load_autoencoder(tmp_path / "vae")
    assert said in str(error.value)


def test_weights_in_a_folder_that_do_not_fit_or_cannot_be_read(tmp_path):
    as_published(tmp_path / "vae", AutoencoderKL(**KL))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(without(weights, "post_quant_conv.bias"), file)
    with pytest.raises(InputError, match="missing: post_quant_conv.bias"):
        load_autoencoder(tmp_path / "vae")
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated, or not a file of safetensors"):
        load_autoencoder(tmp_path / "vae")
    file.unlink()
    with pytest.raises(InputError, match="neither diffusion_pytorch_model.safetensors nor .*model.bin"):
        load_autoencoder(tmp_path / "vae")


# Runs of this study


def run_folder(folder: Path, net: Autoencoder, average: Autoencoder | None = None, **more) -> Path:
    """What a training of an autoencoder leaves: Lightning's checkpoint, with the net's options beside the weights."""
    (folder / "checkpoints").mkdir(parents=True)
    content = {"loops": {}, "optimizer_states": [], "accumulation": 1, "autoencoder": net.config,
               "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}, **more}  # fmt: skip
    content["state_dict"]["discriminator.layers.0.weight"] = torch.ones(1)
    if average is not None:
        content["ema"] = {"state_dict": average.state_dict()}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_run_folder_gives_its_average_with_scale_and_shift(tmp_path, kind):
    options = {**SMALL, "multipliers": (1, 2), "image_channels": 1, "res_blocks": 1}
    raw, average = Autoencoder(kind, **options), scrambled(Autoencoder(kind, **options))
    average.measure([torch.randn(3, 4 if kind == "vq" else 8, 2, 2)])
    folder = run_folder(tmp_path / "averaged", raw, average)
    assert load_autoencoder(folder).fingerprint() == average.fingerprint()
    assert load_autoencoder(folder / "checkpoints" / "last.ckpt").fingerprint() == average.fingerprint()
    with pytest.warns(UserWarning, match="unfinished: the scale of its latents has not been"):
        net = load_autoencoder(run_folder(tmp_path / "unfinished", raw))
    assert net.fingerprint() == raw.fingerprint()


def test_runs_that_hold_no_autoencoder(tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="new: there is no checkpoint yet"):
        load_autoencoder(tmp_path / "new")
    other = run_folder(tmp_path / "classifier", Autoencoder(**SMALL), autoencoder=None)
    with pytest.raises(InputError, match="last.ckpt: holds no autoencoder"):
        load_autoencoder(other)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no weights at all"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_files_that_are_no_weights(tmp_path, name, content):
    with pytest.raises(InputError, match=f"{name}: there is no such file"):
        load_autoencoder(tmp_path / name, **SMALL)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: truncated, or not a"):
        load_autoencoder(tmp_path / name, **SMALL)
