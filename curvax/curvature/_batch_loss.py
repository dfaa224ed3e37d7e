r"""The mean of a loss over the examples of a batch, weighted or not.

With weights $w_n$ it is $\sum_n w_n\, \ell(f_n, y_n) / \sum_n w_n$, and its Hessian in the outputs
is block-diagonal, $w_n / \sum_k w_k$ times that of each example.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import is_traced
from curvax._trees import widen
from curvax.curvature._losses import OutputLoss

# The most entries that dense Hessians built at the same time may have.
_DENSE_ENTRIES = 2**22


class WeightedTargets(NamedTuple):
    """Targets with a weight for each example.

    Pass them wherever a function of a network and a loss takes targets. The loss of a batch is then
    the weighted mean, normalized by the sum of the weights. Give padded tokens weight 0.

    Attributes:
      targets: what the loss takes, with the outputs' example axes first. Labels of examples with
        weight 0 may be anything.
      weights: a non-negative real or bool array with the shape of the example axes.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> inputs, labels, mask = (
      ...     jnp.eye(3),
      ...     jnp.array([0, 1, -1]),
      ...     jnp.array([1.0, 1.0, 0.0]),
      ... )
      >>> product = curvax.ggn_vp(
      ...     network,
      ...     "softmax_cross_entropy",
      ...     jnp.zeros((3, 2)),
      ...     jnp.eye(3, 2),
      ...     inputs,
      ...     curvax.WeightedTargets(labels, mask),
      ... )
      >>> print(product)  # as of the first two examples alone
      [[ 0.125 -0.125]
       [-0.125  0.125]
       [ 0.     0.   ]]
    """

    targets: Any
    weights: jax.Array

    @classmethod
    def ignoring(cls, labels: jax.Array, ignored: int = -100) -> Self:
        """Gives each label weight 1, or 0 where it equals ``ignored``.

        Args:
          labels: integer labels, with the outputs' example axes.
          ignored: the label to ignore; -100 as in PyTorch.

        Returns:
          The labels with their weights.
        """
        return cls(labels, jnp.asarray(labels) != ignored)


class BatchLoss(NamedTuple):
    """A batch's mean loss, and its derivatives in the outputs, in float32 or wider.

    Attributes:
      loss: the loss of an example.
      targets: with the example axes first.
      shares: each example's share of the mean, of shape ``batch_shape``; None for equal ones.
      batch_shape: the example axes' shape.
    """

    loss: OutputLoss
    targets: Any
    shares: jax.Array | None
    batch_shape: tuple[int, ...]

    @classmethod
    def of(cls, loss: OutputLoss, outputs: jax.Array, targets: Any) -> Self:
        if jnp.ndim(outputs) == 0:
            raise ValueError("the network's outputs must have at least one axis, got a scalar.")
        batch_shape = outputs.shape[:-1]
        weights = None
        if isinstance(targets, WeightedTargets):
            targets, weights = targets.targets, jnp.asarray(targets.weights)
            _check_weights(weights, batch_shape)
        for target in jax.tree.leaves(targets):
            if jnp.shape(target)[: len(batch_shape)] != batch_shape:
                raise ValueError(
                    f"targets must have the outputs' leading axes {batch_shape}, got shape "
                    f"{jnp.shape(target)}."
                )
        if loss.takes_labels and _are_labels(targets):
            targets = jnp.asarray(targets)
            if weights is not None:
                targets = jnp.where(weights > 0, targets, 0)
            _check_labels(targets, outputs.shape[-1])
        if weights is None:
            return cls(loss, targets, None, batch_shape)
        weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        return cls(loss, targets, weights / jnp.sum(weights), batch_shape)

    @property
    def num_examples(self) -> int:
        return math.prod(self.batch_shape)

    def value(self, outputs: jax.Array) -> jax.Array:
        values = self._over_examples(self.loss.value)(widen(outputs), self.targets)
        if self.shares is None:
            return jnp.mean(values)
        return jnp.sum(jnp.where(self.shares == 0, 0, self.shares * values))

    def value_and_grad(self, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(self.value)(outputs)
        return value, self._counted(gradient, 1)

    def hessian_vp(self, outputs: jax.Array, tangent: jax.Array) -> jax.Array:
        product = self._over_examples(self.loss.hessian_vp)
        return self._counted(product(widen(outputs), self.targets, widen(tangent)), self._share)

    def hessian_factor_vp(self, outputs: jax.Array, noise: jax.Array) -> jax.Array:
        over_examples = self._over_examples
        size = self.num_examples * outputs.shape[-1] ** 2
        if self.loss.has_dense_factor and size > _DENSE_ENTRIES:
            over_examples = functools.partial(self._in_groups, outputs.shape[-1])
        product = over_examples(self.loss.hessian_factor_vp)
        image = product(widen(outputs), self.targets, widen(noise))
        return self._counted(image, self._share**0.5)

    def empirical_vp(self, outputs: jax.Array, tangent: jax.Array) -> jax.Array:
        def example(output: jax.Array, target: Any, direction: jax.Array) -> jax.Array:
            residual = jax.grad(self.loss.value)(output, target)
            return residual * jnp.sum(residual * direction)

        product = self._over_examples(example)
        return self._counted(product(widen(outputs), self.targets, widen(tangent)), self._share)

    def _counted(self, image: jax.Array, factor: jax.Array | float) -> jax.Array:
        """``factor`` times the image; zeros where an example does not count, be it NaN there."""
        if self.shares is None:
            return factor * image
        return jnp.where(self.shares[..., jnp.newaxis] == 0, 0, factor * image)

    @property
    def _share(self) -> jax.Array | float:
        return 1 / self.num_examples if self.shares is None else self.shares[..., jnp.newaxis]

    def _over_examples(self, fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        for _ in self.batch_shape:
            fun = jax.vmap(fun)
        return fun

    def _in_groups(
        self, num_outputs: int, fun: Callable[..., jax.Array]
    ) -> Callable[..., jax.Array]:
        """``fun`` over examples, in groups small enough for their dense Hessians to fit."""
        size = max(1, _DENSE_ENTRIES // num_outputs**2)

        def flat(leaf: jax.Array) -> jax.Array:
            return jnp.reshape(leaf, (-1, *jnp.shape(leaf)[len(self.batch_shape) :]))

        def of_groups(*arguments: Any) -> jax.Array:
            flattened = jax.tree.map(flat, arguments)
            images = jax.lax.map(lambda group: fun(*group), flattened, batch_size=size)
            return images.reshape(*self.batch_shape, num_outputs)

        return of_groups


def _are_labels(targets: Any) -> bool:
    return targets is not None and jnp.issubdtype(jnp.result_type(targets), jnp.integer)


def _check_labels(labels: jax.Array, num_classes: int) -> None:
    """Raises on a label outside the classes; traced labels give a NaN loss instead."""
    if is_traced(labels):
        return
    values = np.asarray(labels)
    outside = values[(values < 0) | (values >= num_classes)]
    if outside.size:
        raise ValueError(
            f"labels must be in [0, {num_classes}), the classes of the outputs' last axis, got "
            f"{outside[0]}. To ignore such labels, pass "
            f"curvax.WeightedTargets.ignoring(labels, {outside[0]})."
        )


def _check_weights(weights: jax.Array, batch_shape: tuple[int, ...]) -> None:
    """Raises on weights of a wrong shape, negative or all zero; traced ones give NaN instead."""
    if weights.shape != batch_shape:
        raise ValueError(
            f"weights must have the outputs' example axes {batch_shape}, one weight for each "
            f"example, got shape {weights.shape}."
        )
    if is_traced(weights):
        return
    values = np.asarray(weights, np.float64)
    if not (np.all(values >= 0) and np.sum(values) > 0):
        raise ValueError(
            "weights must not be negative and must not all be zero, since their sum divides the "
            f"loss; got a smallest weight of {values.min(initial=0)} and a sum of {values.sum()}. "
            "Skip batches whose weights are all zero."
        )
