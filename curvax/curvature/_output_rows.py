r"""What of a batch's outputs becomes a row of $G$, and the gradient's coefficients in these rows.

With $J_i$ the Jacobian of an example's outputs and $u_i$ the gradient of its loss in them, a matrix
$\frac1n \sum_i J_i^T B_i B_i^T J_i$ has the rows $b_{ir}^T J_i$, with $b_{ir}$ the columns of
$B_i$, and the gradient is $\frac1n \sum_{ir} s_{ir} J_i^T b_{ir}$ where $B_i s_i = u_i$.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax.curvature._batch_loss import BatchLoss
from curvax.curvature._losses import softmax_cross_entropy

Matrix = Literal["gauss_newton", "empirical_fisher", "improved_empirical_fisher"]


class OutputRows(NamedTuple):
    """Directions in the space of outputs, and coefficients.

    Attributes:
      directions: $b_{ir}$, of shape (n, r, k).
      samples: $s_{ir}$, of shape (n, r).
    """

    directions: jax.Array
    samples: jax.Array


def of_cotangents(cotangents: jax.Array, matrix: Matrix) -> OutputRows:
    r"""Rows of $J^T J$, or of an empirical Fisher matrix, for $u$ of shape (n, k).

    The empirical Fisher matrix has one row an example, $u_i^T J_i$, the improved one that row over
    $\lVert u_i \rVert$: examples that fit do not count less. With a single output the latter is the
    Gauss-Newton matrix.
    """
    if matrix == "gauss_newton":
        # Zeros like the cotangents are sharded as they are.
        identity = jnp.eye(cotangents.shape[1], dtype=cotangents.dtype)
        return OutputRows(jnp.zeros_like(cotangents)[:, jnp.newaxis] + identity, cotangents)
    if matrix == "empirical_fisher":
        return OutputRows(cotangents[:, jnp.newaxis], jnp.ones_like(cotangents[:, :1]))
    lengths = jnp.linalg.norm(cotangents, axis=1, keepdims=True)
    units = cotangents / jnp.where(lengths > 0, lengths, 1)
    return OutputRows(units[:, jnp.newaxis], lengths)


def of_loss(batch: BatchLoss, outputs: jax.Array, matrix: Matrix) -> OutputRows:
    """Rows for a loss whose output Hessian is not the identity, for outputs of shape (n, k)."""
    gradients = jax.vmap(jax.grad(batch.loss.value))(outputs, batch.targets)
    if matrix != "gauss_newton":
        return of_cotangents(gradients, matrix)
    basis = jnp.eye(outputs.shape[1], dtype=outputs.dtype)

    def columns(output: jax.Array, target: jax.Array) -> jax.Array:
        return jax.vmap(lambda e: batch.loss.hessian_factor_vp(output, target, e))(basis)

    directions = jax.vmap(columns)(outputs, batch.targets)
    if batch.loss.value is softmax_cross_entropy.value:
        # B s = p - y has the solution s = (p - y) / sqrt(p), since its entries add up to zero.
        roots = jnp.exp(jax.nn.log_softmax(outputs) / 2)
        return OutputRows(directions, gradients / roots)

    def coefficients(columns: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.linalg.lstsq(columns.T, gradient)[0]

    return OutputRows(directions, jax.vmap(coefficients)(directions, gradients))
