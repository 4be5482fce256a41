"""Helpers of the tests: backends, exact comparison, and replacements for missing hardware."""

# Before fused_tricks, because this import chooses how Triton runs.
from . import interpreted  # noqa: F401
