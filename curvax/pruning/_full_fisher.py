r"""The whole empirical Fisher matrix of the alive weights, through a Gram matrix.

With $K = I + \hat G \hat G^T = C C^T$, summed over chunks of columns, in the coordinates and with
the two forms of a joint update of `curvax.pruning._fisher`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST, InverseFactor, inverse_factor
from curvax.fisher.inverse._full import guarded_diagonal
from curvax.pruning._fisher import Answer, BlockFisher, Model, ScaledRows, dot


def fisher_model(rows: ScaledRows, block_size: int | None) -> Model:
    """In blocks; one block of all weights where these are no more than the gradients."""
    if block_size is None and rows.size > rows.rows.num_rows:
        return FullFisher(rows)
    return BlockFisher(rows, rows.block_size(block_size))


class FullFisher(NamedTuple):
    """One matrix of all weights."""

    rows: ScaledRows

    def diagonal(self) -> Answer:
        factor = self._factor()
        parts = [np.asarray(_diagonal(factor, rows)) for (rows,) in self.rows.chunks()]
        return Answer(np.concatenate(parts)[: self.rows.size], int(factor.failed))

    def solve(self, vector: np.ndarray) -> Answer:
        factor = self._factor()
        inside = _apply(factor, self._dots(vector))
        rest = vector - self._combine(inside)
        image = _apply(factor, self._dots(rest) - inside)
        return Answer(rest - self._combine(image), int(factor.failed))

    def joint(self, removed: np.ndarray, kept: np.ndarray) -> Answer:
        target = self._dots(removed)
        if np.count_nonzero(kept) <= self.rows.rows.num_rows:
            return self._joint_of_few(target, kept)
        factor = self._factor(kept)
        changes = self._combine(_apply(factor, target))
        return Answer(np.where(kept, changes, 0), int(factor.failed))

    def _joint_of_few(self, target: jax.Array, kept: np.ndarray) -> Answer:
        """From the kept columns alone, where they are no more than the gradients."""
        chunk = self.rows.rows.width.chunk
        parts = [
            np.asarray(rows)[:, np.flatnonzero(kept[index * chunk : (index + 1) * chunk])]
            for index, (rows,) in enumerate(self.rows.chunks())
        ]
        columns = jnp.asarray(np.concatenate(parts, axis=1))
        factor = _factor(_products(columns.T))
        changes = np.zeros_like(kept, columns.dtype)
        changes[kept] = _apply(factor, dot(columns.T, target))
        return Answer(changes, int(factor.failed))

    def _factor(self, kept: np.ndarray | None = None) -> InverseFactor:
        flags = np.ones(self.rows.size, bool) if kept is None else kept
        total = sum(_products(rows * mask) for rows, mask in self.rows.chunks(flags))
        return _factor(total)

    def _dots(self, vector: np.ndarray) -> jax.Array:
        return sum(dot(rows, part) for rows, part in self.rows.chunks(vector))

    def _combine(self, weights: jax.Array) -> np.ndarray:
        parts = [np.asarray(dot(rows.T, weights)) for (rows,) in self.rows.chunks()]
        return np.concatenate(parts)[: self.rows.size]


@jax.jit
def _products(rows: jax.Array) -> jax.Array:
    return jnp.dot(rows, rows.T, precision=HIGHEST)


@jax.jit
def _factor(products: jax.Array) -> InverseFactor:
    return inverse_factor(products + jnp.eye(len(products), dtype=products.dtype))


@jax.jit
def _apply(factor: InverseFactor, vector: jax.Array) -> jax.Array:
    return factor.solve(vector[:, jnp.newaxis])[:, 0]


@jax.jit
def _diagonal(factor: InverseFactor, rows: jax.Array) -> jax.Array:
    return guarded_diagonal(factor.matrix, rows, damping=1.0, normalizer=1.0)
