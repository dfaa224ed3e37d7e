"""Curvature over micro-batches: averaged signed, then squared."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.reference import batch_like, coupled_loss, coupled_params

pytestmark = pytest.mark.oldest


def micro_batches(params, count):
    return jnp.split(batch_like(params, size=4 * count), count)


@pytest.mark.parametrize("count", [1, 3])
def test_multi_steps_with_the_mean_diagonal_equals_the_full_batch(count):
    params = coupled_params()
    batches = micro_batches(params, count)
    key = jax.random.key(4)
    one_pass = jax.jit(curvax.value_grad_and_hessian_diag_from_state(coupled_loss))
    tx = optax.MultiSteps(curvax.adahessian(0.1, key=key), every_k_schedule=count)
    mean_diag = curvax.accumulate_hessian_diag(count)
    accumulated, state, diag_state = params, tx.init(params), mean_diag.init(params)
    whole = curvax.adahessian(0.1, key=key)
    direct, whole_state = params, whole.init(params)
    update, update_whole = jax.jit(tx.update), jax.jit(whole.update)
    for _ in range(2):
        for batch in batches:
            _, grads, diag = one_pass(accumulated, batch, state=state)
            diag, diag_state = mean_diag.update(diag, diag_state)
            updates, state = update(grads, state, accumulated, hessian_diag=diag)
            accumulated = optax.apply_updates(accumulated, updates)
        _, grads, diag = one_pass(direct, jnp.concatenate(batches), state=whole_state)
        updates, whole_state = update_whole(grads, whole_state, direct, hessian_diag=diag)
        direct = optax.apply_updates(direct, updates)
    chex.assert_trees_all_close(accumulated, direct, rtol=1e-3, atol=1e-5)


def test_the_mean_is_signed():
    mean_diag = curvax.accumulate_hessian_diag(2)
    state = mean_diag.init(jnp.zeros(2))
    _, state = mean_diag.update(jnp.array([1.0, -3.0]), state)
    mean, state = mean_diag.update(jnp.array([-1.0, 1.0]), state)
    np.testing.assert_allclose(mean, [0.0, -1.0])
    fresh, _ = mean_diag.update(jnp.array([5.0, 5.0]), state)
    np.testing.assert_allclose(fresh, 5.0)


def test_a_non_finite_micro_batch_spoils_one_step_only():
    mean_diag = curvax.accumulate_hessian_diag(2)
    state = mean_diag.init(jnp.zeros(2))
    _, state = mean_diag.update(jnp.full(2, np.nan), state)
    spoilt, state = mean_diag.update(jnp.ones(2), state)
    assert np.all(np.isnan(spoilt))
    _, state = mean_diag.update(jnp.ones(2), state)
    mean, _ = mean_diag.update(jnp.full(2, 3.0), state)
    np.testing.assert_allclose(mean, 2.0)


def test_another_counter_may_say_which_micro_step_it_is():
    mean_diag = curvax.accumulate_hessian_diag(2)
    state = mean_diag.init(jnp.zeros(2))
    _, state = mean_diag.update(jnp.full(2, np.nan), state, mini_step=0)
    _, state = mean_diag.update(jnp.ones(2), state, mini_step=0)  # the first one was skipped
    mean, _ = mean_diag.update(jnp.full(2, 3.0), state, mini_step=1)
    np.testing.assert_allclose(mean, 2.0)


def test_low_precision_diagonals_are_summed_in_float32():
    mean_diag = curvax.accumulate_hessian_diag(4)
    state = mean_diag.init(jnp.zeros(2, jnp.bfloat16))
    for value in (256.0, 1.0, 1.0, 1.0):
        mean, state = mean_diag.update(jnp.full(2, value, jnp.bfloat16), state)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, 259 / 4)
