"""Exact dense references on small coupled problems."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def coupled_params(seed=0, dtype=jnp.float32):
    """Two leaves of equal shape, a vector and a scalar, nested in dict, tuple and list."""
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = jax.random.normal
    return {
        "layers": [normal(keys[0], (3, 2), dtype), normal(keys[1], (3, 2), dtype)],
        "head": (normal(keys[2], (2,), dtype), normal(keys[3], (), dtype)),
    }


def coupled_loss(params, batch):
    """A smooth loss whose Hessian couples every parameter with every other."""
    first, second = params["layers"]
    bias, scale = params["head"]
    hidden = jnp.tanh(batch @ first) * jnp.sin(batch @ second) + bias
    return jnp.mean(jnp.square(scale * jnp.sum(hidden, axis=-1) - 1)) + jnp.mean(hidden**3)


def batch_like(params, size=5, seed=7):
    dtype = jax.tree.leaves(params)[0].dtype
    return jax.random.normal(jax.random.key(seed), (size, 3), dtype)


def dense_hessian(loss, params, *args):
    """The Hessian over the raveled params, as a NumPy array."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x), *args)))(flat))


def ravel(tree):
    return np.asarray(ravel_pytree(tree)[0])


def random_like(params, seed):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


def quadratic(seed, size, dtype=jnp.float32):
    """A symmetric matrix with large off-diagonal entries, and its loss over two equal leaves."""
    matrix = jax.random.normal(jax.random.key(seed), (2 * size, 2 * size), dtype)
    matrix = (matrix + matrix.T) / 2

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"]])
        return x @ matrix @ x / 2

    return matrix, loss
