"""Under `trainer.precision` bf16-true and 64-true a net takes what is computed around it, which is fp32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.model import VisionTransformer
from diffusion.autoencoder import Autoencoder
from diffusion.discriminator import PatchDiscriminator
from diffusion.dit import DiT
from locality_ablation.dictionary import DictionaryTransformer
from locality_ablation.grouping import SegmentTransformer
from mae.model import MaskedAutoencoder

NANO = {"size": "nano", "depth": 1}
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS, SEGMENTS = torch.tensor([0, 2]), torch.arange(64).view(1, 8, 8).expand(2, -1, -1) // 8

# A net for images of 8x8 pixels in 3 channels, and what it is given.
NETS: dict[str, Callable[[], tuple[torch.nn.Module, tuple]]] = {
    "ViT": lambda: (VisionTransformer(8, 2, classes=3, **NANO), (IMAGES,)),
    "MAE": lambda: (MaskedAutoencoder(8, 2, decoder_width=24, decoder_depth=1, decoder_heads=3, **NANO),
                    (IMAGES, torch.rand(2, 16), 0.75)),
    "DiT": lambda: (DiT(8, 2, 3, 3, **NANO), (IMAGES, torch.tensor([3.0, 700.0]), LABELS)),
    "segments": lambda: (SegmentTransformer(8, image_size=8, patch_size=2, classes=3, **NANO), (IMAGES, SEGMENTS)),
    "dictionary": lambda: (DictionaryTransformer(image_size=8, patch_size=1, classes=3, **NANO),
                           ((127 * IMAGES + 127).byte(),)),
    "autoencoder": lambda: (Autoencoder("kl", base=8, groups=4, multipliers=(1, 2)), (IMAGES, torch.rand(2, 4, 4, 4))),
    "discriminator": lambda: (PatchDiscriminator(3, (8, 8), width=8, layers=1), (IMAGES,)),
}  # fmt: skip


def of(outputs: object) -> list[Tensor]:
    return [value for value in (outputs if isinstance(outputs, tuple) else [outputs]) if isinstance(value, Tensor)]


@pytest.mark.parametrize("precision, within", [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
@pytest.mark.parametrize("kind", NETS)
def test_a_net_of_other_weights_takes_fp32_images(kind: str, precision: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    net, given = NETS[kind]()
    for parameter in net.parameters():  # where outputs begin at zero, too
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    with torch.no_grad():
        expected, found = of(net.eval()(*given)), of(net.to(precision)(*given))
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= within * other.abs().max()
