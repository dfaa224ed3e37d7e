"""The result of pruning, with a table and a plot."""

import math
from typing import TYPE_CHECKING, Generic, NamedTuple

import jax
import numpy as np

from curvax._trees import PyTree, Tree, path_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LayerSparsity(NamedTuple):
    """A pruned leaf.

    Attributes:
      path: its path in the params.
      size: the number of its weights.
      kept: how many of them are kept.
    """

    path: str
    size: int
    kept: int

    @property
    def sparsity(self) -> float:
        """The share of weights that are pruned."""
        return 1 - self.kept / self.size


class PruneResult(NamedTuple, Generic[Tree]):
    """Pruned parameters.

    Attributes:
      params: the parameters; pruned weights of the selected leaves are exactly zero.
      mask: a tree of bool like ``params``, True for what is kept; leaves that were not selected
        keep the given mask, True without one.
      layers: the leaves that are pruned, in the tree's order.
      predicted_loss_change: the rise of the loss by the quadratic model of the given gradients,
        summed over recomputations; None without gradients. Its scale is right for gradients of
        single examples: with means over batches of $b$ the quadratic part is smaller by $b$.
    """

    params: Tree
    mask: Tree
    layers: tuple[LayerSparsity, ...]
    predicted_loss_change: float | None

    @property
    def sparsity(self) -> float:
        """The overall share of zeros in the pruned leaves."""
        return 1 - sum(layer.kept for layer in self.layers) / sum(x.size for x in self.layers)

    def table(self) -> str:
        """The sparsity of each pruned leaf, as text."""
        width = max(len("total"), *(len(layer.path) for layer in self.layers))
        total = LayerSparsity(
            "total",
            sum(layer.size for layer in self.layers),
            sum(layer.kept for layer in self.layers),
        )
        lines = [f"{'':{width}}  {'weights':>10}  {'kept':>10}  {'sparsity':>8}"]
        lines += [
            f"{layer.path:{width}}  {layer.size:>10,}  {layer.kept:>10,}  {layer.sparsity:>8.2%}"
            for layer in (*self.layers, total)
        ]
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Bars of the sparsity of each pruned leaf.

        Args:
          ax: axes of matplotlib to draw on; by default those of a new figure.

        Returns:
          The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            height = 1 + 0.25 * len(self.layers)
            ax = Figure(figsize=(6, height), layout="constrained").subplots()
        names = [layer.path for layer in self.layers]
        ax.barh(names, [100 * layer.sparsity for layer in self.layers], color="#0072b2")
        ax.axvline(100 * self.sparsity, color="#d55e00", linestyle="--", label="total")
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("sparsity, %")
        ax.legend(frameon=False, loc="lower right")
        return ax


def layer_sparsities(mask: PyTree, indices: list[int]) -> tuple[LayerSparsity, ...]:
    """Counts of the leaves with the given numbers."""
    entries = jax.tree_util.tree_leaves_with_path(mask)
    return tuple(
        LayerSparsity(
            path_name(entries[index][0]),
            math.prod(entries[index][1].shape),
            int(np.count_nonzero(entries[index][1])),
        )
        for index in indices
    )
