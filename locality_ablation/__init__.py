"""The study of locality (paper, section 5, appendices F, G and H): permutation, positions, tokens and grouping."""

from locality_ablation.classification import PermutedClassification
from locality_ablation.dictionary import DictionaryClassification
from locality_ablation.grouping import SegmentClassification
from locality_ablation.segmentation import Felzenszwalb, Slic
from locality_ablation.segmented_images import SegmentedImages

__all__ = ["DictionaryClassification", "Felzenszwalb", "PermutedClassification", "SegmentClassification",
           "SegmentedImages", "Slic"]  # fmt: skip
