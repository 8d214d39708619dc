"""Tokens of irregular segments (paper, appendix H). Exploratory: how a segment becomes a token is ours.

Shapes: B batch, C channels, H x W pixels, S segments (the limit, padded), D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from common.errors import InputError
from common.model import VisionTransformer
from locality_ablation.segmented_images import SegmentedImages
from supervised import Classification


class SegmentTokens(nn.Module):
    """The mean of the linear projections of a segment's pixels, which is the projection of its mean pixel."""

    def __init__(self, channels: int, width: int, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.proj = nn.Linear(channels, width)

    def forward(self, images: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) and the segment of each pixel, int64 (B, H, W).

        Returns:
            Tokens (B, S, D); centroids (B, S, 2), x and y from -1 to 1 at the image's edges; pixels (B, S), 0 where
            there is no such segment.
        """
        batch, _, height, width = images.shape
        x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
        y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
        plane = (batch, 1, height, width)
        further = [x.expand(plane), y[:, None].expand(plane), torch.ones_like(x).expand(plane)]  # the last counts
        pixels = torch.cat([images.float(), *further], dim=1).flatten(2).transpose(1, 2)
        slots = segments.flatten(1) + self.limit * torch.arange(batch, device=images.device)[:, None]
        # Whose order a GPU does not fix: there two runs agree to rounding.
        sums = pixels.new_zeros(batch * self.limit, pixels.shape[2])
        sums = sums.index_add(0, slots.flatten(), pixels.flatten(0, 1)).view(batch, self.limit, -1)
        count = sums[..., -1]
        means = sums / count.clamp(min=1)[..., None]
        return self.proj(means[..., :-3].to(self.proj.weight.dtype)), means[..., -3:-1], count


class SegmentTransformer(VisionTransformer):
    """A VisionTransformer whose tokens are segments.

    The position of a segment is the table of the grid of patches, interpolated bilinearly at its centroid. Slots that
    an image has no segment for are not attended to.

    Args:
        limit: the most segments of an image.
        **vit: see VisionTransformer; `patch_size` says how fine the table of positions is.
    """

    def __init__(self, limit: int, **vit: Any) -> None:
        super().__init__(**vit)
        if self.pool != "cls":
            raise InputError(f"model.pool={self.pool!r}: the mean would count slots without a segment; use cls")
        self.tokens = limit
        self.patch_embed = SegmentTokens(self.channels, self.width, limit)

    def forward(self, images: Tensor, segments: Tensor, drops: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) and the segment of each pixel, int64 (B, H, W) -> logits (B, classes)."""
        tokens, pixels = self.embed_segments(images, segments)
        return self.classify(tokens, pixels > 0, drops)

    def embed_segments(self, images: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with their positions (B, S, D), and the number of pixels of each (B, S)."""
        tokens, centroids, pixels = self.patch_embed(images, segments)
        if self.pos_embed is not None:
            prefix = self.num_prefix_tokens
            table = self.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
            places = F.grid_sample(table.expand(len(images), -1, -1, -1), centroids[:, None].to(table),
                                   padding_mode="border", align_corners=False)[:, :, 0]
            tokens = tokens + places.transpose(1, 2)
        return tokens, pixels

    def classify(self, tokens: Tensor, there: Tensor, drops: Tensor | None = None) -> Tensor:
        """Tokens (B, S, D) of which some are `there`, bool (B, S) -> logits (B, classes)."""
        prefix = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens), tokens], dim=1)
        return self.forward_head(self.norm(self.encode(x, drops, F.pad(there, (1, 0), value=True))))


class SegmentClassification(Classification):
    """Classification of images whose tokens are segments, of data `locality_ablation.SegmentedImages`.

    Mixup and cutmix mix tokens, slot by slot: segments are numbered from the top left. Cutmix takes a run of slots
    from the partner, and shares the targets out by the pixels of the tokens that were kept and taken.

    Args:
        **kwargs: see `supervised.Classification`.
    """

    data_class = SegmentedImages
    masked = True

    def build(self, data: SegmentedImages) -> SegmentTransformer:
        if self.probe:
            raise InputError("model.probe: true is for supervised.Classification; segments have no probing")
        return SegmentTransformer(limit=data.segmentation.limit, image_size=data.image_size, channels=data.channels,
                                  classes=len(data.class_names), **self.vit)

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        found = {name: values.float().mean() for name, values in _told(batch).items()}
        return {"loss": super().training_step(batch, index), **found}

    def logits(self, batch: dict[str, Tensor], drops: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, pixels = self.net.embed_segments(self.transform(batch["image"]), batch["segments"])
        tokens, there, targets = self.mixed_tokens(tokens, pixels, batch["label"])
        return self.net.classify(tokens, there, drops), targets

    def mixed_tokens(self, tokens: Tensor, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, S, D), which of them are there (B, S), and targets: (B,) labels, or (B, classes) where mixed."""
        there = pixels > 0
        if not (self.mixup or self.cutmix):
            return tokens, there, labels
        from timm.data.mixup import mixup_target

        with self.mixing(labels):
            cut = self.cutmix and (not self.mixup or np.random.rand() < 0.5)
            alpha = self.cutmix if cut else self.mixup
            own, start = np.random.beta(alpha, alpha), np.random.rand()
        if cut:
            slots = torch.arange(self.net.tokens, device=tokens.device)
            run = round((1 - own) * len(slots))
            first = int(start * (len(slots) - run + 1))
            taken = (slots >= first) & (slots < first + run)
            tokens = torch.where(taken[:, None], tokens.flip(0), tokens)
            kept, got = (pixels * ~taken).sum(1), (pixels.flip(0) * taken).sum(1)
            own = (kept / (kept + got))[:, None]
            there = torch.where(taken, there.flip(0), there)
        else:
            tokens = tokens * there[..., None]  # a slot without a segment adds nothing to its partner
            tokens = own * tokens + (1 - own) * tokens.flip(0)
            there = there | there.flip(0)
        return tokens, there, mixup_target(labels, self.net.classes, own, self.label_smoothing)

    def predicted(self, net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return net(self.transform(batch["image"]), batch["segments"])

    def metrics(self, data: SegmentedImages) -> MetricCollection:
        """With the mean number of `tokens` of an image, and the percentage of pixels in `merged` segments."""
        scores = super().metrics(data)
        scores.add_metrics({"tokens": MeanMetric(), "merged": MeanMetric()})
        return scores

    def evaluate(self, net: nn.Module, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        super().evaluate(net, batch, scores)
        for name, values in _told(batch).items():
            scores[name].update(values)


def _told(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of segments, (B,) each; they are numbered without a gap."""
    return {"tokens": batch["segments"].flatten(1).amax(1) + 1, "merged": 100 * batch["merged"]}
