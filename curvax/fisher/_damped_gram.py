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
$F^{-1} g_j = n\, G^T K^{-1} e_j$ without a subtraction, while the second, on which the published
recurrences are based, cancels all but the last digits: with a small $\lambda$, $v$ and its
projection agree to $\lambda / \lVert F \rVert$.

The published code factors $K$ by an $LDL^T$ recurrence; this is the same matrix, factored by
Cholesky, with the residual checked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import varying_like
from curvax.fisher._cholesky import HIGHEST, blocked_cholesky, diagonal, jitters, scaled

_RESIDUAL = 0.03  # relative to the right-hand side
_ROUNDING = 0.125  # of the sum G^T x, relative to the update
_ERROR = 0.5  # estimated, relative to the update: a larger damping errs by as much


class Solution(NamedTuple):
    """A solution of $K x = b$.

    Attributes:
      x: the solution, of shape (m,).
      failed: bool scalar, whether the Cholesky factorization failed or was inaccurate, so
        that ``x`` comes from a more strongly damped matrix.
    """

    x: jax.Array
    failed: jax.Array


def solve_damped_gram(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> Solution:
    r"""Solves $(\mathrm{shift}\, I + G G^T)\, x = b$ by Cholesky, with more damping if needed.

    The system is scaled to a unit diagonal, $A y = c$ with $A = D^{-1/2} K D^{-1/2}$ and
    $D = \operatorname{diag} K$, so that gradients may have very different lengths, as in a run that
    converges. A solution is accepted if its residual, $c - A y$, is at most 3 % of $c$ or if a step
    of iterative refinement changes $G^T x$ by less than half its length. Otherwise $K$ is singular
    to working precision, and the diagonal of $A$ is raised by one machine epsilon, then by four,
    and so on until a solution is accepted. Here the residual counts only if the rounding error of
    $G^T x$ is at most an eighth of its length.

    Args:
      gram: $G G^T$, of shape (m, m).
      shift: $n \lambda$, a positive scalar.
      rhs: $b$, of shape (m,).

    Returns:
      The solution, and whether it took more than one attempt.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.fisher import solve_damped_gram
      >>> # Two gradients as rows.
      >>> grads = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
      >>> damping, newest = 0.5, jnp.array([0.0, 1.0])
      >>> x, failed = solve_damped_gram(grads @ grads.T, 2 * damping, newest)
      >>> print(2 * grads.T @ x)  # F^-1 of the second, F = 0.5 I + G^T G / 2
      [0.    0.667 0.667]
    """
    return _solve(gram, shift, rhs)


@jax.jit
def _solve(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> Solution:
    squares = diagonal(gram) + shift
    scale = jax.lax.rsqrt(squares)
    length = jnp.max(jnp.abs(scale * rhs))
    target = scale * rhs / jnp.where(length > 0, length, 1)
    system = _System(scaled(gram, scale), scale**2 * shift, target)
    dampings = jnp.asarray(jitters(len(gram), gram.dtype), gram.dtype)

    def needs_retry(last: tuple[jax.Array, _Attempt]) -> jax.Array:
        number, attempt = last
        return (number < len(dampings)) & ~attempt.accurate

    def retry(last: tuple[jax.Array, _Attempt]) -> tuple[jax.Array, _Attempt]:
        number, _ = last
        return number + 1, system.attempt(dampings[number], well_posed=False)

    # The first attempt, nearly always the only one, stands before the loop.
    start = varying_like(jnp.int32(0), target), system.attempt(0.0, well_posed=True)
    number, last = jax.lax.while_loop(needs_retry, retry, start)
    # Should even the last attempt fail, each gradient is scaled by itself.
    finite = jnp.all(jnp.isfinite(last.solution))
    solution = jnp.where(finite, scale * last.solution * length, rhs / squares)
    return Solution(solution, number > 0)


class _Attempt(NamedTuple):
    """A solution, and whether it is accurate."""

    solution: jax.Array
    accurate: jax.Array


class _System(NamedTuple):
    """$(M + D) y = c$ with a unit diagonal of the sum."""

    matrix: jax.Array
    shift: jax.Array  # the diagonal of D
    target: jax.Array

    def attempt(self, damping: jax.Array | float, *, well_posed: bool) -> _Attempt:
        """Solves with more damping; of a well-posed system the residual alone is checked."""
        added = self.shift + damping
        factor = blocked_cholesky(self.matrix + jnp.diag(added))
        solution = factor.solve(self.target)
        image = jnp.matmul(self.matrix, solution, precision=HIGHEST)
        residual = self.target - added * solution - image
        error = jnp.dot(residual, factor.solve(residual), precision=HIGHEST)
        # The squared length of G^T x, less what rounding may have added to it.
        epsilon = float(jnp.finfo(image.dtype).eps)
        noise = 0.5 * epsilon * solution
        squared = jnp.dot(solution, image - noise, precision=HIGHEST)
        accurate = jnp.abs(error) <= _ERROR**2 * squared
        solved = jnp.sum(jnp.abs(residual)) <= _RESIDUAL * jnp.sum(jnp.abs(self.target))
        if not well_posed:
            # An entry of the image, g_i G^T x, is at most |G^T x| times |g_i|. Rows may cancel in
            # truth, for a b orthogonal to G's columns, but then the first attempt is accurate.
            norms = jnp.sqrt(diagonal(self.matrix))
            at_least = jnp.max(jnp.where(norms > 0, jnp.abs(image) / norms, 0))
            rounding = epsilon * jnp.linalg.norm(norms * solution)
            solved &= rounding <= _ROUNDING * at_least
        return _Attempt(solution, accurate | solved)
