"""The dense net of depth estimation: a backbone and the linear head that DINOv2 calls "lin. 1"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model import VisionTransformer

UPSAMPLING = 4


class DepthNet(nn.Module):
    """Images (B, C, H, W) -> depth (B, 1, 4h, 4w) in metres, from a backbone with a grid of h x w tokens.

    Each token, beside the class token where there is one, is projected to one score per bin; the scores are upsampled
    bilinearly; the depth is the mean of the bins, weighted by relu(score) + 0.1.

    Args:
        bins: number of depths, spread evenly over `depth_range` (metres), both ends included.
    """

    def __init__(self, backbone: VisionTransformer, bins: int, depth_range: tuple[float, float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width * (1 + backbone.num_prefix_tokens), bins)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("bins", torch.linspace(*depth_range, bins), persistent=False)

    def forward(self, images: Tensor, drops: Tensor | None = None) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        # One of the backbone's two final norms is the identity.
        tokens = self.backbone.fc_norm(self.backbone.forward_features(images, drops=drops))
        patches = tokens[:, prefix:]
        if prefix:
            patches = torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1)
        # A 1x1 convolution and an interpolation commute: projecting first costs 16 times less.
        scores = self.head(patches).float().transpose(1, 2).unflatten(2, self.backbone.grid)
        scores = F.interpolate(scores, scale_factor=UPSAMPLING, mode="bilinear")
        weights = F.relu(scores) + 0.1
        # No matrix product: TF32 would round the bins.
        depth = (weights * self.bins[:, None, None]).sum(1) / weights.sum(1)
        return depth[:, None]

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_index(self, parameter_name: str) -> int:
        """Depth of a parameter for layer-wise decay; the head is the last layer."""
        return self.backbone.layer_index(parameter_name.removeprefix("backbone."))
