"""Pruning by step count inside the compiled step, against NumPy's statement of the same rules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax import pruning
from curvax.pruning._smallest import Pools, share, smallest

from . import problems

SEEDS = (0, 1, 2)
CUBIC = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=12, transition_begin=4)
KERNELS = (("first", "kernel"), ("second", "kernel"))

every_seed = pytest.mark.parametrize("seed", SEEDS)
every_method = pytest.mark.parametrize(
    "method", ["magnitude", "saliency", "fisher", "hessian", "random"]
)


def params_and_loss(seed=0, dtype=jnp.float32):
    params, batches = problems.regression(seed)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return params, lambda p: problems.regression_loss(p, *batches[0])


def kernels(tree):
    return [np.asarray(tree[module][name]) for module, name in KERNELS]


def mask_of(state):
    return optax.tree.get(state, "mask")


def num_pruned(state):
    return sum(int(np.sum(~np.asarray(leaf))) for leaf in jax.tree.leaves(mask_of(state)))


def make_step(tx, loss, **jit_options):
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit_options)


def trained(tx, params, loss, steps):
    """The state after each step, and the last params."""
    step, state, history = make_step(tx, loss), tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        history.append(state)
    assert step._cache_size() == 1
    return params, history


def lowest(scores, number, pruned=()):
    """The flat positions of the lowest scores, pruned ones first and equal ones in order."""
    scores = np.asarray(scores, np.float64).copy()
    scores[list(pruned)] = -1
    return set(np.argsort(scores, kind="stable")[:number].tolist())


def flat(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def pruned_positions(state):
    return set(np.flatnonzero(~flat(kernels(mask_of(state)))).tolist())


# What is pruned, and when.


@every_seed
def test_a_schedule_reaches_its_end_exactly(seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(CUBIC, optax.adam(0.01), update_interval=4)
    params, history = trained(tx, params, loss, steps=24)
    total = flat(kernels(params)).size
    expected = [int(np.floor(float(CUBIC(4 * (t // 4))) * total + 1e-4)) for t in range(24)]
    assert [num_pruned(state) for state in history] == expected
    assert expected[-1] == int(0.9 * total)
    assert np.sum(flat(kernels(params)) == 0) == expected[-1]


@every_seed
@pytest.mark.parametrize("method", ["magnitude", "saliency"])
def test_the_lowest_scores_of_all_kernels_are_pruned(method, seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(0.4, optax.sgd(0.1), method=method)
    grads = jax.grad(loss)(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    scores = np.abs(flat(kernels(params)))
    if method == "saliency":
        scores = np.abs(flat(kernels(params)) * flat(kernels(grads)))
    assert pruned_positions(state) == lowest(scores, int(0.4 * scores.size))


@every_seed
@pytest.mark.parametrize(
    ("method", "inner", "power"),
    [("fisher", optax.adam(0.1), 1.0), ("hessian", curvax.adahessian(0.1), 0.5)],
)
def test_moments_of_the_step_before_weight_the_squares(method, inner, power, seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(0.5, inner, method=method, update_interval=3)
    step, state = make_step(tx, loss), tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert num_pruned(state) == 0  # at the first step there are no moments
    nu = flat(kernels(optax.tree.get(state, "nu"))).astype(np.float64)
    scores = flat(kernels(params)).astype(np.float64) ** 2 * nu**power
    _, state = step(params, state)
    assert pruned_positions(state) == lowest(scores, scores.size // 2)


@every_seed
@every_method
def test_pruned_weights_stay_pruned(method, seed):
    params, loss = params_and_loss(seed)
    inner = curvax.adahessian(0.1) if method == "hessian" else optax.adam(0.05)
    tx = pruning.prune_on_schedule(CUBIC, inner, update_interval=2, method=method)
    _, history = trained(tx, params, loss, steps=20)
    for earlier, later in itertools.pairwise(history):
        assert pruned_positions(earlier) <= pruned_positions(later)
    assert num_pruned(history[-1]) == int(0.9 * 80)


def test_a_schedule_that_falls_brings_no_weight_back():
    params, loss = params_and_loss()
    falling = optax.linear_schedule(0.8, 0.1, transition_steps=5)
    tx = pruning.prune_on_schedule(falling, optax.sgd(0.1), update_interval=1)
    _, history = trained(tx, params, loss, steps=8)
    assert {num_pruned(state) for state in history} == {64}


def test_between_intervals_the_mask_stays():
    params, loss = params_and_loss()
    rising = optax.linear_schedule(0.1, 0.9, transition_steps=8)
    tx = pruning.prune_on_schedule(rising, optax.sgd(0.1), update_interval=4)
    _, history = trained(tx, params, loss, steps=12)
    assert [num_pruned(state) for state in history] == [8] * 4 + [40] * 4 + [72] * 4


def test_of_equal_weights_the_first_are_pruned():
    params = {"kernel": jnp.ones((4, 5))}
    tx = pruning.prune_on_schedule(0.35, optax.sgd(0.1))
    _, state = tx.update(params, tx.init(params), params)
    assert np.flatnonzero(~np.asarray(mask_of(state)["kernel"])).tolist() == list(range(7))


def test_zero_sparsity_prunes_nothing_and_the_highest_all_but_one():
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    for sparsity, number in ((0.0, 0), (0.9, 5)):
        tx = pruning.prune_on_schedule(sparsity, optax.sgd(0.1))
        _, state = tx.update(params, tx.init(params), params)
        assert num_pruned(state) == number


# Distributions and patterns.


@every_seed
def test_uniform_gives_each_kernel_the_sparsity(seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(0.33, optax.sgd(0.1), distribution="uniform")
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    for kept, kernel in zip(kernels(mask_of(state)), kernels(params), strict=True):
        expected = lowest(np.abs(np.ravel(kernel)), int(0.33 * kernel.size))
        assert set(np.flatnonzero(~kept).tolist()) == expected


def erk_densities(shapes, density):
    """The densities of Evci et al., by their iteration: what exceeds 1 is dense."""
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    ratios = {name: np.sum(shape) / np.prod(shape) for name, shape in shapes.items()}
    dense = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = wanted / sum(ratios[name] * sizes[name] for name in rest)
        above = {name for name in rest if factor * ratios[name] > 1}
        if not above:
            return {name: 1.0 if name in dense else factor * ratios[name] for name in shapes}
        dense |= above


@every_seed
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_erk_densities_are_those_of_rigl(sparsity, seed):
    shapes = {"conv/kernel": (3, 3, 16, 32), "dense/kernel": (64, 48), "head/kernel": (48, 4)}
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    tx = pruning.prune_on_schedule(sparsity, optax.sgd(0.1), distribution="erk")
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    for name, density in erk_densities(shapes, 1 - sparsity).items():
        kept = np.sum(np.asarray(mask_of(state)[name]))
        assert abs(kept - density * params[name].size) <= 1


def test_members_of_a_stack_have_the_density_of_one():
    params = {"one/kernel": jnp.ones((8, 8)), "experts/kernel": jnp.ones((5, 8, 8))}
    layout = {"experts": "LIO"}
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), distribution="erk", layout=layout)
    _, state = tx.update(params, tx.init(params), params)
    shares = [np.mean(leaf) for leaf in jax.tree.leaves(mask_of(state))]
    np.testing.assert_allclose(shares, 0.5)


def test_patterns_give_parts_a_sparsity_of_their_own():
    params, loss = params_and_loss()
    sparsity = {"first": 0.5, "second": optax.linear_schedule(0.0, 0.2, 4)}
    tx = pruning.prune_on_schedule(sparsity, optax.sgd(0.1), update_interval=1)
    _, history = trained(tx, params, loss, steps=6)
    pruned = [[int(np.sum(~leaf)) for leaf in kernels(mask_of(state))] for state in history]
    assert pruned == [[30, int(0.05 * min(t, 4) * 20 + 1e-6)] for t in range(6)]


def test_what_no_pattern_matches_is_never_pruned():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule({"second": 0.5}, optax.sgd(0.1))
    _, history = trained(tx, params, loss, steps=2)
    assert mask_of(history[-1])["first"]["kernel"].shape == ()


# N:M.


def groups_along_fan_in(kernel, m):
    return np.moveaxis(np.asarray(kernel), -2, 0).reshape(-1, m, *kernel.shape[-1:])


@every_seed
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 3), (3, 6)])
def test_an_nm_pattern_holds_in_every_group_at_all_times(n, m, seed):
    rng = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(rng.standard_normal((24, 10)), jnp.float32)}
    sparsity = optax.linear_schedule(0.0, 1 - n / m, 10)
    tx = pruning.prune_on_schedule(
        sparsity, optax.adam(0.1), update_interval=2, structure=pruning.NM(n, m)
    )
    _, history = trained(tx, params, lambda p: jnp.sum((p["kernel"] - 1) ** 4), steps=20)
    for t, state in enumerate(history):
        assert num_pruned(state) == int(float(sparsity(t // 2 * 2)) * 240 + 1e-4)
        alive = groups_along_fan_in(mask_of(state)["kernel"], m).sum(axis=1)
        assert np.all(alive >= n)
    assert np.all(alive == n)


@every_seed
def test_nm_at_once_keeps_the_largest_of_each_group(seed):
    params, _ = params_and_loss(seed)
    params = {"kernel": params["first"]["kernel"]}
    tx = pruning.prune_on_schedule(1 / 2, optax.sgd(0.1), structure=pruning.NM(1, 2))
    _, state = tx.update(params, tx.init(params), params)
    groups = np.abs(groups_along_fan_in(params["kernel"], 2))
    kept = groups_along_fan_in(mask_of(state)["kernel"], 2)
    np.testing.assert_array_equal(kept, groups == groups.max(axis=1, keepdims=True))


def test_of_equal_weights_an_nm_pattern_keeps_n():
    params = {"kernel": jnp.ones((8, 3))}
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), structure=pruning.NM(2, 4))
    _, state = tx.update(params, tx.init(params), params)
    kept = groups_along_fan_in(mask_of(state)["kernel"], 4)
    assert np.all(kept.sum(axis=1) == 2)


def test_leaves_that_cannot_hold_an_nm_pattern_are_named_and_stay_dense():
    params = {"even": {"kernel": jnp.ones((8, 4))}, "odd": {"kernel": jnp.ones((6, 4))}}
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), structure=pruning.NM(2, 4))
    with pytest.warns(
        UserWarning, match="not pruned: odd/kernel: axis . has . entries, not divisible by 4"
    ) as caught:
        state = tx.init(params)
    assert caught[0].filename == __file__
    _, state = tx.update(params, state, params)
    assert mask_of(state)["odd"]["kernel"].shape == ()
    assert num_pruned(state) == 16


# A share of each leaf that is kept.


@every_seed
@pytest.mark.parametrize("regrow", [None, 0.3])
def test_a_leaf_of_tiny_weights_keeps_its_best(regrow, seed):
    rng = np.random.default_rng(seed)
    shapes = {"tiny": (8, 5), "large": (16, 16)}
    params = {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    params["tiny"]["kernel"] *= 1e-3
    tx = pruning.prune_on_schedule(
        CUBIC, optax.sgd(0.0), update_interval=2, min_density=0.09, regrow=regrow
    )
    _, history = trained(tx, params, lambda p: optax.tree.sum(p), steps=20)
    mask = mask_of(history[-1])
    best = np.argsort(-np.abs(np.ravel(params["tiny"]["kernel"])), kind="stable")[:4]
    assert set(np.flatnonzero(mask["tiny"]["kernel"])) >= set(best.tolist())
    if regrow is None:
        assert mask["tiny"]["kernel"].sum() == 4
    assert num_pruned(history[-1]) == int(0.9 * 296)


def test_the_kept_share_may_be_injected():
    params, loss = params_and_loss()
    make = optax.inject_hyperparams(
        pruning.prune_on_schedule, static_args=("select", "inner", "method", "distribution")
    )
    options = {"sparsity": 0.8, "inner": optax.sgd(0.1), "distribution": "global"}
    _, injected = trained(make(**options, min_density=0.15), params, loss, steps=2)
    _, plain = trained(pruning.prune_on_schedule(**options, min_density=0.15), params, loss, 2)
    for one, other in zip(kernels(mask_of(injected[-1])), kernels(mask_of(plain[-1])), strict=True):
        np.testing.assert_array_equal(one, other)


# Regrowth.


@every_seed
def test_regrowth_drops_the_lowest_and_takes_the_largest_gradients(seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.01), update_interval=2, regrow=0.3)
    step, state = make_step(tx, loss), tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    before, weights = pruned_positions(state), np.abs(flat(kernels(params)))
    gradients = np.abs(flat(kernels(jax.grad(loss)(params))))
    _, state = step(params, state)
    dropped = lowest(weights, 40 + int(0.3 * 40), pruned=before)
    candidates = sorted(dropped, key=lambda position: -gradients[position])
    assert pruned_positions(state) == dropped - set(candidates[: int(0.3 * 40)])


@every_seed
def test_sparse_training_from_the_start_keeps_the_sparsity(seed):
    params, loss = params_and_loss(seed)
    tx = pruning.prune_on_schedule(
        0.8,
        optax.adam(0.01),
        update_interval=2,
        method="random",
        distribution="erk",
        regrow=optax.cosine_decay_schedule(0.5, 10),
    )
    params, history = trained(tx, params, loss, steps=20)
    masks = [frozenset(pruned_positions(state)) for state in history]
    assert len({len(mask) for mask in masks}) == 1
    assert len(set(masks[:10])) > 1
    assert len(set(masks[10:])) == 1  # the share has fallen to 0
    assert np.all(flat(kernels(params))[~flat(kernels(mask_of(history[-1])))] == 0)


def test_with_regrowth_a_falling_sparsity_brings_weights_back():
    params, loss = params_and_loss()
    falling = optax.linear_schedule(0.8, 0.4, transition_steps=4)
    tx = pruning.prune_on_schedule(falling, optax.sgd(0.1), update_interval=1, regrow=0.0)
    _, history = trained(tx, params, loss, steps=6)
    assert [num_pruned(state) for state in history] == [64, 56, 48, 40, 32, 32]


# What the optimizer and the params see.


@pytest.mark.parametrize(
    "inner",
    [optax.adamw(0.01, weight_decay=0.1), curvax.adahessian(0.05, weight_decay=0.1)],
    ids=["adamw", "adahessian"],
)
def test_the_optimizer_sees_zeros_at_pruned_weights(inner):
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(0.6, inner)
    first, _ = trained(tx, params, loss, steps=1)
    params, history = trained(tx, params, loss, steps=5)
    for tree in (params, optax.tree.get(history[-1], "mu"), optax.tree.get(history[-1], "nu")):
        assert np.all(flat(kernels(tree))[~flat(kernels(mask_of(history[-1])))] == 0)
    assert loss(params) < loss(first)


def test_copies_of_the_weights_in_the_optimizers_state_are_pruned_too():
    params, loss = params_and_loss()
    inner = optax.contrib.schedule_free_adamw(0.01, weight_decay=0.1)
    tx = pruning.prune_on_schedule(CUBIC, inner, update_interval=2)
    params, history = trained(tx, params, loss, steps=20)
    inside = history[-1].inner_state
    for tree in (params, optax.contrib.schedule_free_eval_params(inside, params)):
        assert np.all(flat(kernels(tree))[~flat(kernels(mask_of(history[-1])))] == 0)


def test_updates_of_another_tree_are_an_error():
    params, _ = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1))
    with pytest.raises(ValueError, match="updates must match params leaf for leaf"):
        tx.update({"first": params["first"]}, tx.init(params), params)


def test_a_diagonal_from_outside_is_masked():
    params, _ = params_and_loss()
    ones = jax.tree.map(jnp.ones_like, params)
    tx = pruning.prune_on_schedule(0.6, curvax.scale_by_adahessian())
    _, state = tx.update(ones, tx.init(params), params, hessian_diag=ones)
    nu = flat(kernels(optax.tree.get(state, "nu")))
    np.testing.assert_array_equal(nu != 0, flat(kernels(mask_of(state))))


def test_a_new_mask_holds_for_the_step_that_computes_it():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1))
    after, (state,) = trained(tx, params, loss, steps=1)
    assert np.all(flat(kernels(after))[~flat(kernels(mask_of(state)))] == 0)


def test_with_nothing_pruned_the_optimizer_is_unchanged():
    params, loss = params_and_loss()
    wrapped, _ = trained(pruning.prune_on_schedule(0.0, optax.adam(0.1)), params, loss, 5)
    plain, _ = trained(optax.adam(0.1), params, loss, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), wrapped, plain)


def test_a_leaf_that_is_never_pruned_has_a_scalar_mask_and_passes_unread():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.identity())
    state = tx.init(params)
    kept = mask_of(state)["first"]["bias"]
    assert (kept.shape, bool(kept)) == ((), True)
    grads = jax.grad(loss)(params)
    jaxpr = jax.make_jaxpr(
        lambda bias, g: tx.update({**g, "first": {**g["first"], "bias": bias}}, state, params)[0][
            "first"
        ]["bias"]
    )(grads["first"]["bias"], grads).jaxpr
    assert jaxpr.outvars[0] is jaxpr.invars[0]


# Randomness.


def test_random_masks_are_reproduced_from_the_state():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(CUBIC, optax.adam(0.1), update_interval=2, method="random")
    step, state, history = make_step(tx, loss), tx.init(params), []
    for _ in range(14):
        history.append((params, state))
        params, state = step(params, state)
    resumed_params, resumed = history[7]
    for _ in range(7):
        resumed_params, resumed = step(resumed_params, resumed)
    assert pruned_positions(resumed) == pruned_positions(state)


def test_seeds_give_different_random_masks():
    params, _ = params_and_loss()
    masks = set()
    for key in (None, 1, jax.random.key(2)):
        tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), method="random", key=key)
        _, state = tx.update(params, tx.init(params), params)
        assert num_pruned(state) == 40
        masks.add(frozenset(pruned_positions(state)))
    assert len(masks) == 3


# Non-finite gradients.


@pytest.mark.parametrize("method", ["magnitude", "saliency", "random"])
def test_a_gradient_that_is_not_finite_leaves_the_mask(method):
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), update_interval=2, method=method)
    grads = jax.grad(loss)(params)
    bad = {**grads, "second": {"kernel": grads["second"]["kernel"].at[0, 0].set(jnp.nan)}}
    _, state = tx.update(bad, tx.init(params), params)
    assert num_pruned(state) == 0
    for number in (0, 40):
        _, state = tx.update(grads, state, params)
        assert num_pruned(state) == number


def test_apply_if_finite_skips_a_bad_step_as_if_it_had_not_been():
    params, loss = params_and_loss()
    tx = optax.apply_if_finite(pruning.prune_on_schedule(0.5, optax.adam(0.1)), 3)
    grads = jax.grad(loss)(params)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
    updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
    assert num_pruned(state) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    _, state = tx.update(grads, state, params)
    assert num_pruned(state) == 40


def test_weights_that_are_not_finite_are_kept():
    params = {"kernel": jnp.array([[jnp.nan, 1.0], [-jnp.inf, -jnp.nan]])}
    tx = pruning.prune_on_schedule(0.25, optax.sgd(0.1))
    _, state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
    assert mask_of(state)["kernel"].tolist() == [[True, False], [True, True]]


# Compilation, memory, dtypes.


def test_donated_masks_are_updated_in_place():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(CUBIC, optax.adam(0.1), update_interval=2)
    step = make_step(tx, loss, donate_argnums=(0, 1))
    state = tx.init(params)
    given = jax.tree.map(jnp.copy, params)
    for _ in range(20):
        before = mask_of(state)["first"]["kernel"]
        address = before.unsafe_buffer_pointer()
        params, state = step(params, state)
        assert before.is_deleted()
        assert mask_of(state)["first"]["kernel"].unsafe_buffer_pointer() == address
    assert step._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_arrays_of_the_user_outlive_a_donated_state():
    params, _ = params_and_loss()
    key, sparsity = jax.random.key(0), jnp.float32(0.5)
    tx = pruning.prune_on_schedule(sparsity, optax.adam(0.1), method="random", key=key)
    step = jax.jit(lambda state: tx.update(params, state, params), donate_argnums=0)
    for _ in range(2):
        step(tx.init(params))
    assert not key.is_deleted()
    assert not sparsity.is_deleted()


def test_leaves_of_a_new_state_share_no_buffer():
    params, _ = params_and_loss()
    state = pruning.prune_on_schedule(0.5, optax.adam(0.1)).init(params)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@every_method
def test_a_step_keeps_the_types_of_params_and_state(method, dtype):
    params, loss = params_and_loss(dtype=dtype)
    inner = curvax.adahessian(0.1) if method == "hessian" else optax.adam(0.1)
    tx = pruning.prune_on_schedule(CUBIC, inner, update_interval=2, method=method)
    state = tx.init(params)
    new = jax.eval_shape(make_step(tx, loss), params, state)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, (params, state))


def test_low_precision_params_are_pruned_exactly():
    params, loss = params_and_loss(dtype=jnp.bfloat16)
    tx = pruning.prune_on_schedule(CUBIC, optax.adam(0.01), update_interval=1)
    params, history = trained(tx, params, loss, steps=20)
    assert num_pruned(history[-1]) == np.sum(flat(kernels(params)) == 0) == 72


def test_float64_params_are_pruned_in_float64():
    with jax.enable_x64(True):
        params = {"kernel": jnp.linspace(1.0, 2.0, 20, dtype=jnp.float64).reshape(4, 5)}
        tx = pruning.prune_on_schedule(0.5, optax.adam(0.1))
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert updates["kernel"].dtype == jnp.float64
        assert num_pruned(state) == 10


def test_a_scan_of_steps_equals_single_steps():
    params, loss = params_and_loss()
    tx = pruning.prune_on_schedule(CUBIC, optax.adam(0.01), update_interval=3)
    step = make_step(tx, loss)
    _, history = trained(tx, params, loss, steps=20)
    scanned, _ = jax.lax.scan(
        lambda carry, _: (step(*carry), None), (params, tx.init(params)), length=20
    )
    assert pruned_positions(scanned[1]) == pruned_positions(history[-1])


def test_gradients_flow_through_a_step():
    params, loss = params_and_loss()

    def after_a_step(rate):
        tx = pruning.prune_on_schedule(0.5, optax.sgd(rate))
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return loss(optax.apply_updates(params, updates))

    assert jnp.isfinite(jax.grad(after_a_step)(0.1))


# Meshes.


@pytest.mark.parametrize("structure", [None, pruning.NM(2, 4)], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_sharded_params_are_pruned_as_on_one_device(kind, structure):
    rng = np.random.default_rng(0)
    shapes = {"a": (32, 8), "b": (4, 16)}
    params = {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    params["a"]["bias"] = np.ones(8, np.float32)
    tx = pruning.prune_on_schedule(0.5, optax.adam(0.1), structure=structure)
    single = tx.update(params, tx.init(params), params)[1]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = {"a": {"kernel": P("x", None), "bias": P("x")}, "b": {"kernel": P(None, "x")}}
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs
        )
        state = tx.init(sharded)
        update = jax.jit(tx.update).lower(sharded, state, sharded).compile()
        _, state = update(sharded, state, sharded)
    for name in shapes:
        kept = mask_of(state)[name]["kernel"]
        assert kept.sharding.is_equivalent_to(sharded[name]["kernel"].sharding, 2)
        np.testing.assert_array_equal(kept, mask_of(single)[name]["kernel"])
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in update.as_text()


# Inside and around other transformations.


def test_in_a_chain_it_sees_the_gradients_of_what_comes_before():
    params, loss = params_and_loss()
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        pruning.prune_on_schedule(CUBIC, optax.adam(0.1), update_interval=4),
    )
    params, history = trained(tx, params, loss, steps=24)
    assert num_pruned(history[-1]) == np.sum(flat(kernels(params)) == 0) == 72


def test_under_a_mask_only_the_rest_is_pruned():
    params, loss = params_and_loss()
    inner = pruning.prune_on_schedule(0.5, optax.adam(0.1))
    tx = optax.masked(inner, {"first": False, "second": True})
    _, history = trained(tx, params, loss, steps=2)
    assert num_pruned(history[-1]) == 10


def test_parts_of_a_partition_are_pruned_by_themselves():
    params, loss = params_and_loss()
    parts = {
        "half": pruning.prune_on_schedule(0.5, optax.adam(0.1)),
        "most": pruning.prune_on_schedule(0.9, optax.sgd(0.1)),
    }
    tx = optax.partition(parts, {"first": "half", "second": "most"})
    params, _ = trained(tx, params, loss, steps=3)
    assert [int(np.sum(kernel == 0)) for kernel in kernels(params)] == [30, 18]


def test_moments_are_found_in_the_parts_of_a_partition_inside():
    params, loss = params_and_loss()
    inner = optax.partition(
        {"a": optax.adam(0.1), "b": optax.rmsprop(0.1)}, {"first": "a", "second": "b"}
    )
    tx = pruning.prune_on_schedule(0.5, inner, method="fisher", update_interval=1)
    _, history = trained(tx, params, loss, steps=2)
    assert [num_pruned(state) for state in history] == [0, 40]


def test_micro_steps_of_multi_steps_do_not_count():
    params, loss = params_and_loss()
    rising = optax.linear_schedule(0.1, 0.9, transition_steps=4)
    tx = optax.MultiSteps(
        pruning.prune_on_schedule(rising, optax.adam(0.01), update_interval=1), every_k_schedule=2
    )
    _, history = trained(tx, params, loss, steps=12)
    pruned = [num_pruned(state) for state in history]
    assert pruned == [0, 8, 8, 24, 24, 40, 40, 56, 56, 72, 72, 72]


def test_hyperparams_may_be_injected():
    params, loss = params_and_loss()
    tx = optax.inject_hyperparams(pruning.prune_on_schedule, static_args=("select",))(
        CUBIC, optax.adam(0.01), update_interval=4
    )
    _, history = trained(tx, params, loss, steps=20)
    plain = pruning.prune_on_schedule(CUBIC, optax.adam(0.01), update_interval=4)
    _, expected = trained(plain, params, loss, steps=20)
    assert [pruned_positions(one) for one in history] == [pruned_positions(one) for one in expected]


def test_map_params_finds_the_mask():
    params, _ = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.adam(0.1), method="fisher")
    state = tx.init(params)
    names = optax.tree.map_params(
        tx, lambda leaf: "like a parameter", state, transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(mask_of(names))) == {"like a parameter"}
    assert names.step == "other"


def test_shardings_of_the_state_are_known():
    mesh = jax.make_mesh((8,), ("x",))
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(8)}
    sharding = NamedSharding(mesh, P("x"))
    params = jax.device_put(params, sharding)
    tx = pruning.prune_on_schedule(0.5, optax.adam(0.1))
    wanted = curvax.state_shardings(tx, params)
    assert wanted.mask == {"kernel": sharding, "bias": NamedSharding(mesh, P())}
    assert jax.jit(tx.init, out_shardings=wanted)(params).mask["kernel"].sharding == sharding


@pytest.mark.parametrize("params", [{}, {"a": None}, (), {"a": jnp.ones(()), "b": 1.0}])
def test_trees_without_anything_to_prune_pass_through(params):
    tx = pruning.prune_on_schedule(0.5, optax.sgd(1.0), select=lambda path, leaf: True)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.leaves(updates) == [-leaf for leaf in jax.tree.leaves(params)]


def test_odd_leaves_are_left_alone():
    params = {
        "empty": jnp.ones((3, 0)),
        "scalar": jnp.ones(()),
        "kernel": jnp.ones((2, 2)),
        "no": None,
    }
    tx = pruning.prune_on_schedule(0.5, optax.sgd(1.0), select=lambda path, leaf: True)
    _, state = tx.update(params, tx.init(params), params)
    assert [leaf.shape for leaf in jax.tree.leaves(mask_of(state))] == [(), (2, 2), ()]


# The selection itself.


@every_seed
@pytest.mark.parametrize("levels", [2, 50, 2**31 - 1])
def test_exactly_the_smallest_keys_are_marked(levels, seed):
    rng = np.random.default_rng(seed)
    shapes, pools = [(7, 3), (40,), (2, 2, 5)], Pools((0, 1, 0), (41, 40))
    keys = [rng.integers(0, levels, shape).astype(np.int32) for shape in shapes]
    together = (np.concatenate([keys[0].ravel(), keys[2].ravel()]), keys[1])
    marked_by = jax.jit(lambda keys, numbers: smallest(keys, pools, numbers))
    for numbers in ((0, 40), (13, 1), (41, 20)):
        marked = [np.asarray(m) for m in marked_by(keys, jnp.array(numbers, jnp.int32))]
        found = (np.concatenate([marked[0].ravel(), marked[2].ravel()]), marked[1])
        for mark, key, number in zip(found, together, numbers, strict=True):
            assert set(np.flatnonzero(mark).tolist()) == lowest(key, number)


@every_seed
@pytest.mark.parametrize("pools", [Pools((0, 0, 0), (19,)), Pools((0, 1, 0), (12, 7))])
def test_models_trained_side_by_side_are_marked_as_each_alone(pools, seed):
    rng = np.random.default_rng(seed)
    keys = [rng.integers(0, 2**31 - 1, (4, size)).astype(np.int32) for size in (5, 7, 7)]
    numbers = rng.integers(0, 7, (4, len(pools.totals))).astype(np.int32)
    marked = jax.jit(jax.vmap(lambda keys, numbers: smallest(keys, pools, numbers)))(keys, numbers)
    for model in range(4):
        alone = smallest([key[model] for key in keys], pools, numbers[model])
        for together, own in zip(marked, alone, strict=True):
            np.testing.assert_array_equal(together[model], own)


@pytest.mark.parametrize("total", [1, 7, 24, 1000, 270_000, 9_000_000])
def test_a_share_is_the_floor_of_the_exact_product(total):
    for percent in range(101):
        assert share(percent / 100, total) == percent * total // 100
    for third in range(4):
        assert share(third / 3, total) == third * total // 3


def test_a_share_of_billions_is_near():
    total = 2**31 - 1
    for fraction in (0.0, 0.3, 0.9, 1.0):
        error = int(share(fraction, total)) - int(fraction * total)
        assert 0 <= error <= total * 2.0**-23


# Errors.


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_a_leaf_does_not_have_is_an_error(axis):
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), structure=pruning.NM(2, 4, axis))
    with pytest.raises(ValueError, match=rf"no selected leaf .* kernel: it has no axis {axis}"):
        tx.init({"kernel": jnp.ones((4, 8))})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must be a number in \[0, 1\], got 1.5"),
        (
            {"sparsity": optax.linear_schedule(0, 90, 10)},
            r"sparsity must be in \[0, 1\] at each count, got 90.0",
        ),
        ({"sparsity": {"kernel": -0.1}}, "sparsity of 'kernel' must be a number"),
        ({"sparsity": 1.0}, "sparsity must not reach 1.0: nothing would be left"),
        ({"sparsity": optax.linear_schedule(0, 1, 9)}, "must not reach 1.0: nothing would be"),
        ({"sparsity": "0.5"}, "sparsity must be a number"),
        ({"sparsity": 0.75, "structure": pruning.NM(2, 4)}, "allows a sparsity of at most 0.5"),
        ({"sparsity": {"kernel": CUBIC}, "structure": pruning.NM(1, 4)}, "at most 0.75"),
        ({"min_density": 1.0}, "min_density must be a number"),
        ({"min_density": 0.2, "sparsity": 0.9}, "min_density=0.2 keeps more; lower one"),
        ({"min_density": 0.6, "structure": pruning.NM(2, 4)}, "min_density=0.6 is more than NM"),
        ({"sparsity": {"(": 0.1}}, "sparsity keys must be valid patterns"),
        ({"update_interval": 0}, "update_interval must be an integer of at least 1, got 0"),
        ({"method": "obs"}, "method must be one of 'magnitude', .* got 'obs'"),
        ({"distribution": "layer"}, "distribution must be one of 'global', .* got 'layer'"),
        ({"structure": (2, 4)}, r"structure must be None or NM\(n, m\), got \(2, 4\)"),
        ({"structure": pruning.NM(4, 2)}, "needs n <= m"),
        ({"structure": pruning.NM(2, 4), "distribution": "erk"}, "drop the structure"),
        ({"layout": "torch"}, "layout must be one of"),
        ({"regrow": 2.0}, "regrow must be a number"),
        ({"regrow": 0.1, "structure": pruning.NM(2, 4)}, "regrow breaks the groups"),
    ],
)
def test_wrong_arguments_are_errors_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning.prune_on_schedule(**{"sparsity": 0.5, "inner": optax.sgd(0.1), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": lambda path, leaf: False}, "select chooses no leaf of params; their paths are"),
        (
            {"sparsity": {"first": 0.5, "third": 0.1}},
            "pattern 'third' sets the target of no leaf",
        ),
        (
            {"method": "fisher"},
            "method='fisher' needs second moments .* found none for first/kernel",
        ),
        (
            {"structure": pruning.NM(2, 7)},
            "no selected leaf fits NM.* 6 entries, not divisible by 7",
        ),
    ],
)
def test_params_that_do_not_fit_are_errors_at_init(arguments, message):
    tx = pruning.prune_on_schedule(**{"sparsity": 0.5, "inner": optax.sgd(0.1), **arguments})
    with pytest.raises(ValueError, match=message):
        tx.init(params_and_loss()[0])


def test_integers_cannot_be_pruned():
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1), select=lambda path, leaf: True)
    with pytest.raises(ValueError, match="only real weights can be pruned, got int32 at table"):
        tx.init({"table": jnp.ones((2, 2), jnp.int32)})


def test_params_are_needed():
    params, _ = params_and_loss()
    tx = pruning.prune_on_schedule(0.5, optax.sgd(0.1))
    with pytest.raises(ValueError, match="prune_on_schedule needs params"):
        tx.update(params, tx.init(params))
