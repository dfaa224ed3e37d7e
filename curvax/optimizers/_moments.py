"""The gradient's average and the step of AdaHessian's Algorithm 1, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax._trees import PyTree, count_true, is_inexact, wide_dtype

Scalar = jax.typing.ArrayLike


def average_gradient(gradient: jax.Array, mean: jax.Array, b1: Scalar) -> jax.Array:
    """``m`` of Algorithm 1, in float32 or wider; integers are unchanged."""
    if not is_inexact(mean):
        return mean
    dtype = jnp.promote_types(wide_dtype(gradient), mean.dtype)
    decay = jnp.asarray(b1, dtype)
    return decay * mean.astype(dtype) + (1 - decay) * jnp.asarray(gradient, dtype)


def corrected_mean(
    mu: PyTree, grads: PyTree, count: jax.Array, b1: Scalar, dtype: Any, *, nesterov: bool
) -> PyTree:
    """``mu`` over its weight, one step ahead if ``nesterov``; integers are unchanged."""
    decay = jnp.asarray(b1, dtype)
    # A float exponent: each value of a concrete integer would be compiled separately.
    weight = 1 - decay ** count.astype(dtype)

    def leaf(m: jax.Array, g: jax.Array) -> jax.Array:
        if not is_inexact(m):
            return m
        if not nesterov:
            return m / weight.astype(m.dtype)
        ahead = decay / (1 - decay ** optax.safe_increment(count).astype(dtype))
        return ahead.astype(m.dtype) * m + ((1 - decay) / weight).astype(m.dtype) * g

    return jax.tree.map(leaf, mu, grads)


def preconditioned(
    mean: PyTree, squares: PyTree, known: jax.Array, eps: Scalar, hessian_power: Scalar
) -> PyTree:
    """The steps of Algorithm 1, in float32 or wider; zero while a leaf has no curvature."""
    known = jax.tree.unflatten(jax.tree.structure(mean), list(known))

    def leaf(m: jax.Array, square: jax.Array, known: jax.Array) -> jax.Array:
        if not is_inexact(m):
            return jnp.zeros_like(m)
        step = m / (_power(jnp.sqrt(square), hessian_power) + eps)
        return jnp.where(known, step, 0)

    return jax.tree.map(leaf, mean, squares, known)


def clipped_entries(steps: PyTree, threshold: Scalar) -> tuple[PyTree, jax.Array]:
    """The steps with bounded entries, and the share of entries beyond the bound."""
    counts, size = [jnp.zeros((), jnp.float32)], 0.0
    for step in jax.tree.leaves(steps):
        counts.append(count_true(jnp.abs(step) > threshold))
        size += step.size

    def leaf(step: jax.Array) -> jax.Array:
        bound = jnp.asarray(threshold, step.dtype)
        if not is_inexact(step):
            return step
        # A non-finite step stays visible to optax.apply_if_finite.
        return jnp.where(jnp.isinf(step), step, jnp.clip(step, -bound, bound))

    return jax.tree.map(leaf, steps), jnp.sum(jnp.stack(counts)) / max(size, 1.0)


def _power(curvature: jax.Array, exponent: Scalar) -> jax.Array:
    """``curvature ** exponent`` without a transcendental where the exponent is known."""
    if isinstance(exponent, int | float) and exponent in (0.5, 1):
        return curvature if exponent == 1 else jnp.sqrt(curvature)
    return curvature**exponent
