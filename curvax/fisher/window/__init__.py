"""The sliding window of gradients: its rows, dense or sparse."""

from curvax.fisher.window._dense import DenseWindow, Window
from curvax.fisher.window._sparse import SparseRow, SparseWindow

__all__ = ["DenseWindow", "SparseRow", "SparseWindow", "Window"]
