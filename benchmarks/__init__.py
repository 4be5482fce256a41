"""Benchmarks of fused_tricks against plain torch.amp; see README.md in this folder."""
