"""Classification under a fixed pixel permutation: which of ViT's two locality designs matters (paper, section 5)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from common.model import VisionTransformer
from common.training.initialisation import content_of
from locality_ablation.permutation import INTACT, Permutation, PixelPermutation
from supervised import Classification


class PermutedClassification(Classification):
    """Classification of images whose pixels have changed places: after all augmentation, and in every stage alike.

    Position embeddings are an option of the model: `position` learned, sincos or none.

    Args:
        permutation: which pixels change places; by default none.
        **kwargs: see `supervised.Classification`.
    """

    def __init__(self, permutation: Permutation = INTACT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.permutation = permutation
        self.permuted: PixelPermutation | None = None

    def assemble(self) -> None:
        super().assemble()
        self.permuted = self._permutation_of(self.net)
        if self.init_from:
            self._compare(content_of(self.init_from).get("state_dict", {}).get("permuted.order"))

    def _permutation_of(self, net: VisionTransformer) -> PixelPermutation:
        order = self.permutation.order(net.image_size, net.patch_size, self.trainer.seed)
        return PixelPermutation(order, net.image_size)

    def _compare(self, order: Tensor | None) -> None:
        """With the order of the pixels that the source was trained on; one that keeps none saw images intact."""
        own = self.permuted.order
        if not torch.equal(own, torch.arange(len(own)) if order is None else order):
            rank_zero_warn(f"--init_from: {self.init_from} was trained under another permutation; model.permutation's "
                           "is used")

    def transform(self, images: Tensor) -> Tensor:
        return self.permuted(images)

    def notes(self, net: VisionTransformer) -> dict[str, Any]:
        permuted = self.permuted or self._permutation_of(net)  # a check builds the net alone
        pixels, moved = len(permuted.order), permuted.moved
        return {"swapped pairs": f"{moved // 2} of {pixels // 2} ({moved / pixels:.1%})"}
