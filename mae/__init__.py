"""The second case study: masked autoencoding of pixels, then fine-tuning or linear probing (paper, section 4.2)."""

from mae.model import MaskedAutoencoder
from mae.pretraining import Pretraining

__all__ = ["MaskedAutoencoder", "Pretraining"]
