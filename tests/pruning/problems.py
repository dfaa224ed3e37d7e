"""Losses, batches and gradients that the pruning tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from curvax import pruning

SHAPES = {"conv": {"kernel": (2, 4, 3), "bias": (3,)}, "dense": {"kernel": (8, 4)}}
NUM_GRADS = 12


def params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def grads(seed=1, number=NUM_GRADS, dtype=jnp.float32):
    """Gradients with a common part, which couples all weights."""
    rng = np.random.default_rng(seed)

    def rows(leaf):
        noise = rng.standard_normal((number, *leaf.shape))
        return jnp.asarray(noise + rng.standard_normal(leaf.shape), dtype)

    return jax.tree.map(rows, params())


def kernels(tree):
    """The kernels' entries, those of an output unit one after the other."""
    leaves = (tree["conv"]["kernel"], tree["dense"]["kernel"])
    return np.concatenate([np.ravel(np.moveaxis(x, -1, 0)) for x in leaves]).astype(np.float64)


def kernel_rows(tree):
    leaves = (tree["conv"]["kernel"], tree["dense"]["kernel"])
    parts = [np.moveaxis(x, -1, 1).reshape(len(x), -1) for x in leaves]
    return np.concatenate(parts, axis=1).astype(np.float64)


def prune(*args, block_size=None, relative_damping=False, damping=1e-5, **options):
    """`pruning.prune` with the published defaults: the whole matrix, and the damping as it is."""
    return pruning.prune(
        *args,
        block_size=block_size,
        relative_damping=relative_damping,
        damping=damping,
        **options,
    )


def dense_fisher(rows, damping, block_size=None):
    """F of the kernels, cut into blocks."""
    matrix = rows.T @ rows / len(rows) + damping * np.eye(rows.shape[1])
    blocks = np.arange(len(matrix)) // (block_size or len(matrix))
    return np.where(blocks[:, np.newaxis] == blocks, matrix, 0)


def regression_loss(tree, inputs, targets):
    hidden = jnp.tanh(inputs @ tree["first"]["kernel"] + tree["first"]["bias"])
    return jnp.mean((hidden @ tree["second"]["kernel"] - targets) ** 2)


def regression(seed=0, num_batches=16):
    """Parameters of a small network and batches for it, as arguments of `regression_loss`."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tree = {
        "first": {"kernel": normal(6, 10), "bias": normal(10)},
        "second": {"kernel": normal(10, 2)},
    }
    batches = [(normal(8, 6), normal(8, 2)) for _ in range(num_batches)]
    return tree, batches
