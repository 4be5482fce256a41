"""Sharded parameters, and one decision for all processes of a step."""
