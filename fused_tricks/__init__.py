"""Low-precision training by the recipe of "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187)."""

from .cast import cast_model, norm_layers
from .ema import ema_state_dict, ema_weights
from .fp32_weights import fp32_state_dict, load_fp32_state_dict
from .linear_scaling import global_batch_size, scale_lr
from .loss_scale import DynamicLossScale
from .optimizer import FusedSGD
from .schedule import WarmupCosineLR
from .step.stats import StepStats
from .weight_decay import decay_groups
from .zero_gamma import zero_gamma_, zero_gamma_names

__version__ = "0.1.0"

__all__ = [
    "DynamicLossScale",
    "FusedSGD",
    "StepStats",
    "WarmupCosineLR",
    "cast_model",
    "decay_groups",
    "ema_state_dict",
    "ema_weights",
    "fp32_state_dict",
    "global_batch_size",
    "load_fp32_state_dict",
    "norm_layers",
    "scale_lr",
    "zero_gamma_",
    "zero_gamma_names",
]
