"""The benchmark of the optimizer step."""
