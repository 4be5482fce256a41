"""The optimizer step: options, plan, state and checkpoints."""
