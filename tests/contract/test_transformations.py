"""What holds for every public transformation, whether it is an optimizer or not."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

from .meshes import make_mesh, network, sharded
from .problems import coupled_loss, network_params, small_params
from .transformations import (
    every_one_that_flattens,
    every_one_with_options,
    every_transformation,
)
from .trees import assert_trees_close, assert_trees_equal, types


def step_of(row, tx, params):
    """A step ``(grads, state, params) -> (updates, state)`` with what the row needs."""

    def step(grads, state, params):
        return tx.update(grads, state, params, **row.extra(coupled_loss, params))

    return step


def run(row, tx, params, steps=3, jit=True):
    step = jax.jit(step_of(row, tx, params)) if jit else step_of(row, tx, params)
    state, history = tx.init(params), []
    for _ in range(steps):
        updates, state = step(jax.grad(coupled_loss)(params), state, params)
        history.append(updates)
    return history, state


@every_transformation
def test_map_params_keeps_a_state_and_finds_its_trees_of_params(row):
    params = network_params()
    tx = row.make(params, **row.options)
    state = tx.init(params)
    assert_trees_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)

    def check(leaf, param):
        assert leaf.shape[leaf.ndim - param.ndim :] == param.shape
        return leaf

    optax.tree.map_params(tx, check, state, params, transform_non_params=lambda leaf: leaf)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@every_transformation
def test_the_state_has_the_shardings_and_bytes_that_are_told(row, kind):
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh)
        tx = row.make(params, **row.options)
        state = tx.init(params)
        wanted = curvax.state_shardings(tx, params)
        assert jax.tree.structure(wanted) == jax.tree.structure(state)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        told = curvax.state_bytes(tx, params)
        assert told == sum(
            np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
        )


@every_transformation
def test_an_eager_update_on_an_explicit_mesh_keeps_shardings(row):
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh)
        tx = row.make(params, **row.options)
        state = tx.init(params)

        def loss(p):
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

        updates, new_state = tx.update(params, state, params, **row.extra(loss, params))
        assert types(updates) == types(params)
        assert types(new_state) == types(state)


@every_one_with_options
def test_injected_options_change_nothing(row):
    params = small_params()

    def factory(**options):
        return row.make(params, **options)

    kinds = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in row.options]
    factory.__signature__ = inspect.Signature(kinds)
    expected, _ = run(row, row.make(params, **row.options), params)
    injected, _ = run(row, optax.inject_hyperparams(factory)(**row.options), params)
    assert_trees_close(injected, expected, rtol=1e-5)


@every_one_with_options
def test_arrays_given_as_options_survive_a_donated_state(row):
    params = small_params()
    options = {name: jnp.asarray(value) for name, value in row.options.items()}
    tx = row.make(params, **options)
    step = jax.jit(step_of(row, tx, params), donate_argnums=1)
    for _ in range(2):  # a second run starts from a state of its own
        state = tx.init(params)
        for _ in range(2):
            _, state = step(params, state, params)
    assert not any(value.is_deleted() for value in options.values())


@every_transformation
def test_python_floats_are_parameters(row):
    params = {"a": 1.0, "b": -0.25}
    arrays = jax.tree.map(jnp.asarray, params)
    expected, _ = run(row, row.make(arrays, **row.options), arrays)
    for jit in (False, True):
        history, _ = run(row, row.make(params, **row.options), params, jit=jit)
        assert_trees_close(history, expected, rtol=1e-5)


@every_transformation
def test_the_second_call_of_a_step_compiles_nothing(row, compilations):
    params = small_params()
    tx = row.make(params, **row.options)
    grads = jax.grad(coupled_loss)(params)
    step = jax.jit(step_of(row, tx, params))
    _, state = step(grads, tx.init(params), params)
    compilations()
    for _ in range(3):
        _, state = step(grads, state, params)
    assert not compilations()


@every_transformation
def test_each_device_of_a_shard_map_runs_a_loop_of_its_own(row):
    mesh = make_mesh("automatic", (2,), ("models",))
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), small_params())
    tx = row.make(small_params(), **row.options)

    def trained(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(coupled_loss)(params)
            updates, state = tx.update(grads, state, params, **row.extra(coupled_loss, params))
            return (jax.tree.map(lambda p, u: p - 0.01 * u, params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0][0]

    def of_one_device(stacked):
        params = trained(jax.tree.map(lambda leaf: leaf[0], stacked))
        return jax.tree.map(lambda leaf: leaf[jnp.newaxis], params)

    axis = jax.P("models")
    mapped = jax.shard_map(of_one_device, mesh=mesh, in_specs=axis, out_specs=axis)
    assert_trees_close(jax.jit(mapped)(members), jax.jit(jax.vmap(trained))(members), rtol=1e-5)


@every_one_that_flattens
def test_flattened_params_give_the_same_updates(row):
    params = small_params()
    tx = row.make(params, **row.options)
    grads = jax.grad(coupled_loss)(params)
    extra = {"hessian_diag": jax.tree.map(lambda leaf: leaf + 2, params)}
    expected, _ = tx.update(grads, tx.init(params), params, **extra)
    flat = optax.flatten(tx)
    updates, _ = flat.update(grads, flat.init(params), params, **extra)
    assert_trees_close(updates, expected, rtol=1e-5)
