"""One optimizer step: its options, its plan, its state, its checkpoints."""
