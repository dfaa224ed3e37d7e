r"""The inverse of a block-diagonal empirical Fisher matrix, many blocks at a time.

A block of $B$ columns is inverted through the smaller of two matrices: the block itself,
$A = \lambda I + \frac1m G_b^T G_b$ ($B \times B$), or its dual $K = m \lambda I + G_b G_b^T$
($m \times m$). The first subtracts nothing, so it is also taken where both are equal in size. A
ragged tail is filled up with columns of zeros, which the others do not notice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher._columns import Columns
from curvax.fisher._full_inverse import guarded_diagonal
from curvax.fisher._inverse_factor import gram, inverse_factor


class BlockInverse:
    """$F^{-1}$ of consecutive blocks of columns, in batches: ``(n, m, B)`` rows at a time.

    Attributes:
      columns: the gradients; of a stream, its first chunk, which says the shapes.
      failed: for each block, whether its diagonal had to be raised.
    """

    def __init__(
        self,
        columns: Columns,
        damping: float,
        block_size: int,
        *,
        batch_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
        later_chunks: Iterable[Columns] | None = None,
        kept: Sequence[jax.Array] | None = None,
    ) -> None:
        r"""Factors all blocks.

        Args:
          columns: the gradients.
          damping: $\lambda$.
          block_size: $B$.
          batch_bytes: about what the rows and matrices of a batch may take.
          mesh: devices over all of which the blocks of a batch are spread.
          later_chunks: further rows, each added to the blocks $G_b^T G_b$ and forgotten.
          kept: for each leaf a bool for each entry: columns without it count as zeros.
        """
        self.columns = columns
        self._damping = damping
        # Blocks are cut from flat columns, which automatic axes allow.
        self._mesh = None if mesh is None else _automatic(mesh)
        self._mask = None if kept is None else self._one_row(kept)
        self._size = min(block_size, columns.num_columns)
        streamed = later_chunks is not None
        self.primal = streamed or self._size <= columns.num_rows
        self._number = self._blocks_in_batch(batch_bytes)
        self._starts = range(0, columns.num_columns, self._number * self._size)
        self.num_rows = columns.num_rows
        if later_chunks is not None:
            matrices = self._sum_of_chunks(columns, later_chunks)
            shift = damping * self.num_rows
            factored = (self._over_devices(_factor)(matrix, shift) for matrix in matrices)
        else:
            kernel = _primal if self.primal else _dual
            shift = damping * self.num_rows
            factored = (self._over_devices(kernel)(self._kept(s), shift) for s in self._starts)
        # What is kept is as large as the gradients, so it goes where they are.
        keep: Callable[[Any], Any] = np.asarray if columns.on_host() else lambda array: array
        pairs = [(keep(factor), failed) for factor, failed in factored]
        self._factors = [factor for factor, _ in pairs]
        self.failed = jnp.concatenate([failed for _, failed in pairs])

    def solve(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        vector = self._one_row(vectors)
        pieces = []
        for start, factor in zip(self._starts, self._factors, strict=True):
            part = self._rows(start, vector)[:, 0]
            if self.primal:
                piece = self._over_devices(_solve_primal)(part, factor, self.num_rows)
            else:
                rows = self._rows(start)
                piece = self._over_devices(_solve_dual)(part, factor, rows, self._damping)
            pieces.append(piece.reshape(-1))
        return self._leaves(pieces)

    def compensate(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        r"""$G_S^T K_S^{-1} G v$ in each block, over its kept columns $S$."""
        vector = self._one_row(vectors)
        kernel = _compensate_primal if self.primal else _compensate_dual
        pieces = []
        for start, factor in zip(self._starts, self._factors, strict=True):
            part = self._rows(start, vector)[:, 0]
            rows, kept = self._rows(start), self._kept(start)
            pieces.append(self._over_devices(kernel)(part, factor, rows, kept).reshape(-1))
        return self._leaves(pieces)

    def inverse_blocks(self) -> Iterator[jax.Array]:
        """The blocks of $F^{-1}$ themselves, a batch of shape (n, B, B) at a time."""
        for start, factor in zip(self._starts, self._factors, strict=True):
            if self.primal:
                yield self._over_devices(_inverse_primal)(factor, self.num_rows)
            else:
                rows = self._rows(start)
                yield self._over_devices(_inverse_dual)(factor, rows, self._damping)

    def in_blocks(self, vectors: Sequence[jax.Array]) -> Iterator[jax.Array]:
        """A vector as the blocks see it, a batch of shape (n, B) at a time."""
        vector = self._one_row(vectors)
        return (self._rows(start, vector)[:, 0] for start in self._starts)

    def from_blocks(self, pieces: Iterable[jax.Array]) -> list[jax.Array]:
        """Leaves from batches of shape (n, B)."""
        return self._leaves([piece.reshape(-1) for piece in pieces])

    def diagonal(self) -> list[jax.Array]:
        pieces = []
        for start, factor in zip(self._starts, self._factors, strict=True):
            if self.primal:
                piece = self._over_devices(_diagonal_primal)(factor, self.num_rows, self._damping)
            else:
                piece = self._over_devices(_diagonal_dual)(factor, self._rows(start), self._damping)
            pieces.append(piece.reshape(-1))
        return self._leaves(pieces)

    def element(self, i: int, j: int) -> jax.Array:
        block, place = divmod(i, self._size)
        other, other_place = divmod(j, self._size)
        if block != other:
            return jnp.zeros((), self.columns.dtype)
        batch, index = divmod(block, self._number)
        factor = jnp.asarray(self._factors[batch][index])
        if self.primal:
            return self.num_rows * jnp.sum(factor[:, place] * factor[:, other_place])
        first, second = (
            jnp.matmul(factor, self.columns.take(k, 1)[:, 0], precision=HIGHEST) for k in (i, j)
        )
        return ((i == j) - jnp.sum(first * second)) / self._damping

    def _blocks_in_batch(self, batch_bytes: int) -> int:
        """As many blocks as the bytes allow, in batches of one size, for any number of devices."""
        side = self._size if self.primal else self.columns.num_rows
        itemsize = jnp.dtype(self.columns.dtype).itemsize
        block_bytes = (2 * self.columns.num_rows * self._size + 3 * side**2) * itemsize
        total = -(-self.columns.num_columns // self._size)
        number = min(total, max(1, batch_bytes // block_bytes))
        number = -(-total // -(-total // number))
        devices = 1 if self._mesh is None else self._mesh.size
        return -(-number // devices) * devices

    def _rows(self, start: int, columns: Columns | None = None) -> jax.Array:
        """A batch of rows from column ``start`` on, of shape (n, m, B)."""
        columns = columns or self.columns
        flat = columns.take(start, self._number * self._size)
        return _as_blocks(flat, self._number)

    def _kept(self, start: int) -> jax.Array:
        rows = self._rows(start)
        return rows if self._mask is None else rows * self._rows(start, self._mask)

    def _one_row(self, vectors: Sequence[jax.Array]) -> Columns:
        return Columns([leaf[jnp.newaxis] for leaf in vectors], self.columns.dtype)

    def _sum_of_chunks(self, first: Columns, later: Iterable[Columns]) -> list[jax.Array]:
        """$G_b^T G_b$ of all rows, batch by batch."""
        add = self._over_devices(_add_products)
        shape = (self._number, self._size, self._size)
        matrices = [jnp.zeros(shape, first.dtype) for _ in self._starts]
        for index, start in enumerate(self._starts):
            matrices[index] = add(matrices[index], self._rows(start, first))
        for chunk in later:
            self.num_rows += chunk.num_rows
            for index, start in enumerate(self._starts):
                matrices[index] = add(matrices[index], self._rows(start, chunk))
        return matrices

    def _over_devices(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel on a batch, each device of the mesh with blocks of its own."""
        if self._mesh is None:
            return kernel
        mesh, blocks = self._mesh, jax.P(self._mesh.axis_names)

        def spread(*args: Any) -> Any:
            specs = tuple(blocks if jnp.ndim(arg) else jax.P() for arg in args)
            placed = [
                jax.device_put(arg, jax.NamedSharding(mesh, spec))
                for arg, spec in zip(args, specs, strict=True)
            ]
            mapped = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=blocks)
            return jax.jit(mapped)(*placed)

        return spread

    def _leaves(self, pieces: list[jax.Array]) -> list[jax.Array]:
        flat = jnp.concatenate(pieces)[: self.columns.num_columns]
        return [leaf[0] for leaf in self.columns.split(flat[jnp.newaxis])]


def _automatic(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


@partial(jax.jit, static_argnums=1)
def _as_blocks(flat: jax.Array, number: int) -> jax.Array:
    return flat.reshape(len(flat), number, -1).transpose(1, 0, 2)


def _products(rows: jax.Array) -> jax.Array:
    """$G_b^T G_b$ of each block."""
    return jnp.einsum("nmi,nmj->nij", rows, rows, precision=HIGHEST)


def _shifted(matrix: jax.Array, shift: Any) -> jax.Array:
    return matrix + shift * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


@jax.jit
def _add_products(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total + _products(rows)


# The factors below are of m A and of K, both with m times the damping on the diagonal.


@jax.jit
def _factor(products: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    return inverse_factor(_shifted(products, shift))


@jax.jit
def _primal(rows: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    return inverse_factor(_shifted(_products(rows), shift))


@jax.jit
def _dual(rows: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    return inverse_factor(_shifted(jax.lax.map(partial(gram, in_chunks=True), rows), shift))


@jax.jit
def _solve_primal(vector: jax.Array, factor: jax.Array, num_rows: Any) -> jax.Array:
    projected = jnp.einsum("nij,nj->ni", factor, vector, precision=HIGHEST)
    return num_rows * jnp.einsum("nij,ni->nj", factor, projected, precision=HIGHEST)


@jax.jit
def _solve_dual(vector: jax.Array, factor: jax.Array, rows: jax.Array, damping: Any) -> jax.Array:
    products = jnp.einsum("nmb,nb->nm", rows, vector, precision=HIGHEST)
    projected = jnp.einsum("nkm,nm->nk", factor, products, precision=HIGHEST)
    weights = jnp.einsum("nkm,nk->nm", factor, projected, precision=HIGHEST)
    return (vector - jnp.einsum("nmb,nm->nb", rows, weights, precision=HIGHEST)) / damping


@jax.jit
def _compensate_primal(
    vector: jax.Array, factor: jax.Array, rows: jax.Array, kept: jax.Array
) -> jax.Array:
    products = jnp.einsum("nmb,nb->nm", rows, vector, precision=HIGHEST)
    return _solve_primal(jnp.einsum("nmb,nm->nb", kept, products, precision=HIGHEST), factor, 1)


@jax.jit
def _compensate_dual(
    vector: jax.Array, factor: jax.Array, rows: jax.Array, kept: jax.Array
) -> jax.Array:
    products = jnp.einsum("nmb,nb->nm", rows, vector, precision=HIGHEST)
    projected = jnp.einsum("nkm,nm->nk", factor, products, precision=HIGHEST)
    weights = jnp.einsum("nkm,nk->nm", factor, projected, precision=HIGHEST)
    return jnp.einsum("nmb,nm->nb", kept, weights, precision=HIGHEST)


@jax.jit
def _inverse_primal(factor: jax.Array, num_rows: Any) -> jax.Array:
    return num_rows * jnp.einsum("nki,nkj->nij", factor, factor, precision=HIGHEST)


@jax.jit
def _inverse_dual(factor: jax.Array, rows: jax.Array, damping: Any) -> jax.Array:
    projected = jnp.einsum("nkm,nmb->nkb", factor, rows, precision=HIGHEST)
    spanned = jnp.einsum("nki,nkj->nij", projected, projected, precision=HIGHEST)
    return (jnp.eye(rows.shape[-1], dtype=rows.dtype) - spanned) / damping


@jax.jit
def _diagonal_primal(factor: jax.Array, num_rows: Any, damping: Any) -> jax.Array:
    return jnp.minimum(num_rows * jnp.sum(factor**2, axis=1), 1 / damping)


@jax.jit
def _diagonal_dual(factor: jax.Array, rows: jax.Array, damping: Any) -> jax.Array:
    diagonal = partial(guarded_diagonal, damping=damping, in_chunks=True)
    return jax.lax.map(lambda pair: diagonal(*pair), (factor, rows))
