"""The gradient side: the empirical Fisher matrix of a window of gradients, and its inverse.

Plain functions of gradients; nothing here depends on Optax.
"""

from curvax.fisher._inverse import Solution, solve_damped_gram
from curvax.fisher._sparse_window import SparseRow, SparseWindow
from curvax.fisher._static import InverseFisher, inverse_fisher
from curvax.fisher._window import DenseWindow, Window

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
