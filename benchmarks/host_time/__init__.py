"""The share of each host-time trick in a step on the CPU backend."""
