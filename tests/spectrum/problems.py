"""A small network, its data, and the exact dense matrices that the tests compare with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


@jax.jit
def loss_fn(params, inputs, targets):
    logits = network(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class Problem(NamedTuple):
    params: dict
    inputs: jax.Array
    targets: jax.Array

    @property
    def batches(self):
        """Uneven ones, of 30 and of 11 examples."""
        return [(self.inputs[:30], self.targets[:30]), (self.inputs[30:], self.targets[30:])]


def problem(seed=0, hidden=8, dtype=jnp.float64):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), dtype)

    params = {
        "first": {"kernel": normal(6, hidden), "bias": normal(hidden)},
        "second": {"kernel": normal(hidden, 4)},
    }
    inputs = jnp.asarray(rng.standard_normal((41, 6)), dtype)
    return Problem(params, inputs, jnp.asarray(rng.integers(4, size=41)))


def dense(fun, params):
    """The Hessian of ``fun`` over the raveled params."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda x: fun(unravel(x))))(flat))


def dense_hessian(one):
    return dense(lambda p: loss_fn(p, one.inputs, one.targets), one.params)


def ravel(tree):
    return np.asarray(ravel_pytree(tree)[0])
