"""The gradient side: the empirical Fisher matrix of a window of gradients, and its inverse.

Plain functions of gradients; nothing here depends on Optax.
"""

from curvax.fisher._damped_gram import Solution, solve_damped_gram
from curvax.fisher.inverse import InverseFisher, inverse_fisher
from curvax.fisher.window import DenseWindow, SparseRow, SparseWindow, Window

__all__ = [
    "DenseWindow",
    "InverseFisher",
    "Solution",
    "SparseRow",
    "SparseWindow",
    "Window",
    "inverse_fisher",
    "solve_damped_gram",
]
