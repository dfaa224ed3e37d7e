"""The refresh interval: its weight, its bias correction, and refreshes that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest

B2 = 0.9


def stream(length, seed=0):
    return np.random.default_rng(seed).normal(size=(length, 4)) + 2.0


def run(diags, *, interval, refresh=None, **options):
    """The states after each step; ``interval`` and ``refresh`` may differ from step to step."""
    params = jnp.zeros(4, jnp.float64)
    intervals = interval if isinstance(interval, list) else [interval] * len(diags)
    refreshes = refresh if isinstance(refresh, list) else [refresh] * len(diags)
    state, states, updates = None, [], []
    for diag, n, flag in zip(diags, intervals, refreshes, strict=True):
        tx = curvax.scale_by_adahessian(b2=B2, update_interval=n, clip_threshold=None, **options)
        state = tx.init(params) if state is None else state
        update, state = tx.update(
            jnp.ones(4), state, params, hessian_diag=jnp.asarray(diag), refresh=flag
        )
        states.append(state)
        updates.append(np.asarray(update))
    return states, updates


def cached_rule(diags, interval):
    """The published delayed rule: the last diagonal enters the average at every step."""
    v, cached, averages = 0.0, None, []
    for t, diag in enumerate(diags):
        cached = diag if t % interval == 0 else cached
        v = B2 * v + (1 - B2) * cached**2
        averages.append(v / (1 - B2 ** (t + 1)))
    return averages


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_each_cycle_ends_where_the_cached_rule_does(interval):
    diags = stream(4 * interval)
    states, _ = run(diags, interval=interval)
    expected = cached_rule(diags, interval)
    for end in range(interval - 1, len(diags), interval):
        corrected = states[end].nu / states[end].nu_weight
        np.testing.assert_allclose(corrected, expected[end], rtol=1e-12)


def test_off_the_refresh_steps_the_given_diagonal_is_ignored():
    diags = stream(5)
    garbage = diags.copy()
    garbage[1:] = np.nan
    states, updates = run(garbage, interval=5)
    np.testing.assert_array_equal(states[0].nu, states[4].nu)
    np.testing.assert_allclose(updates[4], 1 / (np.abs(diags[0]) + 1e-4), rtol=1e-12)


def test_the_correction_is_right_when_the_interval_changes_midway():
    # Every step for the first four, then every third, as the paper's runs did.
    diags = stream(10)
    states, _ = run(
        diags, interval=[1] * 4 + [3] * 6, refresh=[True] * 4 + [True, False, False] * 2
    )
    weights, v, w = [1] * 4 + [3, 0, 0] * 2, 0.0, 0.0
    for diag, n in zip(diags, weights, strict=True):
        v, w = B2**n * v + (1 - B2**n) * diag**2, B2**n * w + 1 - B2**n
    np.testing.assert_allclose(states[-1].nu, v, rtol=1e-12)
    np.testing.assert_allclose(states[-1].nu_weight, w, rtol=1e-12)
    _, updates = run(np.full((10, 4), 3.0), interval=[1] * 4 + [3] * 6)
    np.testing.assert_allclose(updates, np.full((10, 4), 1 / (3 + 1e-4)), rtol=1e-12)


def test_a_scheduled_interval_is_decided_by_the_one_in_the_state():
    tx = optax.inject_hyperparams(curvax.scale_by_adahessian)(
        update_interval=lambda count: jnp.where(count < 2, 1, 3)
    )
    params = jnp.zeros(4)
    state = tx.init(params)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(lambda x: jnp.sum((x + 1) ** 2))
    update = jax.jit(tx.update)
    computed = []
    for _ in range(9):
        before = state.inner_state.nu_weight
        _, grads, diag = one_pass(params, state=state)
        computed.append(bool(np.any(diag)))
        _, state = update(grads, state, params, hessian_diag=diag)
        assert bool(state.inner_state.nu_weight != before) == computed[-1]
    # A new interval takes effect one step after it is set.
    assert computed == [True, True, True, True, False, False, True, False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])  # the last overflows when squared
def test_a_non_finite_refresh_leaves_the_estimate_as_it_was(bad):
    diags = stream(6)
    diags[2, 1] = bad
    states, updates = run(diags, interval=1)
    np.testing.assert_array_equal(states[1].nu, states[2].nu)
    np.testing.assert_array_equal(states[1].nu_weight, states[2].nu_weight)
    kept = np.delete(diags, 2, axis=0)
    expected, _ = run(kept, interval=1)
    np.testing.assert_allclose(states[-1].nu, expected[-1].nu, rtol=1e-12)
    np.testing.assert_allclose(states[-1].nu_weight, expected[-1].nu_weight, rtol=1e-12)
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("interval", [1, 3])
def test_the_update_is_zero_until_there_is_curvature(interval):
    diags = stream(7)
    diags[0] = np.nan
    states, updates = run(diags, interval=interval)
    for step in range(interval):
        np.testing.assert_array_equal(updates[step], 0)
        assert float(states[step].nu_weight) == 0
    np.testing.assert_allclose(updates[interval], 1 / (np.abs(diags[interval]) + 1e-4), rtol=1e-12)


def test_host_flags_fold_in_exactly_the_refreshed_steps():
    diags = stream(6)
    flags = [True, False, False, True, False, False]
    by_host, host_updates = run(diags, interval=3, refresh=flags)
    by_count, count_updates = run(diags, interval=3)
    np.testing.assert_allclose(host_updates, count_updates, rtol=1e-12)
    np.testing.assert_allclose(by_host[-1].nu, by_count[-1].nu, rtol=1e-12)


def test_the_host_may_drive_it_under_apply_if_finite():
    # The host counts steps; a rejected step leaves the optimizer's count behind the host's.
    tx = optax.apply_if_finite(curvax.scale_by_adahessian(b2=B2, update_interval=3), 5)
    params, diags = jnp.zeros(4, jnp.float64), stream(9)
    state, v, w = tx.init(params), 0.0, 0.0
    for step, diag in enumerate(diags):
        refresh = step % 3 == 0
        rejected = step in (3, 4)  # step 3 would have refreshed
        grads = jnp.full(4, np.nan if rejected else 1.0)
        updates, state = tx.update(
            grads,
            state,
            params,
            hessian_diag=jnp.asarray(diag) if refresh else None,
            refresh=refresh,
        )
        if refresh and not rejected:
            v, w = B2**3 * v + (1 - B2**3) * diag**2, B2**3 * w + 1 - B2**3
        expected = 0.0 if rejected else 1 / (np.sqrt(v / w) + 1e-4)
        np.testing.assert_allclose(updates, np.broadcast_to(expected, 4), rtol=1e-12)
    assert int(state.inner_state.count) == 7


def test_a_static_false_needs_no_curvature():
    tx = curvax.scale_by_adahessian()
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params, refresh=False)
    np.testing.assert_array_equal(updates, 0)
    assert int(state.count) == 1


def test_a_non_finite_gradient_is_handed_on_and_the_curvature_kept():
    tx = curvax.adahessian(0.1)
    x = jnp.array([1.0, 0.0])

    def loss(x):
        return jnp.sum(jnp.sqrt(x))  # infinite gradient and curvature at 0

    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
    state = tx.init(x)
    _, _, diag = one_pass(jnp.ones(2), state=state)
    _, state = tx.update(jnp.ones(2), state, x, hessian_diag=diag)
    before = optax.tree.get(state, "nu")
    _, grads, diag = one_pass(x, state=state)
    updates, state = tx.update(grads, state, x, hessian_diag=diag)
    assert not np.all(np.isfinite(updates))
    np.testing.assert_array_equal(optax.tree.get(state, "nu"), before)
