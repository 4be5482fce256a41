"""Low-precision training by the recipe of "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187)."""

from .loss_scale import DynamicLossScale
from .optimizer import FusedSGD, StepStats

__version__ = "0.1.0"

__all__ = ["DynamicLossScale", "FusedSGD", "StepStats"]
