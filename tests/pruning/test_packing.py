"""Alive weights side by side: nothing is lost, and there are few shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from curvax.pruning._packing import Packing, rounded_up


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("packed", [True, False])
def test_unpacking_gives_the_leaves_back(packed, make):
    leaves = [make(np.arange(6.0).reshape(2, 3)), make(np.ones((2, 0))), make(np.ones((2, 4)))]
    packing = Packing.of([3, 0, 4], packed=packed)
    joined = packing.pack(leaves)
    assert [leaf.shape for leaf in joined] == ([(2, 8)] if packed else [(2, 3), (2, 0), (2, 4)])
    assert all(isinstance(leaf, type(leaves[0])) for leaf in joined)
    for one, other in zip(packing.unpack(joined), leaves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_widths_are_few_and_waste_little_where_it_counts():
    numbers = np.unique(np.geomspace(1, 3e6, 2000).astype(int))
    widths = np.array([rounded_up(int(number)) for number in numbers])
    assert np.all(widths >= numbers)
    assert np.all(widths[numbers > 2**17] <= 1.15 * numbers[numbers > 2**17])
    assert len(np.unique(widths)) < 80


def test_float16_and_bfloat16_are_packed_as_float32():
    leaves = [jnp.ones((2, 3), jnp.float16), jnp.ones((2, 5), jnp.bfloat16)]
    (packed,) = Packing.of([3, 5], packed=True).pack(leaves)
    assert packed.dtype == jnp.float32
