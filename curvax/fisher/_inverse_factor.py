r"""The factor of a damped matrix, inverted: the one decomposition of the static algorithm.

For a symmetric positive definite $A = C C^T$ everything that is asked of $A^{-1}$ follows from
$C^{-1}$: $A^{-1} v = C^{-T} C^{-1} v$, and its diagonal is the sum of squares down each column.
"""

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST
from curvax.fisher._window import replicated

_ROW_BLOCKS = 4


def inverse_factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""$C^{-1}$ with $A = C C^T$, for each of several matrices.

    Each matrix is scaled to a unit diagonal first, so that gradients of very different length do
    no harm. Where the factorization fails, the diagonal is raised by a few units of rounding,
    relative to itself: a larger damping, just above what the precision can tell from a singular
    matrix.

    Args:
      matrix: $A$, of shape (..., k, k).

    Returns:
      $C^{-1}$, lower triangular, and a bool of shape (...): whether the diagonal was raised.
    """
    size = matrix.shape[-1]
    scale = jax.lax.rsqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1))
    unit = matrix * scale[..., :, jnp.newaxis] * scale[..., jnp.newaxis, :]
    identity = jnp.eye(size, dtype=matrix.dtype)
    factor = _factor(unit)
    failed = ~jnp.all(jnp.isfinite(factor), axis=(-2, -1))
    jitter = 16 * size * float(jnp.finfo(matrix.dtype).eps) * identity
    factor = jax.lax.cond(
        jnp.any(failed),
        lambda: jnp.where(failed[..., jnp.newaxis, jnp.newaxis], _factor(unit + jitter), factor),
        lambda: factor,
    )
    inverse = jax.lax.linalg.triangular_solve(
        factor, jnp.broadcast_to(identity, matrix.shape), left_side=True, lower=True
    )
    return inverse * scale[..., jnp.newaxis, :], failed


def _factor(matrix: jax.Array) -> jax.Array:
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def row_blocks(size: int) -> list[tuple[int, int]]:
    """A few slices of the rows of a triangle, so that what is zero or known need not be done."""
    step = -(-size // _ROW_BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@jax.jit
def gram(rows: jax.Array) -> jax.Array:
    """The Gram matrix of rows ``(m, *shape)``, each pair of row blocks once."""
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
    return jnp.tril(lower) + jnp.tril(lower, -1).T


@jax.jit
def squares_below(triangle: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The sums of squares down each column of $C^{-1} G$, and of $G$.

    Args:
      triangle: $C^{-1}$, lower triangular, of shape (m, m).
      rows: $G$, of shape ``(m, *shape)``.

    Returns:
      Two arrays of ``shape``.
    """
    total = jnp.zeros_like(rows[0])
    for start, stop in row_blocks(len(rows)):
        part = jax.lax.dot_general(
            triangle[start:stop, :stop], rows[:stop], (((1,), (0,)), ((), ())), precision=HIGHEST
        )
        total = total + jnp.sum(part**2, axis=0)
    return total, jnp.sum(rows**2, axis=0)
