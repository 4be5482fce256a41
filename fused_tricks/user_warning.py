"""Warnings that point at a line of user code."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_PACKAGES = ("fused_tricks", "torch")


def warn_user(message: str) -> None:
    """Issues a `UserWarning` that points at the first line of the call stack outside this package and torch."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        level += 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
