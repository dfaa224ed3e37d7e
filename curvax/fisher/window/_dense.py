r"""The sliding window of gradients: the rows of $G$, kept leaf by leaf.

A window has two passes over its memory, $G v$ (`Window.dots`) and $G^T x$ (`Window.combine`),
and one write of a row (`Window.push`). Nothing is flattened: a leaf's rows have shape
``(m, *leaf.shape)`` and its sharding behind an unsharded first axis, so that $G v$ sums a few
numbers for each row over devices and nothing else moves.

On a CPU a vector is contracted as a few columns in one pass. With float32 rows these are disjoint
parts of it, whose sums round less and are added pairwise: Gram entries are then as good as float64
sums rounded once. (A flat leaf of few rows is summed in one go, for speed.) With bfloat16 rows they
are its leading, middle and last bits: products of two bfloat16 numbers are exact in float32, no row
is ever converted, and XLA's CPU backend, which would convert all rows for a single column,
multiplies several unconverted. GPUs and TPUs, which add up tiles, take one column in float32: for
several they would copy or rearrange the rows.
"""

import math
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, Tree, is_inexact, shape_of, wide_dtype
from curvax.fisher._cholesky import HIGHEST

_PARTS = 4  # disjoint parts of a vector, or parts of its bits and one of zeros
_SMALL = 1024  # a leaf of fewer entries is summed as a whole
_NARROW = 256  # rows; a flat leaf of no more is also summed as a whole


class Window(Protocol):
    """What M-FAC needs from the rows it keeps."""

    def compress(self, grads: Tree, *, recall: float = 1.0) -> tuple[object, Tree]:
        """The row that represents ``grads``, as `push` takes it and as a tree like params."""

    def push(self, row: Any, slot: jax.Array, accept: Any = True) -> Self:
        """The window with ``row`` in place of the one in ``slot``, if ``accept``."""

    def dots(self, vector: PyTree, dtype: Any) -> jax.Array:
        """$G v$, of shape (m,), summed in ``dtype``."""

    def combine(self, weights: jax.Array, like: Tree) -> Tree:
        """$G^T x$, a tree shaped like ``like`` in the dtype of ``weights``."""


class DenseWindow(NamedTuple):
    """All entries of every gradient.

    Attributes:
      rows: a tree like ``params`` with leaves of shape ``(m, *leaf.shape)``; without rows where a
        leaf has no gradients.
    """

    rows: PyTree

    @classmethod
    def empty(cls, params: PyTree, num_grads: int, dtype: Any | None) -> Self:
        """A window of zeros; in the params' dtypes, float32 or wider, if ``dtype`` is None."""

        def rows(leaf: Any) -> jax.Array:
            return stacked_zeros(leaf, num_grads, row_dtype(leaf, dtype))

        return cls(jax.tree.map(rows, params))

    def compress(self, grads: Tree, *, recall: float = 1.0) -> tuple[Tree, Tree]:
        del recall  # all entries are kept

        def rounded(grad: jax.Array, rows: jax.Array) -> jax.Array:
            return round_to(grad, rows.dtype) if len(rows) else jnp.zeros_like(grad)

        row = jax.tree.map(rounded, grads, self.rows)
        return row, row

    def push(self, row: PyTree, slot: jax.Array, accept: Any = True) -> Self:
        # Inside a conditional XLA writes the row in place; on a CPU a select copies the window.
        rows = jax.lax.cond(accept, insert_row, lambda rows, *_: rows, self.rows, row, slot)
        return self._replace(rows=rows)

    def dots(self, vector: PyTree, dtype: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(self.rows), jax.tree.leaves(vector), strict=True)
        sums = [leaf_dots(rows, leaf).astype(dtype) for rows, leaf in pairs if rows.size]
        return pairwise_sum(jnp.stack(sums, axis=1)) if sums else jnp.zeros((), dtype)

    def combine(self, weights: jax.Array, like: Tree) -> Tree:
        return jax.tree.map(lambda rows, leaf: leaf_combine(rows, weights, leaf), self.rows, like)


def takes_part(leaf: Any) -> bool:
    """Whether a leaf of params has gradients to keep: integer and empty leaves have none."""
    return is_inexact(leaf) and math.prod(shape_of(leaf)) > 0


def row_dtype(leaf: Any, dtype: Any | None) -> Any:
    """The dtype in which rows of a leaf are kept."""
    return wide_dtype(leaf) if dtype is None else dtype


def round_to(array: jax.Array, dtype: Any) -> jax.Array:
    """The array in ``dtype``, really rounded: XLA may skip a conversion there and back."""
    if dtype == jnp.bfloat16:
        array = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    return array.astype(dtype)


def stacked_zeros(leaf: Any, number: int, dtype: Any) -> jax.Array:
    """``number`` rows of zeros with the leaf's sharding; none where it has no gradients."""
    number = number if takes_part(leaf) else 0
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    return jnp.broadcast_to(zeros, (number, *zeros.shape))


def insert_row(rows: PyTree, row: PyTree, slot: jax.Array) -> PyTree:
    """Each leaf's rows with the one in ``slot`` replaced."""

    def insert(kept: jax.Array, new: jax.Array) -> jax.Array:
        if not len(kept):
            return kept
        return jax.lax.dynamic_update_index_in_dim(kept, new, slot, axis=0)

    return jax.tree.map(insert, rows, row)


def replicated(array: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding that a contraction over explicitly sharded axes must give its result."""
    sharding = jax.typeof(array).sharding
    explicit = not sharding.mesh.empty and not sharding.mesh.are_all_axes_auto
    return sharding.update(spec=jax.P()) if explicit else None


@jax.jit
def pairwise_sum(columns: jax.Array) -> jax.Array:
    """The sum over the last axis, whose rounding error grows with the logarithm of its size."""
    while (size := columns.shape[-1]) > 1:
        half = size // 2
        pairs = columns[..., :half] + columns[..., half : 2 * half]
        columns = jnp.concatenate([pairs, columns[..., 2 * half :]], axis=-1)
    return columns[..., 0]


@jax.jit
def leaf_dots(rows: jax.Array, vector: jax.Array) -> jax.Array:
    """Each row times the vector: shape (m,)."""
    if rows.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(
            rows, vector.astype(jnp.float32), cpu=_dots_of_bits, default=_dots_widened
        )
    return jax.lax.platform_dependent(
        rows, vector.astype(rows.dtype), cpu=_dots_on_cpu, default=_dots_of_one_column
    )


def _dots_of_bits(rows: jax.Array, vector: jax.Array) -> jax.Array:
    columns = _contract(rows, _bits(vector, axis=-1), vector.ndim, jnp.float32)
    return pairwise_sum(columns)


def _dots_widened(rows: jax.Array, vector: jax.Array) -> jax.Array:
    # Rows are widened as they are read.
    return jnp.sum(rows.astype(jnp.float32) * vector, axis=tuple(range(1, rows.ndim)))


def _dots_of_one_column(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return _contract(rows, vector[..., jnp.newaxis], vector.ndim, rows.dtype)[:, 0]


def _dots_on_cpu(rows: jax.Array, vector: jax.Array) -> jax.Array:
    """Sums over disjoint parts of the vector, added pairwise, which round less."""
    if vector.ndim == 1 and len(rows) <= _NARROW:
        # More columns would double this pass, which is most of a step with so few rows.
        return _dots_of_one_column(rows, vector)
    if vector.ndim == 1 and vector.size >= _SMALL:
        # XLA's CPU backend is slow at a flat product of a few columns; this is accurate enough.
        return jnp.sum(rows * vector, axis=1)
    return pairwise_sum(_contract(rows, _disjoint_parts(vector), vector.ndim, rows.dtype))


def _contract(rows: jax.Array, columns: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The rows times a few columns, over the ``rank`` axes of a leaf."""
    axes = tuple(range(rank))
    return jax.lax.dot_general(
        rows,
        columns,
        ((tuple(axis + 1 for axis in axes), axes), ((), ())),
        precision=HIGHEST,
        preferred_element_type=dtype,
        out_sharding=replicated(rows),
    )


@jax.jit
def leaf_combine(rows: jax.Array, weights: jax.Array, like: jax.Array) -> jax.Array:
    if not len(rows):
        return jnp.zeros_like(like, dtype=weights.dtype)
    if rows.dtype == jnp.bfloat16:
        total = jax.lax.platform_dependent(
            rows, weights.astype(jnp.float32), cpu=_combine_bits, default=_combine_widened
        )
        return total.astype(weights.dtype)
    weights = weights.astype(rows.dtype)
    return jax.lax.dot_general(weights, rows, (((0,), (0,)), ((), ())), precision=HIGHEST)


def _combine_bits(rows: jax.Array, weights: jax.Array) -> jax.Array:
    parts = jax.lax.dot_general(
        _bits(weights, axis=0),
        rows,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(parts, axis=0)


def _combine_widened(rows: jax.Array, weights: jax.Array) -> jax.Array:
    weights = weights.reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.sum(weights * rows.astype(jnp.float32), axis=0)


def _disjoint_parts(vector: jax.Array) -> jax.Array:
    """Columns that each hold a part of the vector and zeros elsewhere, on a new last axis."""
    if vector.size < _SMALL:
        return vector[..., jnp.newaxis]
    axis = max(range(vector.ndim), key=lambda axis: vector.shape[axis])
    size = vector.shape[axis]
    part = jnp.arange(size) * _PARTS // size
    column = part[:, jnp.newaxis] == jnp.arange(_PARTS)
    shape = [1] * vector.ndim + [_PARTS]
    shape[axis] = size
    return jnp.where(column.reshape(shape), vector[..., jnp.newaxis], 0)


def _bits(vector: jax.Array, axis: int) -> jax.Array:
    """Three bfloat16 parts that add up to a float32 vector, on a new axis."""
    columns = []
    rest = vector.astype(jnp.float32)
    for _ in range(3):
        columns.append(round_to(rest, jnp.bfloat16))
        rest = rest - columns[-1].astype(jnp.float32)
    return jnp.stack(columns, axis=axis)
