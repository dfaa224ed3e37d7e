r"""Losses that are convex in a network's outputs, with their Hessians in the outputs.

A loss is that of one example, $\ell(f_n, y_n)$ with the outputs $f_n$ of shape ``(C,)``. The output
Hessians of the two named losses, and a factor $B$ of each, are analytic:

* softmax cross-entropy: $\operatorname{diag}(p) - p p^T = B B^T$ with
  $B = \operatorname{diag}(\sqrt p)\,(I - \sqrt p \sqrt p^T)$;
* squared error $\frac12 \|f_n - y_n\|^2$: the identity.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from curvax._checks import check_choice

LossName = Literal["softmax_cross_entropy", "squared_error"]


class OutputLoss(NamedTuple):
    """A loss of one example's outputs, convex in them.

    Attributes:
      value: ``(outputs, target) -> scalar`` for one example.
      hessian_vp: ``(outputs, target, tangent)``: the output Hessian times ``tangent``.
      hessian_factor_vp: ``(outputs, target, noise)``: $B$ times ``noise``, with $B B^T$ the output
        Hessian.
      is_likelihood: whether the loss is the negative log-likelihood of an exponential
        family in its natural parameters. Then the Gauss-Newton matrix is the Fisher matrix.
      takes_labels: whether integer targets are class labels, which must then be in ``[0, C)``.
      has_dense_factor: whether ``hessian_factor_vp`` builds a ``(C, C)`` matrix for each example,
        so that large batches are processed in groups.
    """

    value: Callable[[jax.Array, Any], jax.Array]
    hessian_vp: Callable[[jax.Array, Any, jax.Array], jax.Array]
    hessian_factor_vp: Callable[[jax.Array, Any, jax.Array], jax.Array]
    is_likelihood: bool = False
    takes_labels: bool = False
    has_dense_factor: bool = False


def convex_loss(
    example_loss: Callable[[jax.Array, Any], jax.Array], *, is_likelihood: bool = False
) -> OutputLoss:
    r"""Makes a `curvax.OutputLoss` from any convex loss of one example's outputs.

    Hessian products are one ``jvp`` of the gradient. The factor $B$ is the symmetric
    square root of the dense $C \times C$ Hessian of an example, with negative eigenvalues set to
    zero; it costs $O(C^3)$ per example. For cross-entropy over a large vocabulary use
    `curvax.softmax_cross_entropy`, whose factor costs $O(C)$, with `curvax.WeightedTargets` where
    tokens are masked.

    Args:
      example_loss: ``(outputs, target) -> scalar`` with ``outputs`` of shape ``(C,)``,
        convex in ``outputs``.
      is_likelihood: whether it is the negative log-likelihood of an exponential family in
        its natural parameters, so that `curvax.fisher_vp` may use it.

    Returns:
      The loss, for `curvax.ggn_vp` and the Gauss-Newton diagonals.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> poisson = curvax.convex_loss(lambda f, y: jnp.sum(jnp.exp(f) - y * f))
      >>> poisson.hessian_vp(jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 2.0]))
      Array([1., 2.], dtype=float32)
    """

    def hessian_vp(outputs: jax.Array, target: Any, tangent: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda f: example_loss(f, target))
        return jax.jvp(gradient, (outputs,), (tangent,))[1]

    def hessian_factor_vp(outputs: jax.Array, target: Any, noise: jax.Array) -> jax.Array:
        hessian = jax.hessian(lambda f: example_loss(f, target))(outputs)
        values, vectors = jnp.linalg.eigh(hessian)
        return vectors @ (jnp.sqrt(jnp.maximum(values, 0)) * (vectors.T @ noise))

    return OutputLoss(
        example_loss, hessian_vp, hessian_factor_vp, is_likelihood, has_dense_factor=True
    )


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits)
    if jnp.issubdtype(jnp.result_type(target), jnp.integer):
        # Under jit a label out of range cannot raise: value and gradient are NaN instead.
        inside = (target >= 0) & (target < logits.size)
        return -log_probs[target] * jnp.where(inside, 1, jnp.nan).astype(logits.dtype)
    return -jnp.sum(target * log_probs)


# Both products are written out: XLA's CPU backend of jaxlib 0.10 gets p * (t - sum(p * t)) wrong
# for many vectors t with one p.


def _cross_entropy_hessian_vp(
    logits: jax.Array, target: jax.Array, tangent: jax.Array
) -> jax.Array:
    del target
    probs = jax.nn.softmax(logits)
    return probs * tangent - probs * jnp.sum(probs * tangent)


def _cross_entropy_factor_vp(logits: jax.Array, target: jax.Array, noise: jax.Array) -> jax.Array:
    del target
    roots = jnp.sqrt(jax.nn.softmax(logits))
    return roots * noise - jnp.square(roots) * jnp.sum(roots * noise)


def _half_squared_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(outputs - target))


def _identity(outputs: jax.Array, target: jax.Array, tangent: jax.Array) -> jax.Array:
    del outputs, target
    return tangent


# Targets that are probabilities must sum to one, as labels do.
softmax_cross_entropy = OutputLoss(
    _cross_entropy,
    _cross_entropy_hessian_vp,
    _cross_entropy_factor_vp,
    is_likelihood=True,
    takes_labels=True,
)
"""Cross-entropy of softmax probabilities, with integer labels or probabilities as targets."""
squared_error = OutputLoss(_half_squared_error, _identity, _identity, is_likelihood=True)
r"""Half the squared error, $\frac12 \|f_n - y_n\|^2$, with targets of the outputs' shape."""

LOSSES: dict[LossName, OutputLoss] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "squared_error": squared_error,
}

Loss = LossName | OutputLoss | Callable[[jax.Array, Any], jax.Array]


def output_loss(loss: Loss) -> OutputLoss:
    """The loss of a name, or of a function of one example's outputs."""
    if isinstance(loss, str):
        check_choice("loss", loss, get_args(LossName))
        return LOSSES[loss]
    if isinstance(loss, OutputLoss):
        return loss
    return convex_loss(loss)
