"""Sharded parameters, and the reduction that makes all processes of a step decide alike."""
