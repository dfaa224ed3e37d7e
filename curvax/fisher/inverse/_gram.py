"""The two dense kernels of the inverse: the Gram matrix of rows, and squares below a triangle.

A few columns are taken at a time. On a CPU they stay in a processor's cache. A TPU rearranges rows
of several axes before it multiplies them, and would copy all of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.window._dense import replicated

_ROW_BLOCKS = 4
_CPU_BYTES = 2**21  # measured: 10 % faster than 2**23, three times as fast as no chunks
_ACCELERATOR_BYTES = 2**25  # stays in a TPU's vector memory; 2**27 does not

_Kernel = Callable[..., Any]


class Cut(NamedTuple):
    """How rows ``(m, *shape)`` can be cut without communication between devices.

    Attributes:
      local: whether they are on one device, and may be flattened.
      axis: the one to cut; None if each may be sharded.
    """

    local: bool
    axis: int | None

    @classmethod
    def of(cls, rows: jax.Array) -> "Cut":
        """From the sharding of an array, or what is known of it under a trace."""
        axes = [axis for axis in range(1, rows.ndim) if axis not in _sharded_axes(rows)]
        if isinstance(rows, jax.core.Tracer):
            mesh = jax.sharding.get_abstract_mesh()
            local = mesh.empty or mesh.are_all_axes_manual or mesh.size == 1
            if not local and not mesh.are_all_axes_explicit:
                axes = []
        else:
            local = len(rows.sharding.device_set) == 1
        # The last axis is contiguous, so another one is cut if there is one.
        others = [axis for axis in axes if axis < rows.ndim - 1 and rows.shape[axis] > 1]
        best = max(others or axes, key=lambda axis: rows.shape[axis], default=None)
        return cls(local, best)


def _sharded_axes(rows: jax.Array) -> set[int]:
    if isinstance(rows, jax.core.Tracer):
        spec = jax.typeof(rows).sharding.spec
        return {axis for axis, names in enumerate(spec) if names is not None}
    local = rows.sharding.shard_shape(rows.shape)
    return {axis for axis in range(rows.ndim) if local[axis] < rows.shape[axis]}


def gram(rows: jax.Array) -> jax.Array:
    """The Gram matrix of rows ``(m, *shape)``, each pair of row blocks once.

    Args:
      rows: $G$, real or complex.

    Returns:
      $G G^H$, of shape (m, m).
    """
    return gram_of_cut(rows, cut=Cut.of(rows))


def squares_below(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The sums of squares down each column of $C^{-1} G$, and of $G$.

    Args:
      triangle: $C^{-1}$, lower triangular, of shape (m, m).
      rows: $G$, of shape ``(m, *shape)``.

    Returns:
      Two real arrays of ``shape``.
    """
    return squares_of_cut(triangle, rows, cut=Cut.of(rows))


@partial(jax.jit, static_argnames="cut")
def gram_of_cut(rows: jax.Array, *, cut: Cut) -> jax.Array:
    """As `gram`, compiled."""
    return _gram(rows, cut)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gram(rows: jax.Array, cut: Cut) -> jax.Array:
    def in_chunks(chunks: "_Chunks") -> jax.Array:
        def add(index: jax.Array, total: jax.Array) -> jax.Array:
            return total + _lower_products(chunks.at(index))

        return jax.lax.fori_loop(0, chunks.number, add, _lower_products(chunks.tail()))

    lower = _by_platform(in_chunks, _lower_products, rows, cut)
    return jnp.tril(lower) + jnp.conj(jnp.tril(lower, -1).T)


@_gram.defjvp
def _gram_tangent(
    cut: Cut, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One product. XLA's CPU backend of jaxlib 0.10 crashes in those of transposed row blocks."""
    (rows,), (tangent,) = primals, tangents
    product = row_products(tangent, rows, replicated(rows))
    return _gram(rows, cut), product + jnp.conj(product.T)


@partial(jax.jit, static_argnames="cut")
def squares_of_cut(
    triangle: jax.Array, rows: jax.Array, *, cut: Cut
) -> tuple[jax.Array, jax.Array]:
    """As `squares_below`, compiled."""

    def in_chunks(chunks: "_Chunks") -> tuple[jax.Array, jax.Array]:
        pieces = jax.lax.map(
            lambda index: _squares(triangle, chunks.at(index)), jnp.arange(chunks.number)
        )
        pairs = zip(pieces, _squares(triangle, chunks.tail()), strict=True)
        projected, squares = (chunks.joined(piece, tail) for piece, tail in pairs)
        return projected.reshape(rows.shape[1:]), squares.reshape(rows.shape[1:])

    return _by_platform(in_chunks, partial(_squares, triangle), rows, cut)


def _by_platform(in_chunks: _Kernel, whole: _Kernel, rows: jax.Array, cut: Cut) -> Any:
    def on_cpu(rows: jax.Array) -> Any:
        if not cut.local:
            return whole(rows)
        return in_chunks(_Chunks.of(rows.reshape(len(rows), -1), 1, _CPU_BYTES))

    def on_accelerator(rows: jax.Array) -> Any:
        if cut.axis is None:
            return whole(rows)
        return in_chunks(_Chunks.of(rows, cut.axis, _ACCELERATOR_BYTES))

    return jax.lax.platform_dependent(rows, cpu=on_cpu, default=on_accelerator)


class _Chunks(NamedTuple):
    """Rows cut along one of their axes into chunks of a width, and what is left."""

    rows: jax.Array
    axis: int
    width: int

    @classmethod
    def of(cls, rows: jax.Array, axis: int, nbytes: int) -> "_Chunks":
        size = rows.shape[axis]
        slice_bytes = rows.dtype.itemsize * math.prod(rows.shape) // max(1, size)
        return cls(rows, axis, max(1, min(nbytes // max(1, slice_bytes), size)))

    @property
    def number(self) -> int:
        return self.rows.shape[self.axis] // self.width

    def at(self, index: jax.Array) -> jax.Array:
        start = index * self.width
        return jax.lax.dynamic_slice_in_dim(self.rows, start, self.width, self.axis)

    def tail(self) -> jax.Array:
        start = self.number * self.width
        return jax.lax.slice_in_dim(self.rows, start, self.rows.shape[self.axis], axis=self.axis)

    def joined(self, pieces: jax.Array, tail: jax.Array) -> jax.Array:
        """An array without the axis of rows, from its pieces on a new first axis."""
        axis = self.axis - 1
        pieces = jnp.moveaxis(pieces, 0, axis)
        shape = (*tail.shape[:axis], self.number * self.width, *tail.shape[axis + 1 :])
        return jnp.concatenate([pieces.reshape(shape), tail], axis=axis)


def _lower_products(rows: jax.Array) -> jax.Array:
    """The lower triangle of the Gram matrix, and zeros or products above it."""
    blocks = []
    for start, stop in _row_blocks(len(rows)):
        block = row_products(rows[start:stop], rows[:stop], replicated(rows))
        blocks.append(jnp.pad(block, ((0, 0), (0, len(rows) - stop))))
    return jnp.concatenate(blocks)


def row_products(left: jax.Array, right: jax.Array, out_sharding: Any) -> jax.Array:
    """The inner products of rows and rows, $A B^H$, of shape (m_a, m_b)."""
    axes = tuple(range(1, left.ndim))
    contracted = ((axes, axes), ((), ()))
    return jax.lax.dot_general(
        left, jnp.conj(right), contracted, precision=HIGHEST, out_sharding=out_sharding
    )


def _squares(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.zeros_like(rows[0], jnp.finfo(rows.dtype).dtype)
    for start, stop in _row_blocks(len(rows)):
        part = jax.lax.dot_general(
            triangle[start:stop, :stop], rows[:stop], (((1,), (0,)), ((), ())), precision=HIGHEST
        )
        total = total + _sum_of_squares(part)
    return total, _sum_of_squares(rows)


def _row_blocks(size: int) -> list[tuple[int, int]]:
    """A few slices of the rows of a triangle, to skip products that are zero or known."""
    step = -(-size // _ROW_BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _sum_of_squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(rows)), axis=0)
