r"""The inverse of one empirical Fisher matrix over all columns, through the Gram matrix.

With $K = m \lambda I + G G^T = C C^T$ and $W = C^{-1} G$,

$$
F^{-1} v = \frac1\lambda \left(v - W^T W v\right), \qquad
\left[F^{-1}\right]_{ab} = \frac1\lambda \left(\delta_{ab} - W_a^T W_b\right)
$$

$W$ is never kept: two passes over $G$ make a product, one makes the diagonal.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.inverse._columns import Columns
from curvax.fisher.inverse._factor import gram, inverse_factor, squares_below
from curvax.fisher.window._dense import leaf_combine, leaf_dots, pairwise_sum


class Part(NamedTuple):
    """Some columns of one leaf on the device; ``start`` is None where they are the whole leaf."""

    leaf: int
    start: int | None
    rows: jax.Array

    @property
    def on_one_device(self) -> bool:
        return len(self.rows.sharding.device_set) == 1

    def of(self, vector: jax.Array) -> jax.Array:
        """The entries of a leaf's vector that belong to these columns."""
        if self.start is None:
            return vector
        return vector.reshape(-1)[self.start : self.start + self.rows.shape[1]]


class FullInverse:
    """$F^{-1}$ over all columns; a leaf on devices keeps its sharding, a NumPy one is streamed."""

    def __init__(
        self,
        columns: Columns,
        damping: float,
        *,
        workspace_bytes: int,
        kept: Sequence[jax.Array] | None = None,
    ) -> None:
        r"""Factors $K$.

        Args:
          columns: the gradients.
          damping: $\lambda$.
          workspace_bytes: about how much memory the columns on the device may take at a time.
          kept: for each leaf a bool for each entry: the others count as zeros in $K$.
        """
        self.columns = columns
        self._damping = damping
        self._workspace_bytes = workspace_bytes
        self._mask = kept
        size = columns.num_rows
        total = jnp.zeros((size, size), columns.dtype)
        for part in self._parts():
            total = total + gram(self._kept(part), in_chunks=part.on_one_device)
        shift = size * damping * jnp.eye(size, dtype=columns.dtype)
        self._factor, self.failed = jax.jit(inverse_factor)(total + shift)

    def _parts(self) -> Iterator[Part]:
        columns = self.columns
        width = max(
            1, self._workspace_bytes // (columns.num_rows * jnp.dtype(columns.dtype).itemsize)
        )
        for index, leaf in enumerate(columns.leaves):
            if not leaf.size:
                continue
            if not isinstance(leaf, np.ndarray):
                yield Part(index, None, leaf.astype(columns.dtype))
                continue
            flat = leaf.reshape(len(leaf), -1)
            for start in range(0, flat.shape[1], width):
                rows = jnp.asarray(flat[:, start : start + width], columns.dtype)
                yield Part(index, start, rows)

    def _kept(self, part: Part) -> jax.Array:
        return part.rows if self._mask is None else part.rows * part.of(self._mask[part.leaf])

    def _assemble(self, pieces: Iterator[tuple[int, jax.Array]]) -> list[jax.Array]:
        """Leaves from the pieces of each, in order."""
        collected: list[list[jax.Array]] = [[] for _ in self.columns.leaves]
        for index, piece in pieces:
            collected[index].append(piece)
        pairs = zip(collected, self.columns.shapes, strict=True)
        return [_join(parts, shape, self.columns.dtype) for parts, shape in pairs]

    def solve(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        weights = self._weights(vectors)

        def piece(part: Part) -> jax.Array:
            vector = part.of(vectors[part.leaf])
            return (vector - leaf_combine(part.rows, weights, vector)) / self._damping

        return self._assemble((part.leaf, piece(part)) for part in self._parts())

    def compensate(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        r"""$G_S^T K_S^{-1} G v$ over the kept columns $S$: how they compensate for $v$."""
        weights = self._weights(vectors)
        return self._assemble(
            (part.leaf, leaf_combine(self._kept(part), weights, part.of(vectors[part.leaf])))
            for part in self._parts()
        )

    def _weights(self, vectors: Sequence[jax.Array]) -> jax.Array:
        """$K^{-1} G v$."""
        sums = [leaf_dots(part.rows, part.of(vectors[part.leaf])) for part in self._parts()]
        products = pairwise_sum(jnp.stack(sums, axis=1))
        return _apply(self._factor.T, _apply(self._factor, products))

    def diagonal(self) -> list[jax.Array]:
        def piece(part: Part) -> jax.Array:
            return guarded_diagonal(
                self._factor, part.rows, self._damping, in_chunks=part.on_one_device
            )

        return self._assemble((part.leaf, piece(part)) for part in self._parts())

    def element(self, i: int, j: int) -> jax.Array:
        first, second = (self.columns.take(index, 1)[:, 0] for index in (i, j))
        return dual_element(self._factor, first, second, self._damping, on_diagonal=i == j)


def dual_element(
    factor: jax.Array, first: jax.Array, second: jax.Array, damping: float, *, on_diagonal: bool
) -> jax.Array:
    """An entry from two columns of the gradients; on the diagonal, clipped to its bounds."""
    if on_diagonal:
        return guarded_diagonal(factor, first[:, jnp.newaxis], damping, in_chunks=False)[0]
    return -jnp.sum(_apply(factor, first) * _apply(factor, second)) / damping


@partial(jax.jit, static_argnames="in_chunks")
def guarded_diagonal(
    factor: jax.Array, rows: jax.Array, damping: float, *, in_chunks: bool
) -> jax.Array:
    r"""The diagonal of $F^{-1}$, clipped to its exact bounds.

    $1 / F_{ii} \le [F^{-1}]_{ii} \le 1 / \lambda$: the difference that gives the entry loses
    digits where it is small, and could even be negative.
    """
    projected, squares = squares_below(factor, rows, in_chunks=in_chunks)
    entry = (1 - projected) / damping
    return jnp.clip(entry, 1 / (damping + squares / len(rows)), 1 / damping)


@jax.jit
def _apply(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, vector, precision=HIGHEST)


def _join(parts: list[jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not parts:
        return jnp.zeros(shape, dtype)
    return (
        parts[0]
        if len(parts) == 1 and parts[0].shape == shape
        else (jnp.concatenate(parts).reshape(shape))
    )
