"""A jitted training step: extra arguments, compilation, donation, convergence."""

import jax
import jax.numpy as jnp
import optax
import pytest

from .optimizers import every_row
from .problems import TARGETS, coupled_loss, small_params
from .trees import assert_trees_close, assert_trees_equal


def make_step(row, tx, loss, **extra_args):
    def step(params, state):
        grads = jax.grad(loss)(params)
        feed = row.from_function(loss)
        updates, state = tx.update(grads, state, params, **feed, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


@every_row
def test_unknown_extra_arguments_are_ignored(row):
    tx = row.make()
    params = small_params()
    extra_args = {"something": jnp.ones(3), "value": jnp.ones((), jnp.float16), "mode": "text"}
    plain, extended = (
        make_step(row, tx, coupled_loss, **extras)(params, tx.init(params))
        for extras in ({}, extra_args)
    )
    assert_trees_equal(extended, plain)


@every_row
def test_the_second_call_of_a_jitted_step_compiles_nothing(row, compilations):
    tx = row.make()
    params = small_params()
    # Donation shows at once that no two leaves of a new state are one buffer.
    step = jax.jit(make_step(row, tx, coupled_loss), donate_argnums=(0, 1))
    state = tx.init(params)
    # A number that a step only writes, as the share of bounded entries, is no input to donate.
    written = optax.tree.get(state, "clipped")
    given = [leaf for leaf in jax.tree.leaves((params, state)) if leaf is not written]
    compilations()
    params, state = step(params, state)
    assert compilations()
    assert all(leaf.is_deleted() for leaf in given)
    for _ in range(2):
        params, state = step(params, state)
        assert not compilations()
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))


@every_row
def test_init_gives_each_state_leaf_its_own_buffer(row):
    params = small_params()
    leaves = jax.tree.leaves((params, row.make().init(params)))
    leaves = jax.tree.leaves(optax.tree.unwrap_random_key_data(leaves))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(buffers)) == len(buffers)


@every_row
def test_a_donated_state_leaves_the_optimizer_usable(row):
    tx = row.make()
    params = small_params()
    first = tx.init(params)
    kept = jax.tree.map(jnp.copy, optax.tree.unwrap_random_key_data(first))
    for leaf in jax.tree.leaves(first):
        leaf.delete()
    assert_trees_equal(tx.init(params), kept)


@pytest.mark.parametrize("name", TARGETS)
@every_row
def test_the_minimum_is_found_to_3e_2(row, name):
    target, trial = TARGETS[name](), row.trials[name]
    tx = row.make(**trial.options)
    step = make_step(row, tx, target.loss)

    @jax.jit
    def run(params):
        carry = (params, tx.init(params))
        return jax.lax.scan(lambda carry, _: (step(*carry), None), carry, length=trial.steps)[0]

    params, _ = run(target.initial)
    assert_trees_close(params, target.solution, rtol=3e-2, atol=3e-2)
