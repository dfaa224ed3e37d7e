"""The rule of Algorithm 1, its options, and the three ways of feeding it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.reference import batch_like, coupled_loss, coupled_params, random_like, ravel

pytestmark = pytest.mark.oldest


def published_rule(grads, diags, *, b1, b2, eps, power, clip=None):
    """The updates of the published code without averaging, over flat float64 arrays."""
    m = v = 0.0
    updates = []
    for t, (g, d) in enumerate(zip(grads, diags, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d**2
        step = m / (1 - b1**t) / ((np.sqrt(v) / np.sqrt(1 - b2**t)) ** power + eps)
        updates.append(step if clip is None else np.clip(step, -clip, clip))
    return updates


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_updates_are_those_of_the_published_rule(power, clip):
    with jax.enable_x64(True):
        params = coupled_params(dtype=jnp.float64)
        grads = [random_like(params, seed) for seed in range(5)]
        diags = [random_like(params, seed + 50) for seed in range(5)]
        options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
        tx = curvax.scale_by_adahessian(
            **options, hessian_power=power, averaging="none", clip_threshold=clip
        )
        state, updates = tx.init(params), []
        for g, d in zip(grads, diags, strict=True):
            update, state = tx.update(g, state, params, hessian_diag=d)
            updates.append(ravel(update))
        expected = published_rule(
            map(ravel, grads), map(ravel, diags), **options, power=power, clip=clip
        )
        np.testing.assert_allclose(updates, list(expected), rtol=1e-12)


def test_the_alias_is_the_chain_with_decoupled_decay_and_the_rate():
    params = coupled_params()
    grads, diag = random_like(params, 1), random_like(params, 2)
    mask = {"layers": True, "head": False}
    alias = curvax.adahessian(0.1, eps=1e-2, weight_decay=0.3, mask=mask)
    scale = curvax.scale_by_adahessian(eps=1e-2)
    updates, _ = alias.update(grads, alias.init(params), params, hessian_diag=diag)
    scaled, _ = scale.update(grads, scale.init(params), params, hessian_diag=diag)
    decay = {"layers": 0.3, "head": 0.0}
    for name, rate in decay.items():
        expected = jax.tree.map(lambda u, p, r=rate: -0.1 * (u + r * p), scaled[name], params[name])
        chex.assert_trees_all_close(updates[name], expected, rtol=1e-6)


def feeding(name, tx, state, params, batch):
    if name == "hessian_diag":
        one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
        _, grads, diag = one_pass(params, batch, state=state)
        return tx.update(grads, state, params, hessian_diag=diag)
    grads = jax.grad(coupled_loss)(params, batch)
    extra = {name: lambda p: coupled_loss(p, batch)}
    return tx.update(grads, state, params, **extra)


@pytest.mark.parametrize("interval", [1, 2])
def test_the_three_ways_of_feeding_give_the_same_updates(interval):
    params = coupled_params()
    batch = batch_like(params)
    results = []
    for name in ("hessian_diag", "obj_fn", "value_fn"):
        tx = curvax.adahessian(0.1, update_interval=interval, key=jax.random.key(5))
        state, point = tx.init(params), params
        step = jax.jit(partial(feeding, name, tx))
        for _ in range(4):
            updates, state = step(state, point, batch)
            point = optax.apply_updates(point, updates)
        results.append(point)
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_a_given_diagonal_wins_over_obj_fn_and_obj_fn_over_value_fn():
    tx = curvax.scale_by_adahessian(averaging="none")
    x = jnp.ones(2)

    def fail(params):
        raise AssertionError

    def update(**extra):
        return tx.update(x, tx.init(x), x, **extra)[0]

    np.testing.assert_allclose(
        update(hessian_diag=2 * x, obj_fn=fail, value_fn=fail), 0.5, rtol=1e-3
    )
    np.testing.assert_allclose(
        update(obj_fn=lambda p: 2 * jnp.sum(p**2), value_fn=fail), 0.25, rtol=1e-3
    )


@pytest.mark.parametrize("jit", [False, True])
def test_several_probes_through_obj_fn_equal_the_one_pass_mean(jit):
    params = coupled_params()
    batch, key = batch_like(params), jax.random.key(1)
    tx = curvax.scale_by_adahessian(num_probes=4, key=key)
    grads = jax.grad(coupled_loss)(params, batch)
    one_pass = curvax.value_grad_and_hessian_diag(coupled_loss, num_probes=4)
    diag = one_pass(params, batch, key=jax.random.fold_in(key, 0))[2]
    expected, _ = tx.update(grads, tx.init(params), params, hessian_diag=diag)

    def update(grads, state, params):
        return tx.update(grads, state, params, obj_fn=lambda p: coupled_loss(p, batch))

    updates, _ = (jax.jit(update) if jit else update)(grads, tx.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3)


def test_a_number_of_probes_that_is_injected_gives_the_same_mean():
    params = coupled_params()
    batch = batch_like(params)
    grads = jax.grad(coupled_loss)(params, batch)

    def update(tx):
        def step(grads, state, params):
            return tx.update(grads, state, params, obj_fn=lambda p: coupled_loss(p, batch))[0]

        return jax.jit(step)(grads, tx.init(params), params)

    options = {"learning_rate": 0.1, "num_probes": 3}
    injected = optax.inject_hyperparams(curvax.adahessian)(**options)
    chex.assert_trees_all_close(update(injected), update(curvax.adahessian(**options)), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_curvature_is_kept_in_float32_for_low_precision_params(dtype):
    tx = curvax.scale_by_adahessian()
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    assert (state.nu.dtype, state.nu_weight.dtype) == (jnp.float32, jnp.float32)
    for _ in range(3):  # 300² overflows float16
        updates, state = tx.update(params, state, params, hessian_diag=jnp.full(3, 300, dtype))
    assert updates.dtype == dtype
    np.testing.assert_allclose(updates, 1 / 300, rtol=1e-2)
    np.testing.assert_allclose(state.nu, 300.0**2 * (1 - 0.999**3), rtol=1e-3)


def test_mu_dtype_is_that_of_the_first_moment_alone():
    tx = curvax.adahessian(0.1, mu_dtype="bfloat16")
    params = {"w": jnp.ones(2), "table": jnp.arange(2)}
    state = tx.init(params)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "mu")["table"].dtype == jnp.int32
    assert optax.tree.get(state, "nu")["w"].dtype == jnp.float32


def test_integer_leaves_stay_as_they_are():
    params = {"w": jnp.ones(2), "table": jnp.array([3, 4])}
    tx = curvax.adahessian(0.1)

    def loss(p):
        return jnp.sum(p["w"][p["table"] - 3] ** 2)

    state = tx.init(params)
    for _ in range(2):
        one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
        _, grads, diag = one_pass(params, state=state)
        updates, state = tx.update(grads, state, params, hessian_diag=diag)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["table"], [3, 4])
    assert params["table"].dtype == jnp.int32
    assert np.all(params["w"] < 1)


def test_the_users_key_survives_donation():
    key = jax.random.key(7)
    params = jnp.ones(3)
    tx = curvax.adahessian(0.1, key=key)
    step = jax.jit(lambda s, p: tx.update(p, s, p, hessian_diag=p), donate_argnums=0)
    step(tx.init(params), params)
    step(tx.init(params), params)
    assert not key.is_deleted()


def test_where_curvature_vanishes_the_published_step_is_the_gradient_over_eps():
    tx = curvax.scale_by_adahessian(eps=1e-2, clip_threshold=None)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, hessian_diag=jnp.zeros(2))
    np.testing.assert_allclose(updates, 100.0, rtol=1e-5)


@pytest.mark.parametrize("feed", ["hessian_diag", "obj_fn"])
def test_a_linear_loss_takes_bounded_steps_by_default_and_they_are_counted(feed):
    params = {"linear": jnp.ones(3), "curved": jnp.ones(1), "steps": jnp.arange(2)}

    def loss(p):
        return 0.3 * jnp.sum(p["linear"]) + jnp.sum(p["curved"] ** 2) / 4

    tx = curvax.adahessian(0.1)
    _, grads, diag = curvax.value_grad_and_hessian_diag(loss)(params, key=0)
    curvature = {"hessian_diag": diag, "obj_fn": loss}
    updates, state = tx.update(grads, tx.init(params), params, **{feed: curvature[feed]})
    np.testing.assert_allclose(updates["linear"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["curved"], -0.1, rtol=1e-3)
    assert optax.tree.get(state, "clipped") == 3 / 6


def test_the_bound_keeps_an_infinite_step_visible():
    tx, x = curvax.adahessian(0.1), jnp.ones(2)
    updates, _ = tx.update(x.at[0].set(jnp.inf), tx.init(x), x, hessian_diag=x)
    np.testing.assert_allclose(updates, [-np.inf, -0.1], rtol=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_nesterov_looks_one_step_ahead_as_optax_adam_does(seed):
    generator = np.random.default_rng(seed)
    grads, diags = generator.normal(size=(2, 6, 4))
    b1, b2, eps = 0.8, 0.95, 1e-3
    m, v, expected = 0.0, 0.0, []
    for t, (g, d) in enumerate(zip(grads, diags, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d**2
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        expected.append(ahead / (np.sqrt(v / (1 - b2**t)) + eps))
    with jax.enable_x64(True):
        params = jnp.zeros(4, jnp.float64)
        tx = curvax.scale_by_adahessian(b1, b2, eps, nesterov=True, clip_threshold=None)
        # With the gradient as its diagonal, the rule is Adam's.
        adam = optax.scale_by_adam(b1, b2, eps, nesterov=True)
        state, adam_state = tx.init(params), adam.init(params)
        for g, d, wanted in zip(grads, diags, expected, strict=True):
            updates, state = tx.update(g, state, params, hessian_diag=d)
            np.testing.assert_allclose(updates, wanted, rtol=1e-12)
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params, hessian_diag=g)
            wanted, adam_state = adam.update(jnp.asarray(g), adam_state, params)
            np.testing.assert_allclose(updates, wanted, rtol=1e-12)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_skipped_zeros_leave_the_average_of_an_entry_as_it_was(seed, interval):
    generator = np.random.default_rng(seed)
    diags = generator.normal(size=(40, 6)) * (generator.random((40, 6)) < 0.3)
    diags[:, 0] = 0.0
    decay, weight, average = 0.9**interval, 0.0, np.zeros(6)
    with jax.enable_x64(True):
        x = jnp.ones(6, jnp.float64)
        tx = curvax.scale_by_adahessian(b2=0.9, update_interval=interval, skip_zeros=True)
        state = tx.init(x)
        for step, diag in enumerate(diags):
            _, state = tx.update(x, state, x, hessian_diag=diag)
            if step % interval == 0:
                before, weight = weight, decay * weight + (1 - decay)
                folded = (decay * before * average + (1 - decay) * diag**2) / weight
                average = np.where(average == 0, diag**2, np.where(diag == 0, average, folded))
            np.testing.assert_allclose(state.nu / state.nu_weight, average, rtol=1e-9)
    assert average[0] == 0


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_an_entry_that_never_curved_takes_the_mean_square_of_those_of_its_leaf_that_did(power):
    x = jnp.ones(4)
    tx = curvax.scale_by_adahessian(
        b1=0.0, eps=1e-9, hessian_power=power, skip_zeros=True, clip_threshold=None
    )
    diag = jnp.array([3.0, 0.0, 4.0, 0.0])
    updates, _ = tx.update(x, tx.init(x), x, hessian_diag=diag)
    typical = np.sqrt((9 + 16) / 2)
    expected = np.array([3.0, typical, 4.0, typical]) ** -power
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_a_leaf_that_never_curved_is_bounded_with_zeros_skipped_too():
    tx, x = curvax.adahessian(0.1, skip_zeros=True), jnp.ones(2)
    updates, _ = tx.update(x, tx.init(x), x, hessian_diag=jnp.zeros(2))
    np.testing.assert_allclose(updates, -0.1)


def test_skipped_zeros_change_nothing_where_every_entry_curves():
    x, diag = jnp.ones(3), jnp.array([1.0, -2.0, 0.5])
    states = []
    for skip_zeros in (False, True):
        tx = curvax.scale_by_adahessian(skip_zeros=skip_zeros)
        state = tx.init(x)
        for scale in (1.0, 2.0, 3.0):
            _, state = tx.update(x, state, x, hessian_diag=scale * diag)
        states.append(state)
    np.testing.assert_allclose(states[0].nu, states[1].nu, rtol=1e-6)


def test_a_row_of_an_embedding_that_batches_rarely_use_takes_steps_of_its_own_curvature():
    """With the zeros in, the step is longer by the root of how rarely the row is used."""

    def loss(table, row):
        return 2.0 * table[row] ** 2

    def last_step(skip_zeros):
        tx = curvax.scale_by_adahessian(b1=0.0, skip_zeros=skip_zeros, clip_threshold=None)
        table = jnp.ones(2)
        state = tx.init(table)
        for step in range(101):
            row = int(step % 100 == 0)
            gradient = jax.grad(loss)(table, row)
            updates, state = tx.update(gradient, state, table, obj_fn=lambda p: loss(p, row))  # noqa: B023
        return float(updates[1])

    assert last_step(skip_zeros=True) == pytest.approx(1.0, rel=0.01)  # Newton's
    assert last_step(skip_zeros=False) > 5.0


def test_a_mode_serves_a_loss_without_forward_derivatives():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))

    def loss(x):
        return jnp.sum(cube(x))

    x = jnp.array([1.0, 2.0])
    tx = curvax.scale_by_adahessian(mode="reverse_over_reverse")
    _, state = tx.update(x, tx.init(x), x, obj_fn=loss)
    np.testing.assert_allclose(jnp.sqrt(state.nu / state.nu_weight), 6 * x, rtol=1e-5)


def test_masked_params_need_their_holes_filled():
    params = coupled_params()
    batch = batch_like(params)
    tx = optax.masked(curvax.adahessian(0.1), {"layers": True, "head": False})
    grads = jax.grad(coupled_loss)(params, batch)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"curvax\.merge_masked"):
        tx.update(grads, state, params, obj_fn=lambda p: coupled_loss(p, batch))
    filled, _ = tx.update(
        grads,
        state,
        params,
        obj_fn=lambda p: coupled_loss(curvax.merge_masked(params, p), batch),
    )
    only_layers = curvax.adahessian(0.1)
    expected, _ = only_layers.update(
        grads["layers"],
        only_layers.init(params["layers"]),
        params["layers"],
        obj_fn=lambda layers: coupled_loss({**params, "layers": layers}, batch),
    )
    chex.assert_trees_all_close(filled["layers"], expected, rtol=1e-4)
