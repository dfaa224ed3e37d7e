r"""Losses that are convex in a network's outputs, with the Hessian that they have there.

The loss of a batch is the mean over examples of $\ell(f_n, y_n)$, where the last axis
of ``outputs`` holds one example's outputs $f_n$ and all axes before it count examples.
Its Hessian in the outputs is block-diagonal, and each block is analytic here:

* softmax cross-entropy: $\operatorname{diag}(p) - p p^T = B B^T$ with
  $B = \operatorname{diag}(\sqrt p)\,(I - \sqrt p \sqrt p^T)$;
* squared error $\frac12 \|f_n - y_n\|^2$: the identity.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class OutputLoss(NamedTuple):
    """A loss of one example's outputs, convex in them.

    Attributes:
      value: ``(outputs, target) -> scalar`` for one example.
      hessian_vp: ``(outputs, target, tangent)``: the output Hessian times ``tangent``.
      hessian_factor_vp: ``(outputs, target, noise)``: $B w$ with $B B^T$ the
        output Hessian.
      is_likelihood: whether the loss is the negative log-likelihood of an exponential
        family in its natural parameters. Then the Gauss-Newton matrix is the Fisher matrix.
    """

    value: Callable[[jax.Array, Any], jax.Array]
    hessian_vp: Callable[[jax.Array, Any, jax.Array], jax.Array]
    hessian_factor_vp: Callable[[jax.Array, Any, jax.Array], jax.Array]
    is_likelihood: bool = False


def convex_loss(
    example_loss: Callable[[jax.Array, Any], jax.Array], *, is_likelihood: bool = False
) -> OutputLoss:
    r"""Makes an `curvax.OutputLoss` of any convex loss of one example's outputs.

    Hessian products are one ``jvp`` of the gradient. The factor $B$ is the symmetric
    square root of the dense $C \times C$ Hessian of an example, for which an
    eigenvalue below zero counts as zero; it costs $O(C^3)$ an example.

    Args:
      example_loss: ``(outputs, target) -> scalar`` with ``outputs`` of shape ``(C,)``,
        convex in ``outputs``.
      is_likelihood: whether it is the negative log-likelihood of an exponential family in
        its natural parameters, so that `curvax.fisher_vp` may use it.

    Returns:
      The loss, to be handed to `curvax.ggn_vp` and the Gauss-Newton diagonals.

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

    return OutputLoss(example_loss, hessian_vp, hessian_factor_vp, is_likelihood)


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits)
    if jnp.issubdtype(jnp.result_type(target), jnp.integer):
        return -log_probs[target]
    return -jnp.sum(target * log_probs)


def _cross_entropy_hessian_vp(
    logits: jax.Array, target: jax.Array, tangent: jax.Array
) -> jax.Array:
    del target
    probs = jax.nn.softmax(logits)
    return probs * (tangent - jnp.sum(probs * tangent))


def _cross_entropy_factor_vp(logits: jax.Array, target: jax.Array, noise: jax.Array) -> jax.Array:
    del target
    roots = jnp.sqrt(jax.nn.softmax(logits))
    return roots * (noise - roots * jnp.sum(roots * noise))


def _half_squared_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(outputs - target))


def _identity(outputs: jax.Array, target: jax.Array, tangent: jax.Array) -> jax.Array:
    del outputs, target
    return tangent


# Targets that are probabilities must sum to one, as labels do.
softmax_cross_entropy = OutputLoss(
    _cross_entropy, _cross_entropy_hessian_vp, _cross_entropy_factor_vp, is_likelihood=True
)
squared_error = OutputLoss(_half_squared_error, _identity, _identity, is_likelihood=True)

LOSSES = {"softmax_cross_entropy": softmax_cross_entropy, "squared_error": squared_error}


class BatchLoss(NamedTuple):
    """The mean of a loss over a batch's examples, and its derivatives in the outputs."""

    loss: OutputLoss
    targets: Any
    batch_shape: tuple[int, ...]

    @classmethod
    def of(cls, loss: Any, outputs: jax.Array, targets: Any) -> "BatchLoss":
        if jnp.ndim(outputs) == 0:
            raise ValueError("the network's outputs must have an axis of outputs, got a scalar.")
        batch_shape = outputs.shape[:-1]
        for target in jax.tree.leaves(targets):
            if jnp.shape(target)[: len(batch_shape)] != batch_shape:
                raise ValueError(
                    f"targets must have the outputs' leading axes {batch_shape}, got shape "
                    f"{jnp.shape(target)}."
                )
        return cls(loss, targets, batch_shape)

    def over_examples(self, fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        for _ in self.batch_shape:
            fun = jax.vmap(fun)
        return fun

    @property
    def num_examples(self) -> int:
        return math.prod(self.batch_shape)

    def value(self, outputs: jax.Array) -> jax.Array:
        return jnp.mean(self.over_examples(self.loss.value)(outputs, self.targets))

    def hessian_vp(self, outputs: jax.Array, tangent: jax.Array) -> jax.Array:
        product = self.over_examples(self.loss.hessian_vp)
        return product(outputs, self.targets, tangent) / self.num_examples

    def hessian_factor_vp(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        product = self.over_examples(self.loss.hessian_factor_vp)
        return product(outputs, self.targets, noise) / math.sqrt(self.num_examples)

    def empirical_vp(self, outputs: jax.Array, tangent: jax.Array) -> jax.Array:
        def example(output: jax.Array, target: Any, direction: jax.Array) -> jax.Array:
            residual = jax.grad(self.loss.value)(output, target)
            return residual * jnp.sum(residual * direction)

        product = self.over_examples(example)
        return product(outputs, self.targets, tangent) / self.num_examples
