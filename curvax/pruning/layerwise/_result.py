"""The result of a walk over the layers of a model, with a table."""

import math
from typing import Generic, NamedTuple

import jax

from curvax._trees import Tree, shape_of
from curvax.pruning._weights import Skipped, num_kept


class PrunedLayer(NamedTuple):
    r"""A layer pruned by `prune_layers`.

    Attributes:
      path: the path of its kernel in the params.
      size: the number of its weights.
      kept: how many of them are kept.
      error: $\|X (W - \hat W)\|^2 / \|X W\|^2$, with inputs from the pruned layers before it.
      num_rows: the number of rows of $X$.
      num_features: the number of its columns.
    """

    path: str
    size: int
    kept: int
    error: float
    num_rows: int
    num_features: int

    @property
    def sparsity(self) -> float:
        """The share of weights that are pruned."""
        return 1 - self.kept / self.size


class LayersResult(NamedTuple, Generic[Tree]):
    """Parameters pruned layer by layer.

    Attributes:
      params: the parameters; pruned weights are exactly zero.
      mask: a tree of bool like ``params``, True for what is kept.
      layers: the pruned layers, in call order.
      unseen: the selected kernels that were not pruned, and why.
    """

    params: Tree
    mask: Tree
    layers: tuple[PrunedLayer, ...]
    unseen: tuple[Skipped, ...]

    @property
    def sparsity(self) -> float:
        """The share of zeros in the pruned layers together."""
        return 1 - sum(layer.kept for layer in self.layers) / sum(x.size for x in self.layers)

    @property
    def num_kept(self) -> int:
        """The number of all remaining weights, biases, norms and embeddings included."""
        return num_kept(self.params, self.mask)

    def table(self) -> str:
        """Sparsity and error of each pruned layer and of the model, and unseen kernels, as text."""
        paths = [layer.path for layer in self.layers] + [layer.path for layer in self.unseen]
        width = max(map(len, ["total", *paths]))
        lines = [f"{'':{width}}  {'weights':>10}  {'sparsity':>8}  {'error':>8}"]
        lines += [
            f"{x.path:{width}}  {x.size:>10,}  {x.sparsity:>8.2%}  {x.error:>8.2e}"
            for x in self.layers
        ]
        size = sum(layer.size for layer in self.layers)
        lines.append(f"{'total':{width}}  {size:>10,}  {self.sparsity:>8.2%}")
        size = sum(math.prod(shape_of(leaf)) for leaf in jax.tree.leaves(self.params))
        lines.append(f"{'model':{width}}  {size:>10,}  {1 - self.num_kept / size:>8.2%}")
        lines += [f"{layer.path:{width}}  not pruned: {layer.reason}" for layer in self.unseen]
        return "\n".join(lines)
