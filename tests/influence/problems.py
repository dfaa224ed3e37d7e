"""A small network, its data, and the dense matrices that scores are compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

NUM_TRAIN, NUM_TEST, WIDTH, CLASSES = 24, 5, 3, 3


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def example_losses(params, inputs, labels):
    log_probs = jax.nn.log_softmax(network(params, inputs))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def loss_fn(params, inputs, labels):
    return jnp.mean(example_losses(params, inputs, labels))


def right_logit(params, inputs, labels):
    return network(params, inputs)[0, labels[0]]


def make_params(hidden=4, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"first": (WIDTH, hidden), "second": (hidden, CLASSES)}
    return {name: jnp.asarray(rng.standard_normal(s) / 2, dtype) for name, s in shapes.items()}


def examples(number, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, WIDTH)).astype(dtype), rng.integers(0, CLASSES, number)


TRAIN, TEST = examples(NUM_TRAIN, 1), examples(NUM_TEST, 2)
BATCHES = [tuple(x[:17] for x in TRAIN), tuple(x[17:] for x in TRAIN)]  # uneven


@functools.cache
def dense(hidden=4):
    """Gradients of training and test examples, and the Gauss-Newton matrix, in float64."""
    flat, unravel = ravel_pytree(make_params(hidden))

    def gradients(fun, batch):
        def of_one(vector, x, y):
            return fun(unravel(vector), x[None], y[None])

        return np.asarray(jax.vmap(jax.grad(of_one), (None, 0, 0))(flat, *map(jnp.asarray, batch)))

    outputs = network(make_params(hidden), TRAIN[0])
    jacobian = jax.jacobian(lambda vector: network(unravel(vector), TRAIN[0]))(flat)
    probs = jax.nn.softmax(outputs)
    hessians = jax.vmap(jnp.diag)(probs) - probs[:, :, None] * probs[:, None]
    ggn = jnp.einsum("nca,ncd,ndb->ab", jacobian, hessians, jacobian) / NUM_TRAIN
    return {
        "train": gradients(loss_fn, TRAIN),
        "test": gradients(loss_fn, TEST),
        "logit": gradients(right_logit, TEST),
        "ggn": np.asarray(ggn),
    }


def dense_scores(matrix, damping, measured, train):
    """Of measures with these gradients."""
    return -measured @ np.linalg.solve(matrix + damping * np.eye(len(matrix)), train.T) / len(train)
