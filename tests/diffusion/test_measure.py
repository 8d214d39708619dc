"""python -m diffusion.measure: scale and shift for an autoencoder that was published without."""

from pathlib import Path

import pytest
import torch

from common.data import Digits
from diffusion.autoencoder import Autoencoder
from diffusion.measure import main
from diffusion.published import load_autoencoder

DIGITS = Path(__file__).parents[2] / "diffusion" / "configs" / "digits.yaml"
OPTIONS = {"image_channels": 1, "channels": 2, "base": 8, "multipliers": (1, 1), "res_blocks": 1, "groups": 4,
           "codebook_size": 16, "attention": "none"}  # fmt: skip


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_latents_of_the_measured_file_have_unit_variance(kind: str, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    net = Autoencoder(kind, **OPTIONS)
    source, target = tmp_path / "published.ckpt", tmp_path / "new" / "measured.ckpt"
    torch.save({"autoencoder": net.config, "state_dict": net.state_dict()}, source)
    with pytest.warns(UserWarning, match="the scale of its latents has not been measured"):
        assert main([str(target), "--config", str(DIGITS), "--data.image_size", "8",
                     "--data.autoencoder", str(source)]) == 0  # fmt: skip
    measured = load_autoencoder(target)
    assert f"scale {measured.scale:.4f}" in capsys.readouterr().out
    for name, value in net.model.state_dict().items():
        assert torch.equal(measured.model.state_dict()[name], value)
    # All 1,197 training images at once, by hand.
    images = Digits().read(tmp_path, "train").images.float() / 127.5 - 1
    with torch.no_grad():
        moments = net.moments(images)
    latents, spread = moments[:, :2].double(), 0.0
    if kind == "kl":
        spread = moments[:, 2:].double().clamp(-30, 20).exp()
    mean = latents.mean((0, 2, 3), keepdim=True)
    std = ((latents - mean).square() + spread).mean().sqrt()
    torch.testing.assert_close(measured.shift.double(), mean[0], atol=1e-5, rtol=1e-4)
    assert measured.scale.item() == pytest.approx(1 / std.item(), rel=1e-4)
