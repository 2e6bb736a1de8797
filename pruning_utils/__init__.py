"""Pruning: which weights or filters go, and masks that hold them at exactly zero.

    prune_(model, l1, 0.5)              # half of the weights of every convolution and linear layer
    prune_(model, l2_filters, 0.3, only=nn.Conv2d)
"""

from .masks import Mask, strip_masks_, zero_fraction
from .scores import l1, l1_global, l2, l2_filters, random
from .transform import prune_

__all__ = ["Mask", "l1", "l1_global", "l2", "l2_filters", "prune_", "random", "strip_masks_", "zero_fraction"]
