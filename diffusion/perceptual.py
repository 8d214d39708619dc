"""LPIPS: how different two images look to a VGG16 (Zhang et al. 2018), from local weight files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.training.checkpoints import read

# Below the root of the data, as `python -m common.weights` lists them.
VGG16, LINEAR = Path("weights") / "vgg16-397923af.pth", Path("weights") / "lpips_vgg.pth"
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a max pool between two of them
SMALLEST = 16  # pixels a side, of which four pools leave one


class LPIPS(nn.Module):
    """The learned perceptual image patch similarity, version 0.1 with VGG16, in fp32 under any autocast.

    The features after relu1_2, 2_2, 3_3, 4_3 and 5_3 are scaled to unit length at each place; their squared differences
    are weighed by channel, averaged over the places, and summed. Parameter names are torchvision's (`features.0.weight`
    ...) and LPIPS' (`lin0.model.1.weight` ...). The weights are random until `load`, and never trained.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, widths in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] * (number > 0)
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            linear = nn.Sequential(nn.Dropout(), nn.Conv2d(before, 1, 1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": linear}))
        self.features = nn.Sequential(*layers)
        # Published beside the linear weights: they bring images in [-1, 1] to the mean and deviation of ImageNet.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def load(self, root: Path) -> LPIPS:
        """Reads the weights from below the folder of all data, and returns itself.

        The weights of the channels are those that torchmetrics brings along, where weights/ does not hold them.

        Raises:
            InputError: a file that is not there, damaged, or holds other weights.
        """
        linear = root / LINEAR if (root / LINEAR).is_file() else _linear_of_torchmetrics()
        self.load_state_dict(_chosen(vgg16_file(root), "features.", self) | _chosen(linear, "lin", self))
        return self

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Images (B, 3 or 1, H, W) in [-1, 1] -> distances (B,) to their references; 0 where they are equal."""
        with torch.autocast(images.device.type, enabled=False):
            distance = torch.zeros(len(images), device=images.device)
            for number, (one, other) in enumerate(zip(self._stages(images), self._stages(references), strict=True)):
                weigh = self.get_submodule(f"lin{number}.model")
                distance = distance + weigh((one - other).square()).mean(dim=(1, 2, 3))
            return distance

    def _stages(self, images: Tensor) -> list[Tensor]:
        """The features of each stage, of unit length at each place."""
        x = (images.float().expand(-1, 3, -1, -1) - self.shift) / self.spread
        stages = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(_unit(x))
            x = layer(x)
        return [*stages, _unit(x)]


def _unit(features: Tensor) -> Tensor:
    # The small number lies under the root, whose gradient at 0 it keeps finite; LPIPS adds 1e-10 after the root.
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def has_vgg16(root: Path) -> bool:
    return (root / VGG16).is_file()


def vgg16_file(root: Path) -> Path:
    """Where VGG16 lies. InputError: it does not."""
    file = root / VGG16
    if not has_vgg16(root):
        raise InputError(f"{file}: there is no such file; fetch torchvision's VGG16 of ImageNet "
                         f"(VGG16_Weights.IMAGENET1K_V1, {VGG16.name}) and put it there, or train without the "
                         "perceptual loss: --model.perceptual none")
    return file


def _linear_of_torchmetrics() -> Path:
    import torchmetrics.functional.image

    return Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / "vgg.pth"


def _chosen(file: Path, prefix: str, net: LPIPS) -> dict[str, Tensor]:
    """The tensors of a file that the part of the net with this prefix takes; the file may hold more."""
    weights = read(file)
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items() if key.startswith(prefix)}
    wrong = [key for key, shape in wanted.items() if getattr(weights.get(key), "shape", None) != shape]
    if wrong:
        raise InputError(f"{file}: not the weights of VGG16's LPIPS, for {wrong[0]} of shape "
                         f"{'x'.join(map(str, wanted[wrong[0]]))} is not there")
    return {key: weights[key] for key in wanted}
