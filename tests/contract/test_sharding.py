"""On a mesh: states keep their parameters' shardings, and updates need no communication."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import curvax

from .collectives import collectives, largest_sum, moved
from .meshes import AXIS_TYPES, make_mesh, network, sharded, shardings
from .optimizers import every_kind, every_row
from .trees import assert_trees_close, types

every_mesh = pytest.mark.parametrize("kind", AXIS_TYPES)


def shard_shapes(tree):
    return jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), tree)


def assert_follows_params(row, tx, state, params):
    """Each leaf of ``state`` is split as `curvax.state_shardings` says."""
    wanted = curvax.state_shardings(tx, params)

    def check(path, leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, state, wanted)
    expected = shard_shapes(params)
    optax.tree.map_params(
        tx,
        lambda leaf, shape: _assert_ends_with(shard_shapes(leaf), tuple(shape)),
        state,
        jax.tree.map(jnp.array, expected, is_leaf=lambda node: isinstance(node, tuple)),
    )


def _assert_ends_with(found, shape):
    assert found[len(found) - len(shape) :] == tuple(int(n) for n in shape)


def gradients(params):
    grads = jax.tree.map(lambda leaf: leaf + 0.5, params)
    diag = jax.tree.map(lambda leaf: 2.0 - leaf, params)
    return grads, diag


@every_mesh
@every_row
def test_state_keeps_its_params_shardings_through_init_and_update(row, kind):
    tx = row.make()
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh)
        grads, diag = gradients(params)
        state = tx.init(params)
        assert_follows_params(row, tx, state, params)
        update = jax.jit(lambda g, d, s, p: tx.update(g, s, p, **row.from_diag(d)))
        compiled = update.lower(grads, diag, state, params).compile()
        updates, new_state = compiled(grads, diag, state, params)
        assert_follows_params(row, tx, new_state, params)
        assert shard_shapes(updates) == shard_shapes(params)
        if kind == "explicit":
            assert types(updates) == types(params)
            assert types(new_state) == types(state)
        found = collectives(compiled)
    assert not moved(found), found
    assert largest_sum(found) <= row.largest_sum, found
