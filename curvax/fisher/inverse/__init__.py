"""The inverse empirical Fisher matrix of given gradients."""

from curvax.fisher.inverse._inverse_fisher import InverseFisher, inverse_fisher

__all__ = ["InverseFisher", "inverse_fisher"]
