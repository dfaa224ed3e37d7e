"""Comparisons of trees of states and updates."""

from typing import Any

import jax
import numpy as np
import optax

PyTree = Any


def assert_trees_close(actual: PyTree, expected: PyTree, rtol: float = 1e-6, atol=0.0) -> None:
    """Leaf for leaf, typed PRNG keys included; a tolerance of zero means bit for bit."""
    actual, expected = map(optax.tree.unwrap_random_key_data, (actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, one), other in pairs:
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, name
        one, other = (np.asarray(leaf, np.float64) for leaf in (one, other))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)


def assert_trees_equal(actual: PyTree, expected: PyTree) -> None:
    assert_trees_close(actual, expected, rtol=0.0)


def types(tree: PyTree) -> PyTree:
    """Shape, dtype, weak type and sharding of each leaf, as JAX's tracing sees them."""
    return jax.tree.map(jax.typeof, tree)
