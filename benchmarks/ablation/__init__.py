"""The ablation of the paper's tricks."""
