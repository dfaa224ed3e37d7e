r"""The inverse of a block-diagonal empirical Fisher matrix, many blocks at a time.

A block of $B$ columns is inverted through the smaller of two matrices: the block itself,
$n A = n \lambda I + G_b^H G_b$ ($B \times B$), or its dual $K = n \lambda I + G_b G_b^H$
($m \times m$). The first subtracts nothing, so it is preferred where both have the same size. For
the second see `curvax.fisher.inverse._full`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST, InverseFactor, inverse_factor
from curvax.fisher.inverse._column_blocks import ColumnBlocks
from curvax.fisher.inverse._columns import Columns, Layout
from curvax.fisher.inverse._full import dual_element, guarded_diagonal, normal_leaves
from curvax.fisher.inverse._gram import gram

Leaves = Sequence[jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "factors", "damping", "normalizer"],
    meta_fields=["blocks", "primal"],
)
@dataclasses.dataclass(frozen=True)
class BlockInverse:
    r"""$F^{-1}$ of consecutive blocks of columns, in batches: ``(n, m, B)`` rows at a time.

    Attributes:
      columns: $G$; None for a stream, which is not kept.
      factors: the inverse factors of each batch: of $n A$ if ``primal``, else of $K$.
      damping: $\lambda$.
      normalizer: $n$.
      blocks: how the columns are cut.
      primal: which form is factored.
    """

    columns: Columns | None
    factors: tuple[InverseFactor, ...]
    damping: jax.Array
    normalizer: jax.Array
    blocks: ColumnBlocks
    primal: bool

    @classmethod
    def of(
        cls,
        columns: Columns,
        damping: jax.Array,
        normalizer: jax.Array,
        block_size: int,
        *,
        workspace_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "BlockInverse":
        """Factors all blocks of columns that are kept."""
        size = min(block_size, columns.num_columns)
        primal = size <= columns.num_rows
        blocks = ColumnBlocks.of(
            columns,
            size,
            side=min(size, columns.num_rows),
            workspace_bytes=workspace_bytes,
            mesh=mesh,
        )
        kernel = blocks.over_devices(factor_primal if primal else factor_dual)
        shift = damping * normalizer
        factors = (kernel(rows, shift) for rows in blocks.all_rows(columns))
        # The factors are as large as the gradients, so they are kept where those are.
        kept = tuple(_on_host(factor) if columns.on_host() else factor for factor in factors)
        return cls(columns, kept, damping, normalizer, blocks, primal)

    @classmethod
    def of_stream(
        cls,
        chunks: Iterator[Columns],
        damping: jax.Array,
        block_size: int,
        *,
        workspace_bytes: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "BlockInverse":
        """Adds chunks of rows to the blocks $G_b^H G_b$, discards them, and factors the sums."""
        first = next(chunks)
        size = min(block_size, first.num_columns)
        blocks = ColumnBlocks.of(first, size, side=size, workspace_bytes=workspace_bytes, mesh=mesh)
        number, matrices = _sums_of_chunks(blocks, first, chunks)
        normalizer = jnp.asarray(number, damping.dtype)
        kernel = blocks.over_devices(_factor)
        factors = (kernel(matrix, damping * normalizer) for matrix in matrices)
        kept = tuple(_on_host(factor) if first.on_host() else factor for factor in factors)
        return cls(None, kept, damping, normalizer, blocks, primal=True)

    @property
    def takes_complex_samples(self) -> bool:
        return self._kept_columns().takes_complex_samples

    @property
    def failed(self) -> jax.Array:
        return jnp.concatenate([factor.failed for factor in self.factors])

    @property
    def layout(self) -> Layout:
        return self.blocks.layout

    def solve(self, vectors: Leaves) -> list[jax.Array]:
        """$F^{-1} v$."""
        return self._leaves(_solve_primal, _solve_dual, self.blocks.vectors(vectors))

    def solve_in_sample_space(self, samples: jax.Array) -> list[jax.Array]:
        """$F^{-1} G^H s$ for each row of an array (k, m): leaves of shape ``(k, *shape)``."""
        columns = self._kept_columns()
        samples = columns.preparation.samples(samples, columns.dtype)
        kernel = self.blocks.over_devices(_samples_primal if self.primal else _samples_dual)
        # An array with an axis would be spread over devices as blocks are.
        samples = jnp.broadcast_to(samples, (self.blocks.number, *samples.shape))
        batches = zip(self._rows(), self.factors, strict=True)
        return self.blocks.leaves(
            [kernel(rows, factor, samples, self.normalizer) for rows, factor in batches]
        )

    def quadratic_form(self, vectors: Leaves) -> jax.Array:
        """$v^H F^{-1} v$, a sum of squares and so never negative."""
        batches = self.blocks.vectors(vectors)
        return sum(
            map(jnp.sum, self._apply(_form_primal, _form_dual, batches)),
            start=jnp.zeros((), self.damping.dtype),
        )

    def logdet(self) -> jax.Array:
        r"""$\log \det F$."""
        blocks, size = self.blocks, self.factors[0].matrix.shape[-1]
        number = len(self.factors) * blocks.number
        inside = sum(jnp.sum(factor.logdet()) for factor in self.factors)
        if self.primal:
            inside -= number * size * jnp.log(self.normalizer)
            return inside - blocks.num_padded * jnp.log(self.damping)
        inside -= number * size * jnp.log(self.normalizer * self.damping)
        return inside + self.layout.num_columns * jnp.log(self.damping)

    def sample(self, key: jax.Array) -> list[jax.Array]:
        r"""A draw of $N(0, F^{-1})$: $\sqrt n\, C^{-H} z$, or as for one matrix."""
        first, second = jax.random.split(key)
        batches = self.blocks.vectors(normal_leaves(first, self.layout))
        if self.primal:
            return self._leaves(_sample_primal, _sample_primal, batches)
        shape = (self.blocks.number, self._kept_columns().num_rows)
        keys = jax.random.split(second, len(self.factors))
        inside = (jax.random.normal(batch_key, shape, self.layout.dtype) for batch_key in keys)
        kernel = self.blocks.over_devices(_sample_dual)
        pieces = [
            kernel(*batch, self.damping, self.normalizer)
            for batch in zip(batches, self.factors, self._rows(), inside, strict=True)
        ]
        return self.blocks.leaves(pieces)

    def diagonal(self) -> list[jax.Array]:
        """The diagonal of $F^{-1}$."""
        options = self.damping, self.normalizer
        if self.primal:
            kernel = self.blocks.over_devices(_diagonal_primal)
            return self.blocks.leaves([kernel(factor, *options) for factor in self.factors])
        kernel = self.blocks.over_devices(_diagonal_dual)
        batches = zip(self.factors, self._rows(), strict=True)
        return self.blocks.leaves([kernel(factor, rows, *options) for factor, rows in batches])

    def element(self, i: int, j: int) -> jax.Array:
        """$[F^{-1}]_{ij}$."""
        block, place = divmod(i, self.blocks.size)
        other, other_place = divmod(j, self.blocks.size)
        if block != other:
            return jnp.zeros((), self.layout.dtype)
        batch, place_in_batch = divmod(block, self.blocks.number)
        factor = jax.tree.map(lambda array: jnp.asarray(array[place_in_batch]), self.factors[batch])
        if self.primal:
            pair = factor.matrix[:, place], factor.matrix[:, other_place]
            return self.normalizer * jnp.vdot(*pair, precision=HIGHEST)
        columns = self._kept_columns()
        first, second = (columns.take(index, 1)[:, 0] for index in (i, j))
        options = self.damping, self.normalizer
        return dual_element(factor, first, second, *options, on_diagonal=i == j)

    def _leaves(self, primal: Any, dual: Any, batches: Iterator[jax.Array]) -> list[jax.Array]:
        return self.blocks.leaves(list(self._apply(primal, dual, batches)))

    def _apply(self, primal: Any, dual: Any, batches: Iterator[jax.Array]) -> Iterator[jax.Array]:
        """What a kernel makes of batches of a vector."""
        if self.primal:
            kernel = self.blocks.over_devices(primal)
            for vector, factor in zip(batches, self.factors, strict=True):
                yield kernel(vector, factor, self.normalizer)
            return
        kernel = self.blocks.over_devices(dual)
        for vector, factor, rows in zip(batches, self.factors, self._rows(), strict=True):
            yield kernel(vector, factor, rows, self.damping, self.normalizer)

    def _rows(self) -> Iterator[jax.Array]:
        return self.blocks.all_rows(self._kept_columns())

    def _kept_columns(self) -> Columns:
        if self.columns is None:
            raise ValueError(
                "a product in sample space needs the gradients, but those of a stream are not "
                "kept: pass arrays or np.memmap arrays in place of the iterator."
            )
        return self.columns


def _on_host(factor: InverseFactor) -> InverseFactor:
    matrix, failed = jax.device_get(factor)
    return InverseFactor(matrix, failed)


def _sums_of_chunks(
    blocks: ColumnBlocks, first: Columns, later: Iterable[Columns]
) -> tuple[int, list[jax.Array]]:
    """The number of rows, and $G_b^H G_b$ of all of them, batch by batch."""
    add = blocks.over_devices(_add_products)
    shape = (blocks.number, blocks.size, blocks.size)
    matrices = [
        add(jnp.zeros(shape, first.dtype), blocks.rows(first, start)) for start in blocks.starts
    ]
    number = first.num_rows
    for chunk in later:
        number += chunk.num_rows
        for index, start in enumerate(blocks.starts):
            matrices[index] = add(matrices[index], blocks.rows(chunk, start))
    return number, matrices


def squares_of_blocks(rows: jax.Array) -> jax.Array:
    """$G_b^H G_b$ of each block."""
    return jnp.einsum("nmi,nmj->nij", jnp.conj(rows), rows, precision=HIGHEST)


def shifted(matrix: jax.Array, shift: Any) -> jax.Array:
    """Matrices with ``shift`` added to their diagonals."""
    return matrix + shift * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


@jax.jit
def _add_products(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total + squares_of_blocks(rows)


# The factors below are of n A and of K, both with n times the damping on the diagonal.


@jax.jit
def _factor(products: jax.Array, shift: Any) -> InverseFactor:
    return inverse_factor(shifted(products, shift))


@jax.jit
def factor_primal(rows: jax.Array, shift: Any) -> InverseFactor:
    """The inverse factor of $n A$."""
    return inverse_factor(shifted(squares_of_blocks(rows), shift))


@jax.jit
def factor_dual(rows: jax.Array, shift: Any) -> InverseFactor:
    """The inverse factor of $K$."""
    return inverse_factor(shifted(jax.lax.map(gram, rows), shift))


def apply_inverse(factor: InverseFactor, vectors: jax.Array) -> jax.Array:
    """$C^{-H} C^{-1} v$ in each block, for vectors (n, k)."""
    return factor.solve(vectors[..., jnp.newaxis])[..., 0]


def dots(rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """$G_b v$ in each block."""
    return jnp.einsum("nmb,nb->nm", rows, vectors, precision=HIGHEST)


def combine(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """$G_b^H x$ in each block."""
    return jnp.einsum("nmb,nm->nb", jnp.conj(rows), weights, precision=HIGHEST)


@jax.jit
def _solve_primal(vector: jax.Array, factor: InverseFactor, normalizer: Any) -> jax.Array:
    return normalizer * apply_inverse(factor, vector)


@jax.jit
def _solve_dual(
    vector: jax.Array, factor: InverseFactor, rows: jax.Array, damping: Any, normalizer: Any
) -> jax.Array:
    inside, rest = _split(vector, factor, rows)
    weights = apply_inverse(factor, normalizer * inside - dots(rows, rest) / damping)
    return rest / damping + combine(rows, weights)


def _split(
    vector: jax.Array, factor: InverseFactor, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    coefficients = apply_inverse(factor, dots(rows, vector))
    return coefficients, vector - combine(rows, coefficients)


@jax.jit
def _form_primal(vector: jax.Array, factor: InverseFactor, normalizer: Any) -> jax.Array:
    image = factor.forward(vector[..., jnp.newaxis])[..., 0]
    return normalizer * _sums_of_squares(image)


@jax.jit
def _form_dual(
    vector: jax.Array, factor: InverseFactor, rows: jax.Array, damping: Any, normalizer: Any
) -> jax.Array:
    inside, rest = _split(vector, factor, rows)
    return _sums_of_squares(rest) / damping + normalizer * _sums_of_squares(inside)


def _sums_of_squares(vectors: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(vectors)), axis=-1)


@jax.jit
def _samples_primal(
    rows: jax.Array, factor: InverseFactor, samples: jax.Array, normalizer: Any
) -> jax.Array:
    target = jnp.einsum("nmb,nkm->nbk", jnp.conj(rows), samples, precision=HIGHEST)
    return normalizer * jnp.swapaxes(factor.solve(target), 1, 2)


@jax.jit
def _samples_dual(
    rows: jax.Array, factor: InverseFactor, samples: jax.Array, normalizer: Any
) -> jax.Array:
    weights = normalizer * factor.solve(jnp.swapaxes(samples, 1, 2))
    return jnp.einsum("nmb,nmk->nkb", jnp.conj(rows), weights, precision=HIGHEST)


@jax.jit
def _sample_primal(white: jax.Array, factor: InverseFactor, normalizer: Any) -> jax.Array:
    return jnp.sqrt(normalizer) * factor.backward(white[..., jnp.newaxis])[..., 0]


@jax.jit
def _sample_dual(
    white: jax.Array,
    factor: InverseFactor,
    rows: jax.Array,
    inside: jax.Array,
    damping: Any,
    normalizer: Any,
) -> jax.Array:
    outside = white / jnp.sqrt(damping)
    target = jnp.sqrt(normalizer) * inside - dots(rows, outside)
    return outside + combine(rows, apply_inverse(factor, target))


@jax.jit
def _diagonal_primal(factor: InverseFactor, damping: Any, normalizer: Any) -> jax.Array:
    squares = jnp.sum(jnp.square(jnp.abs(factor.matrix)), axis=1)
    return jnp.minimum(normalizer * squares, 1 / damping)


@jax.jit
def _diagonal_dual(
    factor: InverseFactor, rows: jax.Array, damping: Any, normalizer: Any
) -> jax.Array:
    def diagonal(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return guarded_diagonal(*pair, damping, normalizer)

    return jax.lax.map(diagonal, (factor.matrix, rows))
