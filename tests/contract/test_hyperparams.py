"""Hyper-parameters that change: schedules and ``optax.inject_hyperparams``."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from .optimizers import every_kind, every_row
from .problems import coupled_loss, small_params
from .trees import assert_trees_close


def run(row, tx, params, steps, jit=True):
    """The updates of each step and the last state, at params that stay where they are."""

    def step(state, index):
        def loss(p):
            return coupled_loss(p, shift=0.1 * index)

        grads = jax.grad(loss)(params)
        feed = row.from_function(loss) if jit else row.from_diag(grads)
        return tx.update(grads, state, params, **feed)

    step = jax.jit(step) if jit else step
    state, history = tx.init(params), []
    for index in range(steps):
        updates, state = step(state, index)
        history.append(updates)
    return history, state


def always_due(injected, state):
    """``injected`` with None where ``state`` has it: an array as interval is not known to be 1."""
    return jax.tree.map(
        lambda one, other: one if other is not None else None,
        injected,
        state,
        is_leaf=lambda node: node is None,
    )


def list_params():
    return [-jnp.linspace(0.5, 1.0, 6).reshape(2, 3), jnp.linspace(0.5, 1.0, 20).reshape(2, 5, 2)]


@every_row
def test_injected_hyperparams_change_nothing(row):
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    params, jit = list_params(), not row.variant
    updates, state = run(row, row.make(), params, 2, jit)
    injected_updates, injected_state = run(row, injected(**row.options), params, 2, jit)
    assert_trees_close(injected_updates, updates, rtol=1e-5)
    inner = always_due(injected_state.inner_state, state)
    assert_trees_close(inner, state, rtol=1e-5, atol=1e-5)


@every_kind
def test_an_injected_learning_rate_can_be_set_in_the_state(row):
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    tx = injected(**row.options)
    params = list_params()
    state = tx.init(params)
    doubled = 2 * optax.tree.get(state, "learning_rate")
    grads = jax.tree.map(jnp.ones_like, params)
    feed = row.from_diag(grads)
    updates, _ = tx.update(grads, state, params, **feed)
    state = optax.tree.set(state, learning_rate=doubled)
    twice, _ = tx.update(grads, state, params, **feed)
    assert_trees_close(twice, jax.tree.map(lambda u: 2 * u, updates))


@every_row
def test_the_learning_rate_is_annotated_as_a_number_or_schedule(row):
    # Tools ask for the object, so a module that postpones annotations would hide it.
    annotation = inspect.signature(row.factory).parameters["learning_rate"].annotation
    assert annotation == optax.ScalarOrSchedule
    assert not isinstance(annotation, str)


@every_kind
def test_a_constant_schedule_equals_the_constant(row):
    params = small_params()
    constant, _ = run(row, row.make(learning_rate=0.03), params, steps=10)
    schedule = optax.constant_schedule(0.03)
    scheduled, _ = run(row, row.make(learning_rate=schedule), params, steps=10)
    assert_trees_close(scheduled, constant)


@every_row
def test_a_schedule_is_called_with_the_steps_taken_so_far(row):
    params = small_params()
    grads = jax.tree.map(jnp.ones_like, params)

    def learning_rate(count):
        return 0.1 * (count + 1)

    updates = {}
    for rate in (0.1, learning_rate):
        tx = row.make(learning_rate=rate)
        update = jax.jit(
            lambda state, tx=tx: tx.update(grads, state, params, **row.from_diag(grads))
        )
        state = tx.init(params)
        for step in range(3):
            updates[rate, step], state = update(state)
    for step in range(3):
        expected = jax.tree.map(lambda u, n=step + 1: n * u, updates[0.1, step])
        assert_trees_close(updates[learning_rate, step], expected, rtol=1e-5)


@every_kind
def test_an_injected_schedule_equals_the_schedule(row):
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    schedule = optax.linear_schedule(0.1, 0.05, transition_steps=4)
    params = small_params()
    options = {**row.options, "learning_rate": schedule}
    expected, _ = run(row, row.make(learning_rate=schedule), params, steps=3)
    scheduled, state = run(row, injected(**options), params, steps=3)
    assert_trees_close(scheduled, expected, rtol=1e-5)
    assert state.hyperparams["learning_rate"] == pytest.approx(0.075)
