"""What M-FAC says to bad options, and what it does with bad gradients and odd leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_grads": 0}, "num_grads must be an integer of at least 1, got 0"),
        ({"num_grads": 2.5}, "num_grads must be an integer"),
        ({"num_grads": jnp.int32(4)}, r"static_args=\('num_grads', ...\)"),
        ({"damping": 0.0}, r"damping must be a number in \(0, inf\], got 0"),
        ({"damping": -1e-5}, "damping must be a number in"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ({"density": 0.0}, r"density must be a number in \(0, 1\]"),
        ({"density": 1.5}, r"density must be a number in \(0, 1\]"),
        ({"density": jnp.float32(0.5)}, "name it in static_args"),
        ({"density": 0.1, "top_k_recall": 0.0}, r"top_k_recall must be a number in \(0, 1\]"),
        ({"density": 0.1, "top_k_recall": jnp.float32(0.5)}, "name it in static_args"),
        ({"top_k_recall": 0.9}, "needs sparse rows: set density"),
        (
            {"window_scaling": "half"},
            "window_scaling must be one of 'nominal', 'filled', 'relative'",
        ),
        ({"window_dtype": "float16"}, "window_dtype must be one of 'float32', 'bfloat16'"),
        ({"max_update_norm": 0.0}, "max_update_norm must be a number in"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        curvax.scale_by_mfac(**options)


def test_complex_parameters_are_refused():
    params = {"w": jnp.ones(2), "phase": jnp.ones(2, jnp.complex64)}
    with pytest.raises(ValueError, match="M-FAC needs real parameters, got complex64 at phase"):
        curvax.mfac(num_grads=2).init(params)


@pytest.mark.parametrize("density", [None, 0.5])
def test_gradients_that_do_not_match_the_window_are_named_by_path(density):
    tx = curvax.scale_by_mfac(num_grads=2, density=density)
    state = tx.init({"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"the gradients has b of shape \(4,\), params has b"):
        tx.update({"a": jnp.ones(3), "b": jnp.ones(4)}, state)
    with pytest.raises(ValueError, match="no more leaves"):
        tx.update({"a": jnp.ones(3)}, state)


def gradient(seed):
    generator = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(generator.standard_normal((4, 3)), jnp.float32),
        "bias": jnp.asarray(generator.standard_normal(3), jnp.float32),
    }


def history(tx, grads):
    update, state, updates = jax.jit(tx.update), tx.init(grads[0]), []
    for gradient in grads:
        new, state = update(gradient, state)
        updates.append(new)
    return updates, state


OPTIONS = {
    "dense": {},
    "momentum": {"momentum": 0.5},
    "sparse": {"density": 0.3, "momentum": 0.5},
    "schedule": {"damping": lambda count: 0.1 / (1 + count)},
    "filled": {"window_scaling": "filled"},
    "relative": {"window_scaling": "relative"},
}


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_that_is_not_finite_is_as_if_it_never_came(name, damage):
    # 1e30 is finite, its square is not.
    tx = curvax.scale_by_mfac(**{"num_grads": 3, "damping": 0.1} | OPTIONS[name])
    good = [gradient(seed) for seed in range(5)]
    bad = {"kernel": gradient(9)["kernel"].at[1, 2].set(damage), "bias": gradient(9)["bias"]}
    expected, expected_state = history(tx, good)
    updates, state = history(tx, [bad, *good[:2], bad, bad, *good[2:]])
    chex.assert_trees_all_equal([*updates[1:3], *updates[5:]], expected)
    chex.assert_trees_all_equal(state, expected_state)
    for index in (0, 3, 4):
        for leaf in jax.tree.leaves(updates[index]):
            assert bool(jnp.all(jnp.isnan(leaf)))  # apply_if_finite and monitors see the step


def test_a_gradient_of_zeros_gives_zeros_and_takes_its_slot():
    tx = curvax.scale_by_mfac(num_grads=3, damping=0.1)
    zeros = jax.tree.map(jnp.zeros_like, gradient(0))
    updates, state = history(tx, [gradient(0), zeros])
    chex.assert_trees_all_equal(updates[1], zeros)
    assert state.count == 2


def test_equal_gradients_fill_a_window_of_rank_one():
    tx = curvax.scale_by_mfac(num_grads=16, damping=1e-5)
    row = gradient(0)
    updates, state = history(tx, [row] * 40)
    square = float(optax.tree.norm(row, squared=True))
    expected = jax.tree.map(lambda g: g / (1e-5 + square), row)
    length = optax.tree.norm(expected)
    # Float32 leaves one digit of a singular matrix: each length scatters, their mean does not.
    lengths = np.array([optax.tree.norm(update) / length for update in updates[-16:]])
    np.testing.assert_allclose(lengths, 1, rtol=0.35)
    np.testing.assert_allclose(lengths.mean(), 1, rtol=0.1)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *updates[-16:])
    assert optax.tree.norm(optax.tree.sub(mean, expected)) < 0.1 * length
    assert bool(jnp.all(jnp.isfinite(state.gram)))


def test_integer_leaves_take_no_part_and_get_zeros():
    params = {"w": jnp.ones(3), "steps": jnp.arange(2)}
    grads = {"w": jnp.ones(3), "steps": jnp.zeros(2, jnp.int32)}
    for options in ({}, {"density": 0.5}, {"window_dtype": "bfloat16"}):
        tx = curvax.scale_by_mfac(num_grads=2, momentum=0.5, **options)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["steps"].dtype == params["steps"].dtype
        assert not updates["steps"].any()
        assert updates["w"].any()


def test_leaves_of_mixed_dtypes_are_one_vector():
    params = {"low": jnp.zeros(3, jnp.bfloat16), "own": jnp.zeros(2)}
    grads = {"low": jnp.array([1, 2, 3], jnp.bfloat16), "own": jnp.array([4.0, 5.0])}
    tx = curvax.scale_by_mfac(num_grads=2, damping=0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    assert state.gram.dtype == jnp.float32
    assert updates["low"].dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["own"], np.array([4.0, 5.0]) / (0.5 + 55 / 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("params_dtype", "window_dtype", "entry"),
    [("float64", "float32", 1e39), ("float64", "bfloat16", 1e20), ("float32", "float64", 1e20)],
)
@pytest.mark.parametrize("density", [None, 1.0])
def test_a_gradient_outside_the_range_of_rows_or_gram_is_refused(
    params_dtype, window_dtype, entry, density
):
    with jax.enable_x64(True):
        params = jnp.ones(3, params_dtype)
        tx = curvax.scale_by_mfac(
            num_grads=3, damping=0.1, window_dtype=window_dtype, density=density
        )
        state = tx.init(params)
        updates, refused = tx.update(params * entry, state)
        assert bool(jnp.all(jnp.isnan(updates)))
        chex.assert_trees_all_equal(refused, state)
        updates, taken = tx.update(params, refused)
        assert taken.count == 1
        assert bool(jnp.all(jnp.isfinite(updates)))
