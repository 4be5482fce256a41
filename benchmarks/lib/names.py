"""What the contestants of several benchmarks are called."""

OURS = "fused_tricks"
FOR_LOOP = "torch.amp, for-loop"
FOREACH = "torch.amp, foreach"
FUSED = "torch.amp, fused"
GRAPH = ", CUDA graph"
"""Comes behind the name of a contestant that is replayed."""
