"""The sparse window: the largest entries of each block, and nothing lost."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher import DenseWindow, SparseWindow
from curvax.fisher.window._blocks import Blocks
from curvax.fisher.window._sparse import kept_per_block

from .test_window import NUM_GRADS, filled, flat, gradient, params


def test_a_row_keeps_the_largest_entries_of_each_block():
    window = SparseWindow.empty(params(), NUM_GRADS, None, density=0.1)
    grads = gradient(0)
    row, kept = window.compress(grads)
    for name, grad in grads.items():
        layout = Blocks.of(grad.shape)
        number = kept_per_block(layout, 0.1)
        assert row.values[name].size == number * math.prod(layout.grid)
        blocks = np.abs(layout.split(grad)).reshape(-1, layout.size)
        thresholds = np.sort(blocks, axis=1)[:, -number]
        chosen = np.abs(layout.split(kept[name])).reshape(-1, layout.size) > 0
        np.testing.assert_array_equal(chosen, blocks >= thresholds[:, np.newaxis])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_and_what_is_left_add_up_exactly(dtype):
    window = SparseWindow.empty(params(), NUM_GRADS, jnp.dtype(dtype), density=0.1)
    grads = gradient(0)
    row, kept = jax.jit(window.compress)(grads)
    rest = jax.tree.map(jnp.subtract, grads, kept)
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, kept, rest), grads)
    assert all(values.dtype == jnp.dtype(dtype) for values in jax.tree.leaves(row.values))
    assert all(where.dtype == jnp.int16 for where in jax.tree.leaves(row.positions))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_rows_that_were_kept(dtype):
    window, rows = filled(SparseWindow.empty(params(), NUM_GRADS, jnp.dtype(dtype), density=0.1))
    vector = gradient(99)
    products = window.dots(vector, jnp.float32)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(flat(vector))
    assert np.max(np.abs(products - rows @ flat(vector)) / lengths) < 3e-7
    weights = np.random.default_rng(1).standard_normal(NUM_GRADS)
    combined = window.combine(jnp.asarray(weights, jnp.float32), params())
    expected = weights @ rows
    assert np.linalg.norm(flat(combined) - expected) < 3e-7 * np.linalg.norm(expected)


def test_a_row_that_is_not_accepted_leaves_the_window_as_it_was():
    window, _ = filled(SparseWindow.empty(params(), NUM_GRADS, None, density=0.1))
    row, _ = window.compress(gradient(7))
    chex.assert_trees_all_equal(window.push(row, jnp.int32(2), jnp.bool_(False)), window)


@pytest.mark.parametrize("number", [1, 128, 200, 300])
def test_rows_are_read_in_chunks_whatever_their_number(number):
    leaf = jnp.asarray(np.random.default_rng(0).standard_normal(number * 24).reshape(-1, 24))
    window = SparseWindow.empty(leaf[0], number, None, density=0.5)
    push = jax.jit(lambda window, grad, slot: window.push(window.compress(grad)[0], slot))
    kept = []
    for slot in range(number):
        window = push(window, leaf[slot], slot)
        kept.append(window.compress(leaf[slot])[1])
    rows = np.stack(kept)
    products = window.dots(leaf[0], jnp.float32)
    np.testing.assert_allclose(products, rows @ leaf[0], rtol=1e-5, atol=1e-5)
    weights = jnp.arange(1.0, number + 1)
    combined = window.combine(weights, leaf[0])
    np.testing.assert_allclose(combined, weights @ rows, rtol=1e-4, atol=1e-3)


def test_at_density_one_it_is_the_dense_window():
    sparse, rows = filled(SparseWindow.empty(params(), NUM_GRADS, None, density=1.0))
    dense, dense_rows = filled(DenseWindow.empty(params(), NUM_GRADS, None))
    np.testing.assert_array_equal(rows, dense_rows)
    vector = gradient(99)
    np.testing.assert_allclose(
        sparse.dots(vector, jnp.float32), dense.dots(vector, jnp.float32), rtol=1e-4, atol=1e-4
    )


# The leaves of ResNets, of BERT, and odd ones.
LARGE = [
    (3, 3, 32, 64),
    (3, 3, 64, 64),
    (7, 7, 3, 64),
    (1, 1, 512, 2048),
    (30522, 768),
    (50257, 768),
    (512, 768),
    (768, 3072),
    (4097,),
    (5003,),
    (65, 65),
    (64, 65),
    (129, 33),
]


@pytest.mark.parametrize(("width", "bound"), [(4, 61.5), (2, 41.0)])
@pytest.mark.parametrize("shape", LARGE)
def test_one_percent_of_a_large_leaf_takes_one_percent_of_the_bytes(shape, width, bound):
    layout = Blocks.of(shape)
    entries = math.prod(layout.grid) * kept_per_block(layout, 0.01)
    assert 1024 * (width + 2) * entries / math.prod(shape) <= bound


@pytest.mark.parametrize("shape", LARGE)
def test_no_more_than_a_third_of_the_density_is_lost_to_rounding(shape):
    layout = Blocks.of(shape)
    entries = math.prod(layout.grid) * kept_per_block(layout, 0.01)
    assert entries > 0.66 * 0.01 * math.prod(shape)


def test_a_tiny_leaf_keeps_at_least_an_entry_a_block():
    assert kept_per_block(Blocks.of((3,)), 1e-9) == 1
