"""These tests need nothing but torch, pytest and the package, so that they can run in any environment."""

from __future__ import annotations

import torch

import fused_tricks


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, fused_tricks {fused_tricks.__version__} in {fused_tricks.__path__[0]}"
