"""The two dense kernels of the inverse: the Gram matrix of rows, and squares below a triangle.

On a CPU a few columns are taken at a time, which stay in a processor's cache. It flattens the rows,
which must then be on one device. An accelerator takes them as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher.window._dense import replicated

_ROW_BLOCKS = 4
_CHUNK_BYTES = 2**21  # measured: 10 % faster than 2**23, three times as fast as no chunks


def gram(rows: jax.Array) -> jax.Array:
    """The Gram matrix of rows ``(m, *shape)``, each pair of row blocks once.

    Args:
      rows: $G$, real or complex.

    Returns:
      $G G^H$, of shape (m, m).
    """
    return _gram(rows, local=is_local(rows))


def squares_below(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The sums of squares down each column of $C^{-1} G$, and of $G$.

    Args:
      triangle: $C^{-1}$, lower triangular, of shape (m, m).
      rows: $G$, of shape ``(m, *shape)``.

    Returns:
      Two real arrays of ``shape``.
    """
    return _squares_below(triangle, rows, local=is_local(rows))


def is_local(rows: jax.Array) -> bool:
    """Whether rows are known to be on one device, so that flattening gathers nothing."""
    if not isinstance(rows, jax.core.Tracer):
        return len(rows.sharding.device_set) == 1
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.are_all_axes_manual or mesh.size == 1


def _on_cpu(local: bool, chunked: Callable[..., Any], whole: Callable[..., Any], *args: Any) -> Any:
    if not local:
        return whole(*args)
    return jax.lax.platform_dependent(*args, cpu=chunked, default=whole)


@partial(jax.jit, static_argnames="local")
def _gram(rows: jax.Array, *, local: bool) -> jax.Array:
    lower = _on_cpu(local, _lower_products_in_chunks, _lower_products, rows)
    return jnp.tril(lower) + jnp.conj(jnp.tril(lower, -1).T)


def _lower_products_in_chunks(rows: jax.Array) -> jax.Array:
    flat, width, number = _chunks(rows)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _lower_products(_chunk(flat, index, width))

    return jax.lax.fori_loop(0, number, add, _lower_products(flat[:, number * width :]))


def _lower_products(rows: jax.Array) -> jax.Array:
    """The lower triangle of the Gram matrix, and zeros or products above it."""
    axes = tuple(range(1, rows.ndim))
    blocks = []
    for start, stop in row_blocks(len(rows)):
        block = jax.lax.dot_general(
            rows[start:stop],
            jnp.conj(rows[:stop]),
            ((axes, axes), ((), ())),
            precision=HIGHEST,
            out_sharding=replicated(rows),
        )
        blocks.append(jnp.pad(block, ((0, 0), (0, len(rows) - stop))))
    return jnp.concatenate(blocks)


def row_blocks(size: int) -> list[tuple[int, int]]:
    """A few slices of the rows of a triangle, to skip products that are zero or known."""
    step = -(-size // _ROW_BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@partial(jax.jit, static_argnames="local")
def _squares_below(
    triangle: jax.Array, rows: jax.Array, *, local: bool
) -> tuple[jax.Array, jax.Array]:
    return _on_cpu(local, _squares_in_chunks, _squares, triangle, rows)


def _squares_in_chunks(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat, width, number = _chunks(rows)
    pieces = jax.lax.map(
        lambda index: _squares(triangle, _chunk(flat, index, width)), jnp.arange(number)
    )
    tail = _squares(triangle, flat[:, number * width :])
    projected, squares = (
        jnp.concatenate([piece.reshape(-1), end]).reshape(rows.shape[1:])
        for piece, end in zip(pieces, tail, strict=True)
    )
    return projected, squares


def _squares(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.zeros_like(rows[0], jnp.finfo(rows.dtype).dtype)
    for start, stop in row_blocks(len(rows)):
        part = jax.lax.dot_general(
            triangle[start:stop, :stop], rows[:stop], (((1,), (0,)), ((), ())), precision=HIGHEST
        )
        total = total + _sum_of_squares(part)
    return total, _sum_of_squares(rows)


def _sum_of_squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(rows)), axis=0)


def _chunks(rows: jax.Array) -> tuple[jax.Array, int, int]:
    """The rows as a matrix, and the width and the number of its whole chunks of columns."""
    flat = rows.reshape(len(rows), -1)
    width = max(1, _CHUNK_BYTES // (len(rows) * rows.dtype.itemsize))
    width = min(width, flat.shape[1])
    return flat, width, flat.shape[1] // width


def _chunk(flat: jax.Array, index: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(flat, index * width, width, axis=1)
