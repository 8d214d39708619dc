"""The first case study: classification and depth estimation, supervised from scratch (paper, section 4.1)."""

from supervised.classification import Classification

__all__ = ["Classification"]
