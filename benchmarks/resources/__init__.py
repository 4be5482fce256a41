"""Registers, spills and memory accesses of the compiled kernels."""
