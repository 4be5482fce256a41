"""Tests that require torch, pytest and the package only, so that they run in any environment."""

from __future__ import annotations

import torch

import fused_tricks


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, fused_tricks {fused_tricks.__version__} in {fused_tricks.__path__[0]}"
