"""Models in low precision whose norm layers compute in FP32."""

from .model import cast_model, norm_layers

__all__ = ["cast_model", "norm_layers"]
