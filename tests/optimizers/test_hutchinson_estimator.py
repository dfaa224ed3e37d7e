"""The estimator as an Optax transformation, alone and inside Sophia."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.reference import batch_like, coupled_loss, coupled_params

pytestmark = pytest.mark.oldest


def sophia(estimator, **options):
    return optax.contrib.sophia(
        1e-2, update_interval=1, hessian_diagonal_fn=estimator, clip_threshold=None, **options
    )


def test_it_returns_the_one_pass_diagonal_of_its_own_key():
    params = coupled_params()
    batch, key = batch_like(params), jax.random.key(3)
    tx = curvax.hutchinson_estimator(num_probes=2, key=key)
    state = tx.init(params)
    one_pass = curvax.value_grad_and_hessian_diag(coupled_loss, num_probes=2)
    for refresh in range(2):
        diag, state = tx.update(params, state, params, obj_fn=lambda p: coupled_loss(p, batch))
        expected = one_pass(params, batch, key=jax.random.fold_in(key, refresh))[2]
        chex.assert_trees_all_close(diag, expected, rtol=1e-5, atol=1e-6)


def test_inside_sophia_it_trains_like_the_exact_diagonal_on_a_diagonal_loss():
    scale = jnp.array([1.0, 10.0, 100.0])

    def loss(x):
        return jnp.sum(scale * x**2) / 2

    exact = optax.stateless(lambda updates, params: scale)
    results = []
    for estimator in (curvax.hutchinson_estimator(), exact):
        tx, x = sophia(estimator), jnp.ones(3)
        state = tx.init(x)
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss)(x), state, x, obj_fn=loss)
            x = optax.apply_updates(x, updates)
        results.append(x)
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_inside_sophia_it_is_found_by_the_interval():
    x = jnp.ones(3)
    tx = optax.contrib.sophia(
        1e-2, update_interval=3, hessian_diagonal_fn=curvax.hutchinson_estimator()
    )
    state = tx.init(x)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, obj_fn=lambda q: jnp.sum(q**4)))
    for _ in range(7):
        _, state = step(x, state, x)
    assert int(optax.tree.get(state, "refreshes")) == 3


def test_inside_sophia_mixed_dtypes_work_where_optax_fails():
    params = {"w": jnp.ones(2), "scale": jnp.ones((), jnp.bfloat16)}

    def loss(p):
        return jnp.sum(p["w"] ** 2) * p["scale"]

    original = sophia(optax.contrib.hutchinson_estimator_diag_hessian())
    state = original.init(params)
    with pytest.raises(TypeError):
        original.update(params, state, params, obj_fn=loss)
    tx = sophia(curvax.hutchinson_estimator())
    updates, _ = tx.update(params, tx.init(params), params, obj_fn=loss)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_integer_leaves_get_zeros():
    params = {"w": jnp.ones(2), "table": jnp.arange(2)}
    tx = curvax.hutchinson_estimator()
    diag, _ = tx.update(
        params, tx.init(params), params, obj_fn=lambda p: jnp.sum(p["w"][p["table"]] ** 2)
    )
    np.testing.assert_allclose(diag["w"], 2.0)
    np.testing.assert_array_equal(diag["table"], 0)
    assert diag["table"].dtype == jnp.int32


def test_a_diagonal_from_the_one_pass_saves_the_second_gradient():
    calls = []

    def loss(params, batch):
        calls.append(None)
        return coupled_loss(params, batch)

    params = coupled_params()
    batch = batch_like(params)
    tx = sophia(curvax.hutchinson_estimator())
    one_pass = curvax.value_grad_and_hessian_diag(loss)

    @jax.jit
    def step(params, state, key):
        _, grads, diag = one_pass(params, batch, key=key)
        return tx.update(grads, state, params, hessian_diag=diag)

    step(params, tx.init(params), jax.random.key(0))
    assert len(calls) == 1


def test_a_missing_curvature_shows_the_line_to_add():
    tx = curvax.hutchinson_estimator()
    with pytest.raises(ValueError, match=r"obj_fn=lambda p: loss_fn\(p, batch\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
