"""Inside Optax's wrappers an optimizer gives the numbers that it gives outside.

Each is fed with the whole tree's diagonal and, apart from that, with a function that fills
the holes of masked trees. What is masked away is compared with the optimizer alone on the
remaining sub-tree.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax

from .optimizers import every_kind, every_row
from .problems import coupled_loss, network_params, small_params
from .trees import assert_trees_close, assert_trees_equal

every_feed = pytest.mark.parametrize("feed", ["hessian_diag", "obj_fn"])
STEPS = 3


@jax.jit
def rising(params, scale=1.0):
    """A tree of distinct numbers, for gradients and diagonals."""
    leaves, treedef = jax.tree.flatten(params)
    rows = [scale * (jnp.cos(3.0 * leaf + index) + 1.5) for index, leaf in enumerate(leaves)]
    return treedef.unflatten(rows)


def batches(params, steps):
    """Gradients and diagonals of a few steps."""
    return [(rising(params, 1.0 + t), rising(params, 2.0 - 0.5 * t)) for t in range(steps)]


def feeding(row, feed, full, diag, fill=lambda p: p):
    if feed == "hessian_diag":
        return row.from_diag(diag)
    return row.from_function(lambda p: coupled_loss(fill(curvax.merge_masked(full, p))))


def train(tx, params, data, extras):
    """Updates of each step at params that stay, and the last state."""

    @jax.jit
    def update(grads, diag, state):
        return tx.update(grads, state, params, **extras(diag))

    state, history = tx.init(params), []
    for grads, diag in data:
        updates, state = update(grads, diag, state)
        history.append(updates)
    return history, state


def dense(tree):
    return {"dense": tree["dense"]}


def alone(row, feed, params):
    """The optimizer on the dense layer, with the rest of the network as constants."""
    data = [(dense(grads), dense(diag)) for grads, diag in batches(params, STEPS)]

    def extras(diag):
        return feeding(row, feed, dense(params), diag, fill=lambda p: {**params, **p})

    return train(row.make(), dense(params), data, extras)[0]


@every_feed
@every_kind
def test_masked_equals_the_optimizer_on_what_is_left(row, feed):
    params = network_params()
    tx = optax.masked(row.make(), {"conv": False, "dense": True, "scale": False})
    data = batches(params, STEPS)
    history, _ = train(tx, params, data, lambda diag: feeding(row, feed, params, diag))
    for updates, expected, (grads, _) in zip(history, alone(row, feed, params), data, strict=True):
        assert_trees_close(dense(updates), expected)
        assert_trees_equal(updates["conv"], grads["conv"])
        assert_trees_equal(updates["scale"], grads["scale"])


@every_feed
@every_kind
def test_partition_equals_the_optimizer_on_its_part(row, feed):
    params = network_params()
    labels = {"conv": "frozen", "dense": "curved", "scale": "plain"}
    transforms = {"curved": row.make(), "plain": optax.sgd(0.5), "frozen": optax.set_to_zero()}
    tx = optax.partition(transforms, labels)
    data = batches(params, STEPS)
    history, _ = train(tx, params, data, lambda diag: feeding(row, feed, params, diag))
    for updates, expected, (grads, _) in zip(history, alone(row, feed, params), data, strict=True):
        assert_trees_close(dense(updates), expected)
        assert_trees_close(updates["scale"], -0.5 * grads["scale"])
        assert not updates["conv"]["kernel"].any()


@every_kind
def test_two_parts_of_a_partition_do_not_disturb_each_other(row):
    params = network_params()
    labels = {"conv": "slow", "dense": "fast", "scale": "slow"}
    fast = row.make()
    tx = optax.partition({"fast": fast, "slow": row.make(learning_rate=0.01)}, labels)
    history, _ = train(tx, params, batches(params, STEPS), lambda diag: row.from_diag(diag))
    for updates, expected in zip(history, alone(row, "hessian_diag", params), strict=True):
        assert_trees_close(dense(updates), expected)
        assert updates["conv"]["kernel"].any()


@every_feed
@every_kind
def test_chain_hands_on_gradients_and_curvature(row, feed):
    params = small_params()
    data = batches(params, STEPS)

    def extras(diag):
        return feeding(row, feed, params, diag)

    tx = optax.chain(optax.clip(1.0), row.make(), optax.scale(2.0))
    chained, _ = train(tx, params, data, extras)
    clipped = [(jax.tree.map(lambda g: jnp.clip(g, -1, 1), grads), diag) for grads, diag in data]
    expected, _ = train(row.make(), params, clipped, extras)
    assert_trees_close(chained, jax.tree.map(lambda u: 2 * u, expected))


@every_feed
@every_kind
def test_apply_if_finite_skips_a_bad_step_as_if_it_had_not_been(row, feed):
    params = small_params()
    good = batches(params, STEPS)
    bad = (jax.tree.map(lambda g: g.at[0].set(jnp.nan), good[1][0]), good[1][1])

    def extras(diag):
        return feeding(row, feed, params, diag)

    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    updates, state = train(tx, params, [good[0], bad, *good[1:]], extras)
    expected, expected_state = train(row.make(), params, good, extras)
    assert_trees_equal(updates[1], jax.tree.map(jnp.zeros_like, params))
    assert_trees_close([updates[0], *updates[2:]], expected)
    assert_trees_close(state.inner_state, expected_state)
    assert state.total_notfinite == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_row
def test_the_first_of_several_micro_steps_updates_nothing(row, dtype):
    params = small_params(dtype)
    tx = optax.MultiSteps(row.make(), every_k_schedule=4)
    grads = rising(params)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(params), params, **row.from_diag(grads))
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert state.mini_step == 1


@every_feed
@every_kind
def test_micro_steps_equal_one_step_on_their_mean(row, feed):
    params = small_params()
    micro = batches(params, 4)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *micro[:2])
    last = jax.tree.map(lambda *leaves: sum(leaves) / 2, *micro[2:])

    def extras(diag):
        return feeding(row, feed, params, diag)

    expected, expected_state = train(row.make(), params, [mean, last], extras)

    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    mean_diag = curvax.accumulate_hessian_diag(every_k=2)
    diag_state, running = mean_diag.init(params), []
    for grads, diag in micro:
        diag, diag_state = mean_diag.update(diag, diag_state)
        running.append((grads, diag))
    history, state = train(tx, params, running, extras)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert_trees_equal([history[0], history[2]], [zeros, zeros])
    assert_trees_close([history[1], history[3]], expected, rtol=1e-5)
    assert_trees_close(state.inner_opt_state, expected_state, rtol=1e-5)


@every_kind
def test_wrappers_nest(row):
    params = network_params()
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    inner = optax.chain(optax.identity(), injected(**row.options))
    tx = optax.masked(inner, {"conv": False, "dense": True, "scale": False})
    tx = optax.apply_if_finite(tx, max_consecutive_errors=1)
    history, _ = train(
        tx, params, batches(params, STEPS), lambda diag: feeding(row, "hessian_diag", params, diag)
    )
    for updates, expected in zip(history, alone(row, "hessian_diag", params), strict=True):
        assert_trees_close(dense(updates), expected, rtol=1e-5)
