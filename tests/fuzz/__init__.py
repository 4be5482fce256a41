"""Random histories of optimizers: every backend against the reference, and FP32 against torch.optim.SGD."""
