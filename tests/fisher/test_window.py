"""The dense window: its two products against NumPy, for every kind of leaf and dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher import DenseWindow
from curvax.fisher.window._dense import pairwise_sum

pytestmark = pytest.mark.oldest

NUM_GRADS = 6
SHAPES = {"kernel": (40, 30), "image": (3, 3, 2, 5), "flat": (2000,), "bias": (7,), "scale": ()}


def params(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def gradient(seed, dtype=jnp.float32):
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.standard_normal(shape), dtype) for name, shape in SHAPES.items()
    }


def filled(window, number=NUM_GRADS):
    """The window with gradients of seeds 0, 1, ..., and their rows in float64."""

    @jax.jit
    def enter(window, grads, slot):
        row, kept = window.compress(grads)
        return window.push(row, slot), kept

    rows = []
    for slot in range(number):
        window, kept = enter(window, gradient(slot), slot)
        rows.append(flat(kept))
    return window, np.stack(rows)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 3e-7), ("bfloat16", 3e-7), ("float64", 1e-15)]
)
def test_dots_are_the_products_with_every_row(dtype, rtol):
    with jax.enable_x64(dtype == "float64"):
        window, rows = filled(DenseWindow.empty(params(), NUM_GRADS, jnp.dtype(dtype)))
        vector = gradient(99)
        products = window.dots(vector, jnp.promote_types(dtype, jnp.float32))
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(flat(vector))
        assert np.max(np.abs(products - rows @ flat(vector)) / lengths) < rtol


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 3e-7), ("bfloat16", 3e-7), ("float64", 1e-15)]
)
def test_combine_is_the_weighted_sum_of_rows(dtype, rtol):
    with jax.enable_x64(dtype == "float64"):
        window, rows = filled(DenseWindow.empty(params(), NUM_GRADS, jnp.dtype(dtype)))
        weights = np.random.default_rng(1).standard_normal(NUM_GRADS)
        combined = window.combine(
            jnp.asarray(weights, jnp.promote_types(dtype, jnp.float32)), params()
        )
        expected = weights @ rows
        assert np.linalg.norm(flat(combined) - expected) < rtol * np.linalg.norm(expected)
        chex.assert_trees_all_equal_shapes(combined, params())


def test_a_row_of_bfloat16_is_the_gradient_rounded_once():
    window = DenseWindow.empty(params(), NUM_GRADS, jnp.dtype("bfloat16"))
    row, kept = jax.jit(window.compress)(gradient(0))
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gradient(0))
    chex.assert_trees_all_equal(row, expected)
    chex.assert_trees_all_equal(kept, expected)


def test_pushing_replaces_one_row_and_leaves_the_others():
    window, rows = filled(DenseWindow.empty(params(), NUM_GRADS, None))
    window = window.push(gradient(7), jnp.int32(2))
    products = window.dots(gradient(99), jnp.float32)
    rows[2] = flat(gradient(7))
    np.testing.assert_allclose(products, rows @ flat(gradient(99)), rtol=1e-4, atol=1e-4)


def test_each_leaf_keeps_its_own_width():
    tree = {"low": jnp.zeros(3, jnp.bfloat16), "own": jnp.zeros(3)}
    with jax.enable_x64(True):
        tree["wide"] = jnp.zeros(3, jnp.float64)
        rows = DenseWindow.empty(tree, 2, None).rows
        assert [rows[name].dtype for name in ("low", "own", "wide")] == [
            jnp.float32,
            jnp.float32,
            jnp.float64,
        ]


def test_leaves_that_take_no_part_have_no_rows():
    tree = {"count": jnp.zeros(3, jnp.int32), "empty": jnp.zeros((0, 4)), "w": jnp.zeros(2)}
    window = DenseWindow.empty(tree, 5, None)
    assert [len(window.rows[name]) for name in ("count", "empty", "w")] == [0, 0, 5]
    combined = window.combine(jnp.ones(5), tree)
    chex.assert_trees_all_equal_shapes(combined, tree)


def test_a_gram_entry_is_as_good_as_a_sum_in_float64_rounded_once():
    # Entries of one sign, so that a running sum in float32 would lose digits.
    generator = np.random.default_rng(0)
    leaf = jnp.asarray(1 + 0.1 * generator.standard_normal((3, 3, 64, 64)), jnp.float32)
    tree = [leaf] * 60
    window = DenseWindow.empty(tree, 1, None).push(tree, jnp.int32(0))
    exact = 60 * float(np.sum(np.asarray(leaf, np.float64) ** 2))
    assert abs(float(window.dots(tree, jnp.float32)[0]) - exact) < 4e-7 * exact


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100])
def test_pairwise_sum_adds_every_column_once(size):
    columns = jnp.asarray(2.0 ** np.arange(min(size, 20)).repeat(5)[:size])
    np.testing.assert_allclose(
        pairwise_sum(jnp.stack([columns, -columns])), [columns.sum(), -columns.sum()], rtol=1e-6
    )
