r"""The inverse of the empirical Fisher matrix, through the Gram matrix of its gradients.

With the gradients $g_1, \dots, g_m$ as rows of $G$, a normalizer $n$ (the nominal size $m$ of
the window, or the gradients in it so far) and a damping $\lambda$,

$$
F = \lambda I + \frac1n G^T G, \qquad K = n \lambda I + G G^T
$$

and everything about the $d \times d$ matrix $F^{-1}$ follows from the $m \times m$ matrix $K$:

$$
F^{-1} G^T = n\, G^T K^{-1}, \qquad F^{-1} v = \frac1\lambda \left(v - G^T K^{-1} G v\right)
$$

The first is the push-through identity. For a gradient in the window, $g_j = G^T e_j$, it gives
$F^{-1} g_j = n\, G^T K^{-1} e_j$ without a subtraction, where the second, on which the published
recurrences rest, cancels all but the last digits: with a small $\lambda$, $v$ and its projection
agree to $\lambda / \lVert F \rVert$.

The published code factors $K$ by an $LDL^T$ recurrence; this is the same matrix, factored by
Cholesky, with the residual checked.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.fisher._cholesky import HIGHEST, cholesky_solve

# Of the residual, relative to the right-hand side: float32 reaches it up to condition numbers of
# about 1e6.
_TOLERANCE = 0.1


class Solution(NamedTuple):
    """A solution of $K x = b$.

    Attributes:
      x: the solution, of shape (m,).
      failed: bool scalar, whether the Cholesky factorization failed or was inaccurate, so
        that ``x`` comes from a more strongly damped matrix.
    """

    x: jax.Array
    failed: jax.Array


@jax.jit
def solve_damped_gram(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> Solution:
    r"""Solves $(\mathrm{shift}\, I + G G^T)\, x = b$ by Cholesky, with a safe second try.

    The system is scaled to a unit diagonal, $D^{-1/2} K D^{-1/2}$ with $D = \operatorname{diag} K$,
    so that gradients of very different length, as in a run that converges, do no harm. A solution
    counts if its scaled residual, $\lVert D^{-1/2} (b - K x) \rVert_1$, is at most a tenth of
    $\lVert D^{-1/2} b \rVert_1$. If it is larger or not finite, the diagonal is raised by a few
    units of rounding, relative to itself: a larger damping, just above what the precision can
    tell from a singular matrix.

    Args:
      gram: $G G^T$, of shape (m, m).
      shift: $n \lambda$, a positive scalar.
      rhs: $b$, of shape (m,).

    Returns:
      The solution, and whether it took the second try.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.fisher import solve_damped_gram
      >>> grads = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # two gradients as rows
      >>> damping, newest = 0.5, jnp.array([0.0, 1.0])
      >>> x, failed = solve_damped_gram(grads @ grads.T, 2 * damping, newest)
      >>> print(2 * grads.T @ x)  # F^-1 of the second, F = 0.5 I + G^T G / 2
      [0.    0.667 0.667]
    """
    size = len(gram)
    diagonal = jnp.diagonal(gram) + shift
    scale = jax.lax.rsqrt(diagonal)
    jitter = 16 * size * float(jnp.finfo(gram.dtype).eps)

    def length(vector: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(scale * vector))

    def wants_a_try(tries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, _, accurate = tries
        return (number < 2) & ~accurate

    def next_try(tries: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        number, _, _ = tries
        raised = scale**2 * shift + number.astype(gram.dtype) * jitter
        matrix = gram * scale[:, jnp.newaxis] * scale + jnp.diag(raised)
        solution = scale * cholesky_solve(matrix, scale * rhs)
        residual = rhs - shift * solution - jnp.matmul(gram, solution, precision=HIGHEST)
        return number + 1, solution, length(residual) <= _TOLERANCE * length(rhs)

    start = (jnp.zeros((), jnp.int32), jnp.zeros_like(rhs), jnp.array(False))
    number, solution, _ = jax.lax.while_loop(wants_a_try, next_try, start)
    # Each gradient by itself, should even the second try fail.
    solution = jnp.where(jnp.all(jnp.isfinite(solution)), solution, rhs / diagonal)
    return Solution(solution, number > 1)
