"""On a mesh: states keep their parameters' shardings, and updates gather nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

from .collectives import collectives, largest_sum, moved
from .meshes import AXIS_TYPES, make_mesh, network, sharded, shardings
from .optimizers import every_layout, every_row
from .trees import assert_trees_close, assert_trees_equal, types

every_mesh = pytest.mark.parametrize("kind", AXIS_TYPES)


def shard_shapes(tree):
    return jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), tree)


def assert_follows_params(tx, state, params):
    """Each leaf of ``state`` is split as `curvax.state_shardings` says."""
    wanted = curvax.state_shardings(tx, params)

    def check(path, leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, state, wanted)


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
        assert_follows_params(tx, state, params)
        update = jax.jit(lambda g, d, s, p: tx.update(g, s, p, **row.from_diag(d)))
        compiled = update.lower(grads, diag, state, params).compile()
        updates, new_state = compiled(grads, diag, state, params)
        assert_follows_params(tx, new_state, params)
        assert shard_shapes(updates) == shard_shapes(params)
        if kind == "explicit":
            assert types(updates) == types(params)
            assert types(new_state) == types(state)
        found = collectives(compiled)
    assert not moved(found), found
    assert largest_sum(found) <= row.largest_sum, found


def test_the_counter_of_collectives_sees_a_gather_and_a_sum():
    mesh = make_mesh("automatic")
    rows = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("x")))
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    assert moved(collectives(gather.lower(rows).compile())).total() == 1
    total = jax.jit(lambda x: x.sum(axis=0))
    found = collectives(total.lower(rows).compile())
    assert not moved(found)
    assert largest_sum(found) == 4


@every_layout
def test_a_jitted_init_keeps_the_shardings_it_is_given(row):
    tx, mesh = row.make(), make_mesh("automatic")
    params = sharded(network(), mesh)
    wanted = curvax.state_shardings(tx, params)
    assert_follows_params(tx, jax.jit(tx.init, out_shardings=wanted)(params), params)


@every_layout
def test_shardings_are_known_behind_masks(row):
    mesh = make_mesh("automatic")
    params = sharded(network(), mesh)
    labels = {"conv": "ours", "dense": "adam", "head": "ours", "scale": "adam"}
    for tx in (
        optax.partition({"ours": row.make(), "adam": optax.adam(0.1)}, labels),
        optax.masked(row.make(), {"conv": True, "dense": False, "head": True, "scale": False}),
    ):
        wanted = curvax.state_shardings(tx, params)
        assert_follows_params(tx, jax.jit(tx.init, out_shardings=wanted)(params), params)


def network_loss(params, images):
    """Uses every leaf, and couples all entries."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dims
    )
    x = jnp.tanh(x.reshape(len(x), -1) @ params["dense"]["kernel"] / 20)
    x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1) @ params["head"]["kernel"]
    return jnp.mean((params["scale"] * jnp.tanh(x)) ** 2) + jnp.mean(params["dense"]["bias"] ** 4)


def trained(row, tx, params, images, steps):
    """Parameters and state after a few steps that take their own probes."""

    @jax.jit
    def step(params, state):
        if row.takes_curvature:
            one_pass = curvax.value_grad_and_hessian_diag_from_state(network_loss)
            _, grads, diag = one_pass(params, images, state=state)
        else:
            grads = diag = jax.grad(network_loss)(params, images)
        updates, state = tx.update(grads, state, params, **row.from_diag(diag))
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)
    for _ in range(steps):
        params, state = step(params, state)
    return jax.device_get((params, optax.tree.unwrap_random_key_data(state)))


def images(dtype=None):
    return jax.random.normal(jax.random.key(5), (16, 8, 8, 2), dtype)


@every_layout
def test_sharded_parameters_train_as_on_one_device(row, x64):
    tx = row.make(learning_rate=0.01)
    single = trained(row, tx, network(), images(), steps=5)
    mesh = make_mesh("automatic")
    parallel = trained(row, tx, sharded(network(), mesh), images(), steps=5)
    assert_trees_close(parallel, single, rtol=1e-9, atol=1e-12)


@every_layout
def test_eight_shards_of_the_batch_train_as_the_whole_batch_does(row, x64):
    tx = row.make(learning_rate=0.01)
    single = trained(row, tx, network(), images(), steps=20)
    mesh = make_mesh("automatic", names=("data",))
    replicated = jax.device_put(network(), NamedSharding(mesh, P()))
    batch = jax.device_put(images(), NamedSharding(mesh, P("data")))
    parallel = trained(row, tx, replicated, batch, steps=20)
    assert_trees_close(parallel, single, rtol=1e-9, atol=1e-12)


def test_in_float32_gradient_and_curvature_agree_relative_to_their_norms():
    one_pass = jax.jit(curvax.value_grad_and_hessian_diag(network_loss))
    mesh = make_mesh("automatic", names=("data",))
    batch = images(jnp.float32)
    single = one_pass(network(), batch, key=jax.random.key(1))[1:]
    parallel = one_pass(
        jax.device_put(network(), NamedSharding(mesh, P())),
        jax.device_put(batch, NamedSharding(mesh, P("data"))),
        key=jax.random.key(1),
    )[1:]
    for one, other in zip(jax.device_get(parallel), jax.device_get(single), strict=True):
        difference = optax.tree.norm(optax.tree.sub(one, other))
        assert difference < 1e-5 * optax.tree.norm(other)


@every_mesh
def test_probes_are_the_same_on_one_device_and_on_eight(kind):
    single = curvax.random_probe(jax.random.key(2), network())
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh)
        probe = jax.jit(curvax.random_probe)(jax.random.key(2), params)
        if kind == "explicit":
            assert types(probe) == types(params)
    assert_trees_equal(jax.device_get(probe), jax.device_get(single))


def test_the_one_pass_gathers_no_more_than_the_gradient_does():
    mesh = make_mesh("automatic")
    params = sharded(network(), mesh)
    key = jax.random.key(0)
    gradient = jax.jit(jax.grad(network_loss), out_shardings=shardings(params))
    one_pass = jax.jit(
        lambda p, x: curvax.value_grad_and_hessian_diag(network_loss)(p, x, key=key)[2],
        out_shardings=shardings(params),
    )
    batch = jax.device_put(np.asarray(images()), NamedSharding(mesh, P()))
    largest = [
        max((one.size for one in moved(collectives(f.lower(params, batch).compile()))), default=0)
        for f in (gradient, one_pass)
    ]
    assert largest[1] <= 2 * largest[0]  # a tangent may travel with its primal
