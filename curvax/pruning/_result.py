"""The result of pruning, with a table and a plot."""

import warnings
from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np

from curvax._extras import new_axes
from curvax._trees import PyTree, Tree
from curvax.pruning._weights import Skipped, Weights, num_kept

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
      mask: a tree of bool like ``params``, True for what is kept; leaves that were not pruned
        keep the given mask, or have a scalar True, which costs nothing.
      layers: the pruned leaves, in the tree's order.
      skipped: selected leaves that do not fit the structure, with the reason.
      num_other: the number of kept weights in all other leaves.
      predicted_loss_change: the increase of the loss that the quadratic model from the gradients
        predicts, summed over recomputations; None without gradients. Its scale is right for
        gradients of single examples; with means over batches of $b$ examples the quadratic part is
        smaller by a factor of $b$.
      num_failed: the number of blocks of the Fisher matrix too ill conditioned for their dtype; the
        maximum over steps.
    """

    params: Tree
    mask: Tree
    layers: tuple[LayerSparsity, ...]
    skipped: tuple[Skipped, ...]
    num_other: int
    predicted_loss_change: float | None
    num_failed: int

    @property
    def sparsity(self) -> float:
        """The overall fraction of zeros in the pruned leaves."""
        return self._total().sparsity

    @property
    def num_kept(self) -> int:
        """The number of all remaining weights, biases, norms and embeddings included."""
        return self._total().kept + self.num_other

    def table(self) -> str:
        """The sparsity of each pruned leaf, and of the whole model, as text."""
        total = self._total()
        model = LayerSparsity("model", total.size + self.num_other, self.num_kept)
        rows = [*self.layers, total, model]
        width = max(len(row.path) for row in rows)
        lines = [f"{'':{width}}  {'weights':>12}  {'kept':>12}  {'sparsity':>8}"]
        lines += [
            f"{row.path:{width}}  {row.size:>12,}  {row.kept:>12,}  {row.sparsity:>8.2%}"
            for row in rows
        ]
        lines += [f"{path} is not pruned: {reason}" for path, reason in self.skipped]
        return "\n".join(lines)

    def _total(self) -> LayerSparsity:
        size = sum(layer.size for layer in self.layers)
        return LayerSparsity("total", size, sum(layer.kept for layer in self.layers))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Plots the sparsity of each pruned leaf as bars.

        Args:
          ax: axes of matplotlib to draw on; by default those of a new figure.

        Returns:
          The axes.
        """
        ax = ax or new_axes(height=1 + 0.25 * len(self.layers))
        names = [layer.path for layer in self.layers]
        ax.barh(names, [100 * layer.sparsity for layer in self.layers], color="#0072b2")
        ax.axvline(100 * self.sparsity, color="#d55e00", linestyle="--", label="total")
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("sparsity, %")
        ax.legend(frameon=False, loc="lower right")
        return ax


def result_of(
    params: Tree,
    mask: PyTree | None,
    weights: Weights,
    skipped: tuple[Skipped, ...],
    predicted: float | None,
    num_failed: int,
) -> PruneResult[Tree]:
    """The result, with warnings of what a user would not expect."""
    counts = [int(np.count_nonzero(weights.alive[span])) for span in weights.spans()]
    layers = tuple(
        LayerSparsity(leaf.path, leaf.size, kept)
        for leaf, kept in zip(weights.leaves, counts, strict=True)
    )
    if empty := ", ".join(
        name for name, span in weights.members() if not weights.alive[span].any()
    ):
        warnings.warn(
            f"pruning left no weights in {empty}, which disconnects the network: set min_density, "
            "or a distribution other than 'global'.",
            stacklevel=3,
        )
    if num_failed:
        warnings.warn(
            f"{num_failed} blocks of the Fisher matrix were too ill conditioned for their dtype, "
            "and their damping was raised by a few ulps: raise damping.",
            stacklevel=3,
        )
    new_mask = weights.mask(params, mask)
    num_other = num_kept(params, new_mask) - sum(counts)
    new_params = weights.params(params)
    return PruneResult(new_params, new_mask, layers, skipped, num_other, predicted, num_failed)
