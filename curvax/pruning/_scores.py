r"""Scores of single weights: the predicted rise of the loss when one of them is pruned."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._trees import wide_dtype
from curvax.fisher import InverseFisher, inverse_fisher
from curvax.pruning._leaves import Leaf
from curvax.pruning._options import BlockScope
from curvax.pruning._packing import Packing


class FisherOptions(NamedTuple):
    """How the Fisher matrix of the alive weights is damped, cut into blocks and distributed."""

    damping: float
    block_size: int | None
    block_scope: BlockScope
    mesh: jax.sharding.Mesh | None

    def packing(self, leaves: Sequence[Leaf]) -> Packing:
        """Side by side if weights are pruned, so that shapes vary; not with blocks per leaf."""
        any_pruned = any(len(leaf.alive) < math.prod(leaf.shape) for leaf in leaves)
        sizes = [len(leaf.alive) for leaf in leaves]
        return Packing.of(sizes, packed=any_pruned and self.block_scope == "tree")

    def invert(self, columns: Sequence[Any]) -> InverseFisher:
        return inverse_fisher(
            list(columns),
            self.damping,
            block_size=self.block_size,
            block_scope=self.block_scope,
            mesh=self.mesh,
        )


def magnitude_scores(leaves: Sequence[Leaf]) -> list[np.ndarray]:
    """$w^2 / 2$: the Fisher matrix is taken to be the identity."""
    return [leaf.weights**2 / 2 for leaf in leaves]


def fisher_scores(
    leaves: Sequence[Leaf], columns: Sequence[Any], damping: float
) -> list[np.ndarray]:
    r"""$w^2 F_{ii} / 2$: the Fisher matrix is taken to be diagonal."""
    pairs = zip(leaves, columns, strict=True)
    return [leaf.weights**2 * (damping + _mean_of_squares(rows)) / 2 for leaf, rows in pairs]


def obs_scores(leaves: Sequence[Leaf], diagonal: Sequence[Any]) -> list[np.ndarray]:
    r"""Optimal Brain Surgeon's $w^2 / (2 [F^{-1}]_{ii})$: the other weights compensate."""
    pairs = zip(leaves, diagonal, strict=True)
    return [leaf.weights**2 / (2 * np.asarray(entries)) for leaf, entries in pairs]


def _mean_of_squares(rows: Any) -> np.ndarray:
    dtype = wide_dtype(rows)
    if isinstance(rows, np.ndarray):
        return np.einsum("mi,mi->i", rows, rows, dtype=dtype) / len(rows)
    return np.asarray(jnp.mean(rows.astype(dtype) ** 2, axis=0))
