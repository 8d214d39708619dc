"""From images to tokens and back. A patch size of 1 makes every pixel a token and needs no code of its own.

Shapes: B batch, C channels, H x W pixels, P patch size, h x w grid of patches, L = h * w tokens, D width.
"""

from typing import Any

from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, L, P * P * C).

    Patches follow each other row by row; inside a patch the order is row, column, channel (He et al. 2022).
    """
    batch, channels, height, width = images.shape
    h, w = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, h, patch_size, w, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches (B, L, P * P * C) on a grid (h, w) back together to images (B, C, h * P, w * P)."""
    batch, (h, w) = patches.shape[0], grid
    cut = patches.reshape(batch, h, w, patch_size, patch_size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, h * patch_size, w * patch_size)


class LinearTokens(nn.Module):
    """Linear projection of patches to tokens: images (B, C, H, W) -> (B, L, D).

    The same map as a convolution of kernel and stride P, and it loads the weights of one.
    """

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.channels = channels
        self.proj = nn.Linear(patch_size * patch_size * channels, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size).to(self.proj.weight.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "proj.weight"
        weight = state_dict.get(key)
        # A kernel of another patch size or channel count stays 4-d, so that torch names it as a size mismatch.
        if weight is not None and weight.shape[1:] == (self.channels, self.patch_size, self.patch_size):
            state_dict[key] = weight.permute(0, 2, 3, 1).flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
