"""The learning rate schedule."""

from .scheduler import WarmupCosineLR

__all__ = ["WarmupCosineLR"]
