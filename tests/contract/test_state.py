"""What a step keeps: shapes, dtypes and weak types of updates and of every state leaf."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from .optimizers import ROWS, every_kind, every_row, parametrized
from .problems import coupled_loss, small_params
from .trees import assert_trees_close, types

DTYPES = ("float16", "bfloat16", "float32", "float64")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def params(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield small_params(dtype)


def make_step(row, tx):
    def step(params, state):
        value, grads = jax.value_and_grad(coupled_loss)(params)
        # A value of another dtype must not find its way into updates or state.
        other = jnp.bfloat16 if value.dtype == jnp.float16 else jnp.float16
        feed = row.from_function(coupled_loss)
        return tx.update(grads, state, params, value=value.astype(other), **feed)

    return step


@every_dtype
@every_row
def test_updates_have_the_dtypes_of_params(row, params, dtype):
    tx = row.make()
    grads = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **row.from_diag(g)))
    updates, state = step(grads, tx.init(params), params)
    assert types(updates) == types(params)
    for leaf in jax.tree.leaves((updates, optax.tree.unwrap_random_key_data(state))):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    for leaf in jax.tree.leaves(updates):
        assert bool(jnp.all(leaf <= 0) & jnp.any(leaf < 0))


@every_dtype
@every_row
def test_each_leaf_of_a_mixed_tree_keeps_its_dtype(row, params, dtype):
    tx = row.make()
    params = {"low": small_params("bfloat16"), "own": params}
    updates, state = jax.eval_shape(make_step(row, tx), params, tx.init(params))
    assert types(updates) == types(params)
    assert types(state) == types(tx.init(params))


@every_dtype
@every_row
def test_a_step_returns_state_of_the_type_it_took(row, params, dtype):
    tx = row.make()
    state = tx.init(params)
    updates, new_state = jax.eval_shape(make_step(row, tx), params, state)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)


@every_dtype
@every_kind
def test_a_step_fits_a_branch_of_cond(row, params, dtype):
    tx = row.make()

    def maybe_step(take, params, state):
        step = make_step(row, tx)
        new = jax.lax.cond(take, step, lambda params, state: (params, state), params, state)
        return jax.lax.cond(take, lambda: new[1], lambda: state)

    state = tx.init(params)
    kept = jax.eval_shape(maybe_step, jnp.array(True), params, state)
    assert types(kept) == types(state)


@every_dtype
@every_kind
def test_a_step_fits_the_carry_of_scan(row, params, dtype):
    tx = row.make()

    def steps(params, state):
        def body(carry, _):
            params, state = carry
            updates, state = make_step(row, tx)(params, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), length=3)[0]

    state = tx.init(params)
    carried = jax.eval_shape(steps, params, state)
    assert types(carried) == types((params, state))


@every_kind
def test_scanned_steps_equal_single_steps(row):
    tx = row.make()
    step = make_step(row, tx)

    def body(carry, _):
        params, state = carry
        updates, state = step(params, state)
        return (optax.apply_updates(params, updates), state), None

    params = small_params()
    start = (params, tx.init(params))
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=7))(start)
    single, one_step = start, jax.jit(body)
    for _ in range(7):
        single, _ = one_step(single, None)
    assert_trees_close(scanned, single, rtol=2e-5, atol=1e-7)


def _has_mu_dtype(row):
    return "mu_dtype" in inspect.signature(row.factory).parameters


@parametrized(tuple(row for row in ROWS if _has_mu_dtype(row)))
def test_mu_has_the_dtype_asked_for(row):
    tx = row.make(mu_dtype="bfloat16")
    params = small_params()
    state = tx.init(params)
    updates, new_state = jax.eval_shape(make_step(row, tx), params, state)
    for mu in (optax.tree.get(state, "mu"), optax.tree.get(new_state, "mu")):
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(mu))
    assert types(updates) == types(params)


@every_row
def test_init_takes_shapes_in_place_of_arrays(row):
    tx = row.make()
    params = small_params()
    abstract = jax.eval_shape(small_params)
    expected = types(tx.init(params))
    assert types(jax.eval_shape(tx.init, params)) == expected
    assert types(jax.eval_shape(tx.init, abstract)) == expected
    assert types(tx.init(abstract)) == expected
    assert types(jax.jit(tx.init)(params)) == expected
