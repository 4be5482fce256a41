"""The report on a GPU, and its parts."""
