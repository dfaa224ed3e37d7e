"""When curvature is refreshed, and leaves that refuse an estimate while the others go on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest

RULES = [(1, 0), (3, 0), (4, 3), (2, 5)]


@pytest.mark.parametrize(("interval", "warmup"), RULES)
def test_the_first_steps_refresh_and_then_every_nth(interval, warmup):
    due = [curvax.refresh_due(step, interval, warmup) for step in range(20)]
    assert all(due[: warmup + 1])
    assert np.flatnonzero(due)[warmup:].tolist() == list(range(warmup, 20, interval))
    assert all(isinstance(one, bool) for one in due)


@pytest.mark.parametrize(("interval", "warmup"), RULES)
def test_arrays_are_judged_as_integers_are(interval, warmup):
    rule = jax.jit(curvax.refresh_due)
    for step in range(12):
        expected = curvax.refresh_due(step, interval, warmup)
        assert bool(rule(jnp.int32(step), jnp.int32(interval), warmup)) == expected


@pytest.mark.parametrize("bad", [-1, 1.5])
def test_a_warmup_that_is_no_count_is_refused(bad):
    with pytest.raises(ValueError, match=r"refresh_warmup must be .* pass the number of initial"):
        curvax.refresh_due(0, 5, bad)


def refreshed(tx, steps, **extra):
    params = jnp.ones(2)
    state, found = tx.init(params), []
    update = jax.jit(tx.update, static_argnames="refresh")
    for step in range(steps):
        before = optax.tree.get(state, "refreshes")
        flags = {name: rule(step) for name, rule in extra.items()}
        _, state = update(params, state, params, hessian_diag=params, **flags)
        found.append(bool(optax.tree.get(state, "refreshes") > before))
    return found, state


@pytest.mark.parametrize(("interval", "warmup"), RULES)
def test_the_optimizer_and_the_host_refresh_at_the_same_steps(interval, warmup):
    tx = curvax.adahessian(0.1, update_interval=interval, refresh_warmup=warmup)
    by_state, state = refreshed(tx, 12)

    def rule(step):
        return curvax.refresh_due(step, interval, warmup)

    by_host, host_state = refreshed(tx, 12, refresh=rule)
    assert by_state == by_host == [rule(step) for step in range(12)]
    assert optax.tree.get(state, "nu_weight") == optax.tree.get(host_state, "nu_weight")


def test_an_estimate_counts_until_the_next_one():
    b2, warmup, interval = 0.9, 2, 3
    tx = curvax.adahessian(0.1, b2=b2, update_interval=interval, refresh_warmup=warmup)
    _, state = refreshed(tx, 6)
    # Steps 0 and 1 stand for themselves, 2 and 5 for three steps each.
    np.testing.assert_allclose(optax.tree.get(state, "nu_weight"), 1 - b2 ** (1 + 1 + 3 + 3), 1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_a_scheduled_interval_below_one_counts_as_one(jit):
    tx = optax.inject_hyperparams(curvax.adahessian)(
        learning_rate=0.1, update_interval=lambda count: count - 3
    )
    params = jnp.ones(2)
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for _ in range(4):
        updates, state = update(params, state, params, hessian_diag=params)
    assert optax.tree.get(state, "refreshes") == 4
    np.testing.assert_allclose(updates, -0.1, rtol=1e-3)


@pytest.mark.parametrize("interval", [1, np.int64(1)])
def test_with_a_known_interval_of_one_there_is_no_conditional(interval):
    tx = optax.chain(optax.clip(1.0), curvax.adahessian(0.1, update_interval=interval))
    one_pass = curvax.value_grad_and_hessian_diag_from_state(lambda x: jnp.sum(x**4))

    def step(x, state):
        _, grads, diag = one_pass(x, state=state)
        return tx.update(grads, state, x, hessian_diag=diag)

    def from_function(x, state):
        return tx.update(x, state, x, obj_fn=lambda x: jnp.sum(x**4))

    state = tx.init(jnp.ones(2))
    assert optax.tree.get(state, "due") is None
    for loop in (step, from_function):
        assert "cond[" not in str(jax.make_jaxpr(loop)(jnp.ones(2), state))


NAN = {"a": jnp.full(2, jnp.nan), "b": jnp.ones(3)}


def train(diags, grads=None, **options):
    """The updates and states of each step, by the leaf, in float64."""
    params = {"a": jnp.zeros(2, jnp.float64), "b": jnp.zeros(3, jnp.float64)}
    ones = jax.tree.map(jnp.ones_like, params)
    tx = curvax.scale_by_adahessian(b2=0.9, clip_threshold=None, **options)
    state, updates, states = tx.init(params), [], []
    for diag in diags:
        update, state = tx.update(ones, state, params, hessian_diag=diag)
        updates.append(update)
        states.append(state)
    return updates, states


@pytest.fixture
def diags():
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield [{"a": generator.normal(size=2), "b": generator.normal(size=3)} for _ in range(5)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])  # the last overflows when squared
def test_a_leaf_without_finite_curvature_waits_and_the_others_go_on(diags, bad):
    expected, states = train(diags)
    spoilt = [dict(diag) for diag in diags]
    spoilt[2]["a"] = np.array([1.0, bad])
    updates, waiting = train(spoilt)
    for step in range(5):
        np.testing.assert_allclose(updates[step]["b"], expected[step]["b"], rtol=1e-12)
    np.testing.assert_allclose(updates[2]["a"], updates[1]["a"], rtol=1e-12)
    assert waiting[-1].nu_weight == states[-1].nu_weight
    assert waiting[-1].refreshes == 5
    assert optax.tree.get(waiting[-1], "refusals").tolist() == [1, 0]


def test_a_leaf_that_has_accepted_nothing_stays_and_starts_with_its_first_estimate(diags):
    late = [{**diag, "a": np.full(2, np.nan)} for diag in diags[:2]] + diags[2:]
    updates, states = train(late)
    for step in range(2):
        np.testing.assert_array_equal(updates[step]["a"], 0)
    np.testing.assert_allclose(updates[2]["a"], 1 / (np.abs(diags[2]["a"]) + 1e-4), rtol=1e-12)
    assert states[-1].refusals.tolist() == [2, 0]


def test_a_refresh_that_all_leaves_refuse_changes_no_average(diags):
    bad = jax.tree.map(lambda d: d * np.nan, diags[0])
    _, states = train([diags[0], bad])
    np.testing.assert_array_equal(states[0].nu["a"], states[1].nu["a"])
    assert states[0].nu_weight == states[1].nu_weight
    assert states[1].refusals.tolist() == [1, 1]


def test_an_integer_leaf_refuses_nothing_and_keeps_nothing_going():
    params = {"w": jnp.ones(2), "table": jnp.arange(3)}
    tx = curvax.scale_by_adahessian()
    bad = {"w": jnp.full(2, jnp.nan), "table": jnp.zeros(3, jnp.int32)}
    updates, state = tx.update(params, tx.init(params), params, hessian_diag=bad)
    assert state.refusals.tolist() == [0, 1]  # in the order of the leaves: table, w
    assert state.nu_weight == 0
    np.testing.assert_array_equal(updates["w"], 0)


def test_a_nan_in_one_leaf_of_a_loss_does_not_stall_the_others():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    target = x @ jnp.array([1.0, -2.0, 0.5])

    def loss(p):  # its second derivative is NaN at zero
        power = jnp.sum(jnp.where(p["gate"] > 0, p["gate"] ** 1.5, 0.0))
        return jnp.mean((x @ p["w"] - target) ** 2) + power

    params = {"w": jnp.zeros(3), "gate": jnp.zeros(4)}
    tx = curvax.adahessian(0.1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.01 * start
    assert optax.tree.get(state, "refusals").tolist() == [60, 0]
