"""Losses and trees that the contract tests share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Target(NamedTuple):
    """A loss, where to start, and where its minimum is."""

    initial: PyTree
    solution: PyTree
    loss: Callable[[PyTree], jax.Array]


def rosenbrock(point: jax.Array) -> jax.Array:
    return (1.0 - point[0]) ** 2 + 100.0 * (point[1] - point[0] ** 2) ** 2


def _quadratic(initial: PyTree, solution: PyTree) -> Target:
    initial = jax.tree.map(jnp.asarray, initial)
    solution = jax.tree.map(jnp.asarray, solution)

    def loss(params: PyTree) -> jax.Array:
        errors = jax.tree.map(lambda p, s: jnp.sum((p - s) ** 2), params, solution)
        return sum(jax.tree.leaves(errors))

    return Target(initial, solution, loss)


def _parabola() -> Target:
    return _quadratic(jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0]))


def _matrix_parabola() -> Target:
    return _quadratic(jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]]))


def _mixed_tree() -> Target:
    solution = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    return _quadratic((jnp.zeros(3), jnp.zeros((2, 2))), solution)


def _rosenbrock() -> Target:
    return Target(jnp.zeros(2), jnp.ones(2), rosenbrock)


TARGETS: dict[str, Callable[[], Target]] = {
    "parabola": _parabola,
    "rosenbrock": _rosenbrock,
    "matrix_parabola": _matrix_parabola,
    "mixed_tree": _mixed_tree,
}


def small_params(dtype: Any = jnp.float32) -> PyTree:
    """A dense layer: the smallest tree with two ranks."""
    kernel = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    return {"bias": jnp.array([0.25, -0.5], dtype), "kernel": kernel.astype(dtype)}


def network_params() -> PyTree:
    """A convolution kernel, a dense layer, and a scalar."""
    kernel = jnp.linspace(-0.9, 1.1, 24).reshape(2, 2, 2, 3)
    return {"conv": {"kernel": kernel}, "dense": small_params(), "scale": jnp.array(0.75)}


@jax.jit
def coupled_loss(params: PyTree, shift: jax.Array | float = 0.0) -> jax.Array:
    """A loss whose Hessian couples every pair of entries, for any tree of real leaves."""
    leaves = jax.tree.leaves(params)
    total = sum(jnp.sum(leaf) for leaf in leaves)
    squares = [(leaf - shift) ** 2 for leaf in leaves]
    # The coupling is weak enough that no probe cancels the diagonal.
    return (total - 1.0) ** 2 / 32 + sum(jnp.sum(square + square**2) for square in squares)
