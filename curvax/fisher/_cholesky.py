r"""The damped Cholesky factorization of a Gram or Fisher matrix, for dynamic and static use.

A matrix is scaled to a unit diagonal, so that gradients may have very different lengths, and
factored by panels of 128 rows: the factorization of a diagonal block is XLA's, the rest is matrix
products. On a CPU, XLA passes a whole matrix to LAPACK, whose threads then busy-wait for about 20
ms and take the cores from the two passes over M-FAC's window: at $m = 512$ a step of 59 ms then
took 85 ms (``benchmarks/mfac_solve.py`` times the solvers). Blocks of 128, or of 64 in float64, are
factored by a single thread. On a TPU a whole factorization is a loop over columns.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import varying_like

HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 128
_FLOAT64_BLOCK = 64  # LAPACK takes several threads from 128 on in float64, from 256 in float32
_PANELS = 16  # at most: compilation grows with them
_SUBSTITUTED = 16  # the largest that LAPACK solves for by a single thread, with many columns


class Panel(NamedTuple):
    """Rows of a Cholesky factor: the inverse of their diagonal block, and what is to its right."""

    inverse: jax.Array  # W = L^-1 of the block L L^H on the diagonal
    row: jax.Array  # R = W A_12


class BlockedCholesky(NamedTuple):
    """The factorization $A = C C^H$ of one or several matrices (..., m, m), by panels."""

    panels: tuple[Panel, ...]

    def failed(self) -> jax.Array:
        """Whether a pivot was not positive: bools of shape (...)."""
        finite = [jnp.all(jnp.isfinite(panel.inverse), axis=(-2, -1)) for panel in self.panels]
        return ~jnp.all(jnp.stack(finite), axis=0)

    def solve(self, rhs: jax.Array) -> jax.Array:
        """$A^{-1} b$ of a single matrix, for $b$ of shape (m,)."""
        block = len(self.panels[0].inverse)
        vector = jnp.pad(rhs, (0, -len(rhs) % block))
        heads = []
        for inverse, row in self.panels:
            heads.append(_product(inverse, vector[:block]))
            vector = vector[block:] - _product(_adjoint(row), heads[-1])
        solution = vector
        for (inverse, row), head in zip(reversed(self.panels), reversed(heads), strict=True):
            leading = _product(_adjoint(inverse), head - _product(row, solution))
            solution = jnp.concatenate([leading, solution])
        return solution[: len(rhs)]

    def inverse(self, size: int) -> jax.Array:
        """$C^{-1}$, lower triangular, of shape (..., size, size)."""
        first = self.panels[0].inverse
        block = first.shape[-1]
        rows = []
        # What is below, times the columns so far; those to the right are still zero.
        below = jnp.zeros((*first.shape[:-2], self.panels[0].row.shape[-1] + block, 0), first.dtype)
        for inverse, row in self.panels:
            rows.append(jnp.concatenate([_product(inverse, below[..., :block, :]), inverse], -1))
            zeros = jnp.zeros((*below.shape[:-2], row.shape[-1], block), first.dtype)
            below = jnp.concatenate([below[..., block:, :], zeros], -1)
            below = below - _product(_adjoint(row), rows[-1])
        width = block * len(self.panels)
        padded = [_pad_last(part, width - part.shape[-1]) for part in rows]
        return jnp.concatenate(padded, axis=-2)[..., :size, :size]


def blocked_cholesky(matrix: jax.Array) -> BlockedCholesky:
    r"""Factors $A = C C^H$ by panels; NaN where a pivot is not positive.

    With the leading block $A_{11} = L L^H$ and $W = L^{-1}$, the rest of the matrix is reduced to
    $A_{22} - R^H R$, $R = W A_{12}$, and so on.

    Args:
      matrix: $A$, Hermitian, of shape (..., m, m).

    Returns:
      The factorization.
    """
    size = matrix.shape[-1]
    block = min(_BLOCK, 1 << (size - 1).bit_length())
    while block * _PANELS < size:
        block *= 2
    rest = _padded(matrix, -size % block)
    panels = []
    while rest.shape[-1]:
        inverse = _inverse_of_factor(rest[..., :block, :block])
        row = _product(inverse, rest[..., :block, block:])
        panels.append(Panel(inverse, row))
        rest = rest[..., block:, block:] - _product(_adjoint(row), row)
    return BlockedCholesky(tuple(panels))


class InverseFactor(NamedTuple):
    r"""The inverse of a factor, $C^{-1}$ with $A = C C^H$, lower triangular; and what it took.

    Everything needed of $A^{-1}$ follows: $A^{-1} v = C^{-H} C^{-1} v$, its diagonal is the sum of
    squares down each column, and $\log \det A$ is minus twice the sum of the logarithms of the
    diagonal.

    Attributes:
      matrix: $C^{-1}$, of shape (..., m, m).
      failed: bool of shape (...), whether the diagonal of $A$ was raised.
    """

    matrix: jax.Array
    failed: jax.Array

    def forward(self, vectors: jax.Array) -> jax.Array:
        """$C^{-1} v$ of the columns of an array (..., m, k)."""
        return _product(self.matrix, vectors)

    def backward(self, vectors: jax.Array) -> jax.Array:
        """$C^{-H} v$ of the columns of an array (..., m, k)."""
        return _product(_adjoint(self.matrix), vectors)

    def solve(self, vectors: jax.Array) -> jax.Array:
        """$A^{-1} v$ of the columns of an array (..., m, k)."""
        return self.backward(self.forward(vectors))

    def logdet(self) -> jax.Array:
        r"""$\log \det A$, of shape (...)."""
        return -2 * jnp.sum(jnp.log(jnp.real(diagonal(self.matrix))), axis=-1)


def inverse_factor(matrix: jax.Array) -> InverseFactor:
    r"""$C^{-1}$ with $A = C C^H$, for each of several matrices.

    Each matrix is first scaled to a unit diagonal. Where the factorization fails, the diagonal is
    raised by the least of `jitters` with which it succeeds: a larger damping, just enough for a
    matrix that is singular to working precision. That jitter is constant under differentiation.

    Args:
      matrix: $A$, Hermitian, of shape (..., m, m).

    Returns:
      The inverse of the factor.
    """
    size = matrix.shape[-1]
    scale = jax.lax.rsqrt(jnp.real(diagonal(matrix)))
    unit = scaled(matrix, scale)
    first = blocked_cholesky(unit)
    failed = first.failed()

    def damped(unit: jax.Array, _: BlockedCholesky) -> BlockedCholesky:
        jitter = _least_jitter(jax.lax.stop_gradient(unit))
        return blocked_cholesky(unit + jitter[..., jnp.newaxis, jnp.newaxis] * _identity(unit))

    factor = jax.lax.cond(jnp.any(failed), damped, lambda _, first: first, unit, first)
    return InverseFactor(factor.inverse(size) * scale[..., jnp.newaxis, :], failed)


def _least_jitter(unit: jax.Array) -> jax.Array:
    """For each matrix the least jitter with which it factors; 0 if it does so without."""
    size = unit.shape[-1]
    tried = jnp.asarray([0.0, *jitters(size, unit.dtype)], unit.real.dtype)

    def fails(number: jax.Array) -> jax.Array:
        jitter = tried[number][..., jnp.newaxis, jnp.newaxis]
        return blocked_cholesky(unit + jitter * _identity(unit)).failed()

    def needs_retry(last: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, failed = last
        return jnp.any(failed & (number < len(tried) - 1))

    def retry(last: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, failed = last
        number = jnp.where(failed, jnp.minimum(number + 1, len(tried) - 1), number)
        return number, fails(number)

    start = varying_like(jnp.zeros(unit.shape[:-2], jnp.int32), unit)
    return tried[jax.lax.while_loop(needs_retry, retry, (start, fails(start)))[0]]


def diagonal(matrix: jax.Array) -> jax.Array:
    """The diagonals of matrices (..., m, m), without the gather that is slow on a TPU."""
    on_diagonal = jnp.eye(matrix.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(on_diagonal, matrix, 0), axis=-1)


def scaled(matrix: jax.Array, scale: jax.Array) -> jax.Array:
    """$D A D$ with the diagonal matrices $D$ of ``scale``, of shape (..., m)."""
    return matrix * scale[..., :, jnp.newaxis] * scale[..., jnp.newaxis, :]


def jitters(size: int, dtype: Any) -> list[float]:
    """The dampings tried in turn on a unit diagonal until a factorization succeeds.

    The last is above the rounding of any matrix of that size.
    """
    epsilon = float(jnp.finfo(dtype).eps)
    return [epsilon * 4.0**power for power in range(math.ceil(math.log(16 * size, 4)) + 1)]


def _identity(like: jax.Array) -> jax.Array:
    return jnp.eye(like.shape[-1], dtype=like.dtype)


def _padded(matrix: jax.Array, margin: int) -> jax.Array:
    """The matrix of the system padded with unknowns that are zero."""
    if not margin:
        return matrix
    size = matrix.shape[-1]
    sides = [(0, 0)] * (matrix.ndim - 2) + [(0, margin)] * 2
    unknown = jnp.arange(size + margin) >= size
    return jnp.pad(matrix, sides) + jnp.diag(unknown.astype(matrix.dtype))


def _pad_last(array: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, margin)])


def _inverse_of_factor(matrix: jax.Array) -> jax.Array:
    r"""$L^{-1}$ with $A = L L^H$, of shape (..., k, k), by halves until a single thread does it."""
    size = matrix.shape[-1]
    if size <= (_FLOAT64_BLOCK if matrix.dtype == jnp.float64 else _BLOCK):
        return _inverse_of_lower(jax.lax.linalg.cholesky(matrix, symmetrize_input=False))
    half = size // 2
    first = _inverse_of_factor(matrix[..., :half, :half])
    row = _product(first, matrix[..., :half, half:])
    second = _inverse_of_factor(matrix[..., half:, half:] - _product(_adjoint(row), row))
    corner = -_product(_product(second, _adjoint(row)), first)
    return _lower(first, corner, second)


def _lower(first: jax.Array, corner: jax.Array, second: jax.Array) -> jax.Array:
    """Lower triangles from their blocks of equal size."""
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _inverse_of_lower(factor: jax.Array) -> jax.Array:
    """The inverse of lower triangles, of shape (..., k, k)."""
    # Threads of LAPACK would busy-wait after each whole substitution too, and a GPU is quicker with
    # products; a TPU is 30 times as quick with the substitution.
    return jax.lax.platform_dependent(factor, tpu=_by_substitution, default=_each_by_doubling)


def _by_substitution(factor: jax.Array) -> jax.Array:
    identity = jnp.broadcast_to(_identity(factor), factor.shape)
    return jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


def _each_by_doubling(factor: jax.Array) -> jax.Array:
    if factor.ndim == 2:
        return _by_doubling(factor)
    flat = factor.reshape(-1, *factor.shape[-2:])
    return jax.vmap(_by_doubling)(flat).reshape(factor.shape)


def _by_doubling(factor: jax.Array) -> jax.Array:
    r"""The inverse of a lower triangle whose size is a power of two.

    Blocks of 16 on the diagonal are inverted by substitution. Given the inverses of the diagonal
    blocks of one size, those of twice the size have $-B^{-1} C A^{-1}$ below the diagonal.
    """
    size = len(factor)
    inverses = _by_substitution(_on_diagonal(factor, min(_SUBSTITUTED, size)))
    while (side := inverses.shape[1]) < size:
        blocks = _on_diagonal(factor, 2 * side)
        first, second = inverses[::2], inverses[1::2]
        corner = -_product(_product(second, blocks[:, side:, :side]), first)
        inverses = _lower(first, corner, second)
    return inverses[0]


def _on_diagonal(matrix: jax.Array, side: int) -> jax.Array:
    """The blocks of that size on the diagonal, stacked."""
    number = len(matrix) // side
    index = jnp.arange(number)
    return matrix.reshape(number, side, number, side)[index, :, index, :]


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)


def _adjoint(matrix: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(matrix, -1, -2))
