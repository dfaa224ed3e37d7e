"""Pruned weights stay at zero in any chain, and so do the moments of their optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import curvax
from curvax import pruning

from . import problems

PARAMS, BATCHES = problems.regression()
PRUNED = pruning.prune(PARAMS, None, 0.6, method="magnitude")

OPTIMIZERS = {
    "adam": lambda: optax.adamw(0.01, weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.05, momentum=0.9),
    "adahessian": lambda: curvax.adahessian(0.05, weight_decay=0.1),
    "mfac": lambda: curvax.mfac(0.01, num_grads=4, damping=1e-2),
}


def loss(params):
    return problems.regression_loss(params, *BATCHES[0])


def train(tx, params, steps=5):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def at_pruned(tree, mask=PRUNED.mask):
    return np.concatenate(
        [
            np.asarray(x)[~np.broadcast_to(m, np.shape(x))]
            for x, m in zip(*map(jax.tree.leaves, (tree, mask)), strict=True)
        ]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_and_the_others_train(name):
    params, _ = train(pruning.keep_pruned(PRUNED.mask, OPTIMIZERS[name]()), PRUNED.params)
    assert np.all(at_pruned(params) == 0)
    assert loss(params) < loss(PRUNED.params)


@pytest.mark.parametrize(
    ("name", "moments"),
    [("adam", ("mu", "nu")), ("sgd", ("trace",)), ("adahessian", ("mu", "nu"))],
)
def test_moments_of_pruned_weights_are_zero(name, moments):
    _, state = train(pruning.keep_pruned(PRUNED.mask, OPTIMIZERS[name]()), PRUNED.params)
    for moment in moments:
        assert np.all(at_pruned(optax.tree.get(state, moment)) == 0)


def test_pruned_weights_do_not_enter_the_window():
    _, state = train(pruning.keep_pruned(PRUNED.mask, OPTIMIZERS["mfac"]()), PRUNED.params)
    rows = optax.tree.get(state, "window").rows
    for leaf, kept in zip(*map(jax.tree.leaves, (rows, PRUNED.mask)), strict=True):
        assert np.all(np.asarray(leaf)[:, ~np.asarray(kept)] == 0)


def test_curvature_is_that_of_the_network_without_the_pruned_weights():
    """Kept weights train as those of a smaller network do, whose Hessian has no pruned row."""
    kept = jnp.array([True, False, True])
    matrix = jnp.array([[3.0, 2.0, 0.5], [2.0, 4.0, 1.0], [0.5, 1.0, 2.0]])
    small = matrix[np.ix_([0, 2], [0, 2])]

    def run(matrix, params, wrap):
        def quadratic(x):
            return x @ matrix @ x / 2

        tx = wrap(curvax.scale_by_adahessian(num_probes=1, key=jax.random.key(0)))
        grads = jax.grad(quadratic)(params)
        _, state = tx.update(grads, tx.init(params), params, obj_fn=quadratic)
        return optax.tree.get(state, "nu")

    wrapped = run(matrix, jnp.array([1.0, 0.0, 2.0]), lambda t: pruning.keep_pruned(kept, t))
    exact = run(small, jnp.array([1.0, 2.0]), lambda t: t)
    assert wrapped[1] == 0
    # One off-diagonal sign: whichever probe, z H z has the entries 3 ± 0.5 and 2 ± 0.5.
    for nu in (wrapped[jnp.array([0, 2])], exact):
        entries = jnp.sqrt(nu / (1 - 0.999))
        np.testing.assert_allclose(jnp.abs(entries - jnp.array([3.0, 2.0])), 0.5, rtol=1e-3)


def test_a_diagonal_from_outside_is_masked():
    tx = pruning.keep_pruned(PRUNED.mask, curvax.scale_by_adahessian())
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(ones, tx.init(PARAMS), PARAMS, hessian_diag=ones)
    assert np.all(at_pruned(optax.tree.get(state, "nu")) == 0)


def test_at_the_end_of_a_chain_it_undoes_whatever_came_before():
    tx = optax.chain(
        optax.sgd(0.1), optax.add_noise(0.1, 0.5, key=0), pruning.keep_pruned(PRUNED.mask)
    )
    # Even weights that are not zero yet become so.
    params, _ = train(tx, PARAMS, steps=1)
    assert np.all(at_pruned(params) == 0)


def test_a_new_mask_needs_no_new_compilation():
    count = 0
    tx = pruning.keep_pruned(PRUNED.mask, optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        nonlocal count
        count += 1
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(PRUNED.params, tx.init(PRUNED.params))
    more = pruning.prune(params, None, 0.8, method="magnitude", mask=PRUNED.mask)
    params, state = step(more.params, optax.tree.set(state, mask=more.mask))
    assert count == 1
    assert np.all(at_pruned(params, more.mask) == 0)


def test_donating_the_state_leaves_the_mask():
    tx = pruning.keep_pruned(PRUNED.mask, optax.sgd(0.1))
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    for _ in range(2):
        step(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_it_joins_masked_chains(order):
    kernels = {"first": {"kernel": True, "bias": False}, "second": {"kernel": True}}
    if order == "inside":
        tx = optax.masked(pruning.keep_pruned(PRUNED.mask, optax.adam(0.01)), kernels)
    else:
        tx = pruning.keep_pruned(PRUNED.mask, optax.masked(optax.adam(0.01), kernels))
    params, _ = train(tx, PRUNED.params)
    assert np.all(at_pruned(params) == 0)


def test_dtypes_of_updates_are_kept():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PRUNED.params)
    tx = pruning.keep_pruned(PRUNED.mask, optax.sgd(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))


def test_a_mask_that_does_not_match_is_an_error_at_init():
    with pytest.raises(ValueError, match="mask must match params"):
        pruning.keep_pruned({"first": jnp.ones(2, bool)}).init(PARAMS)
    with pytest.raises(ValueError, match="mask must be of bool"):
        pruning.keep_pruned(PARAMS).init(PARAMS)


def test_params_are_needed():
    tx = pruning.keep_pruned(PRUNED.mask)
    with pytest.raises(ValueError, match="keep_pruned needs params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_line_search_hands_further_arguments_to_its_function():
    mask = jnp.array([True, False])
    tx = pruning.keep_pruned(mask, optax.lbfgs())

    def value_fn(params, batch):
        return jnp.sum((params - batch) ** 2)

    params, batch = jnp.array([1.0, 0.0]), jnp.array([3.0, 3.0])
    value, grad = jax.value_and_grad(value_fn)(params, batch)
    updates, _ = tx.update(
        grad, tx.init(params), params, value=value, grad=grad, value_fn=value_fn, batch=batch
    )
    assert updates[0] > 0
    assert updates[1] == 0


def test_a_mask_of_another_kind_of_mapping_or_of_python_bools_is_taken():
    params = FrozenDict({"kept": jnp.ones(()), "pruned": jnp.ones(())})
    tx = pruning.keep_pruned({"kept": True, "pruned": False}, optax.sgd(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["kept"], updates["pruned"]) == (jnp.float32(-0.1), -1)


def test_a_wrong_mask_is_named_under_a_partition():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    mask = {"a": jnp.ones(3, bool), "b": jnp.ones(2, bool)}
    transforms = {"x": pruning.keep_pruned(mask, optax.sgd(0.1)), "y": optax.sgd(0.1)}
    tx = optax.partition(transforms, {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="mask must match the gradients"):
        tx.init(params)


def test_what_only_has_the_shape_of_the_params_is_left_alone():
    params = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    mask = params > 0
    inner = curvax.mfac(0.1, 8)  # whose Gram matrix has eight rows too
    tx = pruning.keep_pruned(mask, inner)
    state, plain = tx.init(params), inner.init(params)
    for _ in range(10):
        _, state = tx.update(params, state, params)
        _, plain = inner.update(jnp.where(mask, params, 0), plain, params)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, plain)


def test_a_mask_that_is_replaced_reaches_the_state_too():
    params, mask = PRUNED.params, PRUNED.mask
    tx = pruning.keep_pruned(mask, optax.contrib.schedule_free_adamw(0.01))
    _, state = train(tx, params)
    fewer = jax.tree.map(lambda m: m & (jnp.arange(m.size).reshape(m.shape) % 2 == 0), mask)
    state = optax.tree.set(state, mask=fewer)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert np.all(at_pruned(optax.tree.get(state, "z"), fewer) == 0)
