"""The norm of a tree: as wide a range as its numbers have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax._trees import tree_norm

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e-19, 1e-10, 1.0, 1e10, 1e19, 1e37])
def test_it_scales_with_its_tree_although_squares_leave_the_range(scale):
    tree = {"a": jnp.array([3.0, 0.0]) * scale, "b": jnp.array([[4.0]]) * scale}
    np.testing.assert_allclose(tree_norm(tree) / scale, 5.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_in_float64_too(scale):
    with jax.enable_x64(True):
        np.testing.assert_allclose(tree_norm(jnp.array([3.0, 4.0]) * scale) / scale, 5.0)


@pytest.mark.parametrize(("entry", "norm"), [(0.0, 0.0), (np.inf, np.inf), (np.nan, np.nan)])
def test_zero_and_non_finite_entries(entry, norm):
    np.testing.assert_equal(float(tree_norm([jnp.full(3, entry)])), norm)


def test_of_no_entries_it_is_zero():
    assert tree_norm({}) == 0
    assert tree_norm(jnp.zeros((0, 3))) == 0
