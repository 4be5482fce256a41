"""Sets γ to zero in the last norm of each residual branch."""

from .find import zero_gamma_, zero_gamma_names

__all__ = ["zero_gamma_", "zero_gamma_names"]
