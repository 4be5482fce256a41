"""Names of the contestants of several benchmarks."""

OURS = "fused_tricks"
FOR_LOOP = "torch.amp, for-loop"
FOREACH = "torch.amp, foreach"
FUSED = "torch.amp, fused"
GRAPH = ", CUDA graph"
"""The suffix of a contestant whose step is replayed."""
