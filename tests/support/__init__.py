"""Helpers of the tests: backends, exact comparison, and stand-ins for what a machine lacks."""

# Before fused_tricks: chooses how Triton runs.
from . import interpreted  # noqa: F401
