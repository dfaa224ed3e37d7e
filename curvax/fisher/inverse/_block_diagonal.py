r"""The inverse of a block-diagonal empirical Fisher matrix, many blocks at a time.

A block of $B$ columns is inverted through the smaller of two matrices: the block itself,
$A = \lambda I + \frac1m G_b^T G_b$ ($B \times B$), or its dual $K = m \lambda I + G_b G_b^T$
($m \times m$). The first subtracts nothing, so it is preferred where both have the same size.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.inverse._column_blocks import ColumnBlocks
from curvax.fisher.inverse._columns import Columns
from curvax.fisher.inverse._factor import gram, inverse_factor
from curvax.fisher.inverse._full import dual_element, guarded_diagonal


class BlockInverse:
    """$F^{-1}$ of consecutive blocks of columns, in batches: ``(n, m, B)`` rows at a time.

    Attributes:
      columns: the gradients; for a stream its first chunk, which determines the shapes.
      failed: for each block, whether its diagonal had to be raised.
    """

    def __init__(
        self,
        columns: Columns,
        damping: float,
        block_size: int,
        *,
        workspace_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
        later_chunks: Iterable[Columns] | None = None,
    ) -> None:
        r"""Factors all blocks.

        Args:
          columns: the gradients.
          damping: $\lambda$.
          block_size: $B$.
          workspace_bytes: about how much memory the rows and matrices of a batch may take.
          mesh: devices over all of which the blocks of a batch are spread.
          later_chunks: further rows, each added to the blocks $G_b^T G_b$ and discarded.
        """
        self.columns = columns
        self._damping = damping
        size = min(block_size, columns.num_columns)
        self.primal = later_chunks is not None or size <= columns.num_rows
        side = size if self.primal else columns.num_rows
        self._blocks = ColumnBlocks(
            columns, size, side=side, workspace_bytes=workspace_bytes, mesh=mesh
        )
        self.num_rows = columns.num_rows
        over_devices = self._blocks.over_devices
        if later_chunks is not None:
            matrices = self._sum_of_chunks(columns, later_chunks)
            shift = damping * self.num_rows
            factored = (over_devices(_factor)(matrix, shift) for matrix in matrices)
        else:
            kernel = over_devices(factor_primal if self.primal else factor_dual)
            shift = damping * self.num_rows
            factored = (kernel(rows, shift) for rows in self._blocks.all_rows())
        # The factors are as large as the gradients, so they are kept where those are.
        keep: Callable[[Any], Any] = np.asarray if columns.on_host() else lambda array: array
        pairs = [(keep(factor), failed) for factor, failed in factored]
        self._factors = [factor for factor, _ in pairs]
        self.failed = jnp.concatenate([failed for _, failed in pairs])

    def solve(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        kernel = self._blocks.over_devices(_solve_primal if self.primal else _solve_dual)
        parts = zip(self._blocks.vectors(vectors), self._factors, self._blocks.starts, strict=True)
        if self.primal:
            return self._blocks.leaves([kernel(v, factor, self.num_rows) for v, factor, _ in parts])
        return self._blocks.leaves(
            [kernel(v, factor, self._blocks.rows(s), self._damping) for v, factor, s in parts]
        )

    def diagonal(self) -> list[jax.Array]:
        kernel = self._blocks.over_devices(_diagonal_primal if self.primal else _diagonal_dual)
        if self.primal:
            pieces = [kernel(factor, self.num_rows, self._damping) for factor in self._factors]
        else:
            pairs = zip(self._factors, self._blocks.all_rows(), strict=True)
            pieces = [kernel(factor, rows, self._damping) for factor, rows in pairs]
        return self._blocks.leaves(pieces)

    def element(self, i: int, j: int) -> jax.Array:
        block, place = divmod(i, self._blocks.size)
        other, other_place = divmod(j, self._blocks.size)
        if block != other:
            return jnp.zeros((), self.columns.dtype)
        batch, place_in_batch = divmod(block, self._blocks.number)
        factor = jnp.asarray(self._factors[batch][place_in_batch])
        if self.primal:
            return self.num_rows * jnp.sum(factor[:, place] * factor[:, other_place])
        first, second = (self.columns.take(index, 1)[:, 0] for index in (i, j))
        return dual_element(factor, first, second, self._damping, on_diagonal=i == j)

    def _sum_of_chunks(self, first: Columns, later: Iterable[Columns]) -> list[jax.Array]:
        """$G_b^T G_b$ of all rows, batch by batch."""
        blocks = self._blocks
        add = blocks.over_devices(_add_products)
        shape = (blocks.number, blocks.size, blocks.size)
        matrices = [jnp.zeros(shape, first.dtype) for _ in blocks.starts]
        for index, start in enumerate(blocks.starts):
            matrices[index] = add(matrices[index], blocks.rows(start, first))
        for chunk in later:
            self.num_rows += chunk.num_rows
            for index, start in enumerate(blocks.starts):
                matrices[index] = add(matrices[index], blocks.rows(start, chunk))
        return matrices


def squares_of_blocks(rows: jax.Array) -> jax.Array:
    """$G_b^T G_b$ of each block."""
    return jnp.einsum("nmi,nmj->nij", rows, rows, precision=HIGHEST)


def shifted(matrix: jax.Array, shift: Any) -> jax.Array:
    """Matrices with ``shift`` added to their diagonals."""
    return matrix + shift * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


@jax.jit
def _add_products(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total + squares_of_blocks(rows)


# The factors below are of m A and of K, both with m times the damping on the diagonal.


@jax.jit
def _factor(products: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    return inverse_factor(shifted(products, shift))


@jax.jit
def factor_primal(rows: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    """The inverse factor of $m A$, and where it failed."""
    return inverse_factor(shifted(squares_of_blocks(rows), shift))


@jax.jit
def factor_dual(rows: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    """The inverse factor of $K$, and where it failed."""
    return inverse_factor(shifted(jax.lax.map(partial(gram, in_chunks=True), rows), shift))


def apply_inverse(factor: jax.Array, vector: jax.Array) -> jax.Array:
    """$C^{-T} C^{-1} v$ in each block."""
    projected = jnp.einsum("nij,nj->ni", factor, vector, precision=HIGHEST)
    return jnp.einsum("nij,ni->nj", factor, projected, precision=HIGHEST)


@jax.jit
def _solve_primal(vector: jax.Array, factor: jax.Array, num_rows: Any) -> jax.Array:
    return num_rows * apply_inverse(factor, vector)


@jax.jit
def _solve_dual(vector: jax.Array, factor: jax.Array, rows: jax.Array, damping: Any) -> jax.Array:
    products = jnp.einsum("nmb,nb->nm", rows, vector, precision=HIGHEST)
    weights = apply_inverse(factor, products)
    return (vector - jnp.einsum("nmb,nm->nb", rows, weights, precision=HIGHEST)) / damping


@jax.jit
def _diagonal_primal(factor: jax.Array, num_rows: Any, damping: Any) -> jax.Array:
    return jnp.minimum(num_rows * jnp.sum(factor**2, axis=1), 1 / damping)


@jax.jit
def _diagonal_dual(factor: jax.Array, rows: jax.Array, damping: Any) -> jax.Array:
    diagonal = partial(guarded_diagonal, damping=damping, in_chunks=True)
    return jax.lax.map(lambda pair: diagonal(*pair), (factor, rows))
