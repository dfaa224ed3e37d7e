"""Parameters of any tree: empty, scalar, zero-size, tuples, None; and trees of states."""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .optimizers import every_kind, every_layout, every_row
from .problems import coupled_loss, network_params, small_params
from .trees import assert_trees_close, assert_trees_equal, types


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


ODD_TREES = {
    "empty dict": lambda: {},
    "empty tuple": lambda: (),
    "empty branches": lambda: {"a": {}, "b": [(), None]},
    "scalar": lambda: jnp.ones(()),
    "vector": lambda: jnp.arange(3.0),
    "zero-size leaves": lambda: {"a": jnp.zeros((0,)), "b": jnp.zeros((3, 0)), "c": jnp.ones(2)},
    "zero-size image": lambda: jnp.zeros((3, 3, 0, 4)),
    "tuples": lambda: (jnp.ones(2), (jnp.ones(()), [jnp.ones((1, 2))])),
    "named tuple with None": lambda: [
        Layer(jnp.ones((2, 3)), None),
        Layer(jnp.ones(2), jnp.ones(1)),
    ],
}


@pytest.mark.parametrize("name", ODD_TREES)
@every_kind
def test_odd_trees_are_updated_from_a_function(row, name):
    params = ODD_TREES[name]()
    tx = row.make()
    state = tx.init(params)
    if not jax.tree.leaves(params):
        grads, loss = params, lambda p: jnp.array(0.0)
    else:
        loss = coupled_loss
        grads = jax.grad(loss)(params)
    updates, new_state = tx.update(grads, state, params, **row.from_function(loss))
    assert types(updates) == types(params)
    assert types(new_state) == types(state)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


def odd_trees():
    shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 3), (1, 2, 2)])
    names = st.sampled_from(["a", "b", "bias", "kernel"])
    return st.recursive(
        shapes | st.just({}) | st.just(None),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=5,
    )


def is_shape(node):
    return isinstance(node, tuple)


@every_layout
# A root of None would be a diagonal that was not given.
@hypothesis.given(shapes=odd_trees().filter(lambda tree: tree is not None))
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_a_nested_tree_is_updated_as_the_list_of_its_leaves(row, shapes):
    params = jax.tree.map(np.ones, shapes, is_leaf=is_shape)
    params = jax.tree.map(jnp.asarray, params)
    leaves, treedef = jax.tree.flatten(params)
    grads = [jnp.full_like(leaf, index + 1) for index, leaf in enumerate(leaves)]
    diag = [jnp.full_like(leaf, index - 3) for index, leaf in enumerate(leaves)]
    tx = row.make()
    expected, _ = tx.update(grads, tx.init(leaves), leaves, **row.from_diag(diag))
    updates, _ = tx.update(
        treedef.unflatten(grads),
        tx.init(params),
        params,
        **row.from_diag(treedef.unflatten(diag)),
    )
    assert types(updates) == types(params)
    assert_trees_equal(jax.tree.leaves(updates), expected)


@every_row
def test_map_params_finds_what_is_shaped_like_params(row):
    tx = row.make()
    params = network_params()
    state = tx.init(params)
    assert_trees_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)

    def check(leaf, param):
        assert row.compressed or leaf.shape[leaf.ndim - param.ndim :] == param.shape
        return "like a parameter"

    marked = optax.tree.map_params(tx, check, state, params, transform_non_params=lambda _: "other")
    found = jax.tree.leaves(marked)
    assert found.count("like a parameter") % len(jax.tree.leaves(params)) == 0
    assert found.count("like a parameter") > 0
    count = optax.tree.get(marked, "count", filtering=lambda path, _: "Schedule" not in str(path))
    assert count == "other"


@every_row
def test_a_state_survives_flattening(row):
    tx = row.make()
    params = small_params()
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    leaves, treedef = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(treedef, [jnp.array(leaf, copy=True) for leaf in leaves])
    feed = row.from_diag(grads)
    assert_trees_close(
        tx.update(grads, rebuilt, params, **feed), tx.update(grads, state, params, **feed), rtol=0
    )
