r"""The factor of a damped matrix, inverted: the one decomposition of the static algorithm.

For a symmetric positive definite $A = C C^T$ everything needed of $A^{-1}$ follows from $C^{-1}$:
$A^{-1} v = C^{-T} C^{-1} v$, and its diagonal is the sum of squares down each column.
"""

from functools import partial

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher._damped_gram import jitters
from curvax.fisher.window._dense import replicated

_ROW_BLOCKS = 4
_CHUNK_BYTES = 2**21  # measured: 10 % faster than 2**23, three times as fast as no chunks


def inverse_factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""$C^{-1}$ with $A = C C^T$, for each of several matrices.

    Each matrix is first scaled to a unit diagonal, so that gradients of very different lengths do
    no harm. Where the factorization fails, the diagonal is raised by the least of `jitters` with
    which it succeeds: a larger damping, just enough for a matrix that is singular to working
    precision.

    Args:
      matrix: $A$, of shape (..., k, k).

    Returns:
      $C^{-1}$, lower triangular, and a bool of shape (...): whether the diagonal was raised.
    """
    size = matrix.shape[-1]
    scale = jax.lax.rsqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1))
    unit = matrix * scale[..., :, jnp.newaxis] * scale[..., jnp.newaxis, :]
    identity = jnp.eye(size, dtype=matrix.dtype)
    dampings = jnp.asarray(jitters(size, matrix.dtype), matrix.dtype)
    first = _factor(unit)
    failed = _has_failed(first)

    def needs_retry(last: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, factor = last
        return (number < len(dampings)) & jnp.any(_has_failed(factor))

    def retry(last: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, factor = last
        damped = _factor(unit + dampings[number] * identity)
        bad = _has_failed(factor)[..., jnp.newaxis, jnp.newaxis]
        return number + 1, jnp.where(bad, damped, factor)

    _, factor = jax.lax.while_loop(needs_retry, retry, (jnp.int32(0), first))
    inverse = jax.lax.linalg.triangular_solve(
        factor, jnp.broadcast_to(identity, matrix.shape), left_side=True, lower=True
    )
    return inverse * scale[..., jnp.newaxis, :], failed


def _has_failed(factor: jax.Array) -> jax.Array:
    return ~jnp.all(jnp.isfinite(factor), axis=(-2, -1))


def _factor(matrix: jax.Array) -> jax.Array:
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def row_blocks(size: int) -> list[tuple[int, int]]:
    """A few slices of the rows of a triangle, to skip products that are zero or known."""
    step = -(-size // _ROW_BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@partial(jax.jit, static_argnames="in_chunks")
def gram(rows: jax.Array, *, in_chunks: bool) -> jax.Array:
    """The Gram matrix of rows ``(m, *shape)``, each pair of row blocks once.

    Args:
      rows: $G$.
      in_chunks: whether to take a few columns at a time, which stay in a processor's cache. It
        flattens the rows, which must then be on one device.

    Returns:
      $G G^T$, of shape (m, m).
    """
    if not in_chunks:
        lower = _lower_products(rows)
    else:
        flat, width, number = _chunks(rows)
        lower = _lower_products(flat[:, number * width :])

        def add(index: jax.Array, total: jax.Array) -> jax.Array:
            return total + _lower_products(_chunk(flat, index, width))

        lower = jax.lax.fori_loop(0, number, add, lower)
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def _lower_products(rows: jax.Array) -> jax.Array:
    """The lower triangle of the Gram matrix, and zeros or products above it."""
    axes = tuple(range(1, rows.ndim))
    lower = jnp.zeros((len(rows), len(rows)), rows.dtype)
    for start, stop in row_blocks(len(rows)):
        block = jax.lax.dot_general(
            rows[start:stop],
            rows[:stop],
            ((axes, axes), ((), ())),
            precision=HIGHEST,
            out_sharding=replicated(rows),
        )
        lower = lower.at[start:stop, :stop].set(block)
    return lower


@partial(jax.jit, static_argnames="in_chunks")
def squares_below(
    triangle: jax.Array, rows: jax.Array, *, in_chunks: bool
) -> tuple[jax.Array, jax.Array]:
    r"""The sums of squares down each column of $C^{-1} G$, and of $G$.

    Args:
      triangle: $C^{-1}$, lower triangular, of shape (m, m).
      rows: $G$, of shape ``(m, *shape)``.
      in_chunks: as in `gram`.

    Returns:
      Two arrays of ``shape``.
    """
    if not in_chunks:
        return _squares_below(triangle, rows)
    flat, width, number = _chunks(rows)
    pieces = jax.lax.map(
        lambda index: _squares_below(triangle, _chunk(flat, index, width)), jnp.arange(number)
    )
    tail = _squares_below(triangle, flat[:, number * width :])
    projected, squares = (
        jnp.concatenate([piece.reshape(-1), end]).reshape(rows.shape[1:])
        for piece, end in zip(pieces, tail, strict=True)
    )
    return projected, squares


def _squares_below(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.zeros_like(rows[0])
    for start, stop in row_blocks(len(rows)):
        part = jax.lax.dot_general(
            triangle[start:stop, :stop], rows[:stop], (((1,), (0,)), ((), ())), precision=HIGHEST
        )
        total = total + jnp.sum(part**2, axis=0)
    return total, jnp.sum(rows**2, axis=0)


def _chunks(rows: jax.Array) -> tuple[jax.Array, int, int]:
    """The rows as a matrix, and the width and the number of its whole chunks of columns."""
    flat = rows.reshape(len(rows), -1)
    width = max(1, _CHUNK_BYTES // (len(rows) * rows.dtype.itemsize))
    width = min(width, flat.shape[1])
    return flat, width, flat.shape[1] // width


def _chunk(flat: jax.Array, index: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(flat, index * width, width, axis=1)
