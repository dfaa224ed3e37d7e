r"""Solves a symmetric positive definite system by a blocked Cholesky factorization.

The factorization of blocks of 128 is XLA's; the rest is matrix products. On a CPU, XLA passes a
whole matrix to LAPACK, whose threads then busy-wait for about 20 ms and take the cores from the
two passes over M-FAC's window: at $m = 512$ a step of 59 ms then took 85
(``benchmarks/mfac_solve.py`` times the solvers). Blocks of 128 are factored by a single thread.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 128
_SUBSTITUTED = 16  # the largest that LAPACK solves for by a single thread, with many columns


def cholesky_solver(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
    r"""Factors $A$ and returns ``b -> x`` with $A x = b$; NaN where a pivot is not positive.

    With the leading block $A_{11} = L L^T$ and $W = L^{-1}$, the rest of the matrix is reduced to
    $A_{22} - R^T R$, $R = W A_{12}$, and so on; a solution reduces $b$ likewise, then substitutes
    back in reverse order.

    Args:
      matrix: $A$, symmetric, of shape (m, m).

    Returns:
      A function of $b$, of shape (m,), which returns $x$.
    """
    size = len(matrix)
    block = min(_BLOCK, 1 << (size - 1).bit_length())
    margin = -size % block
    rest = _padded(matrix, margin)
    steps = []
    while len(rest):
        factor = jax.lax.linalg.cholesky(rest[:block, :block], symmetrize_input=False)
        inverse = _inverse_of_lower(factor)
        row = _product(inverse, rest[:block, block:])
        steps.append((inverse, row))
        rest = rest[block:, block:] - _product(row.T, row)

    def solve(rhs: jax.Array) -> jax.Array:
        vector = jnp.pad(rhs, (0, margin))
        heads = []
        for inverse, row in steps:
            heads.append(_product(inverse, vector[:block]))
            vector = vector[block:] - _product(row.T, heads[-1])
        solution = vector
        for (inverse, row), head in zip(reversed(steps), reversed(heads), strict=True):
            leading = _product(inverse.T, head - _product(row, solution))
            solution = jnp.concatenate([leading, solution])
        return solution[:size]

    return solve


def _padded(matrix: jax.Array, margin: int) -> jax.Array:
    """The matrix of the system padded with unknowns that are zero."""
    if not margin:
        return matrix
    return jax.scipy.linalg.block_diag(matrix, jnp.eye(margin, dtype=matrix.dtype))


def _inverse_of_lower(factor: jax.Array) -> jax.Array:
    r"""The inverse of a lower triangle whose size is a power of two, by doubling.

    Blocks of 16 on the diagonal are inverted by substitution. Given the inverses of the diagonal
    blocks of one size, those of twice the size have $-B^{-1} C A^{-1}$ below the diagonal.
    """
    size = len(factor)
    inverses = _inverses_on_diagonal(factor, min(_SUBSTITUTED, size))
    while (side := inverses.shape[1]) < size:
        blocks = _on_diagonal(factor, 2 * side)
        first, second = inverses[::2], inverses[1::2]
        corner = -_product(_product(second, blocks[:, side:, :side]), first)
        inverses = jnp.block([[first, jnp.zeros_like(corner)], [corner, second]])
    return inverses[0]


def _inverses_on_diagonal(factor: jax.Array, side: int) -> jax.Array:
    blocks = _on_diagonal(factor, side)
    identity = jnp.broadcast_to(jnp.eye(side, dtype=factor.dtype), blocks.shape)
    return jax.lax.linalg.triangular_solve(blocks, identity, left_side=True, lower=True)


def _on_diagonal(matrix: jax.Array, side: int) -> jax.Array:
    """The blocks of that size on the diagonal, stacked."""
    number = len(matrix) // side
    index = jnp.arange(number)
    return matrix.reshape(number, side, number, side)[index, :, index, :]


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)
