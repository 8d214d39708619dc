"""The first case study: classification and depth estimation, supervised from scratch (paper, section 4.1)."""

from supervised.classification import Classification
from supervised.depth import Depth
from supervised.depth_data import DepthData
from supervised.nyu import Nyu
from supervised.rooms import Rooms

__all__ = ["Classification", "Depth", "DepthData", "Nyu", "Rooms"]
