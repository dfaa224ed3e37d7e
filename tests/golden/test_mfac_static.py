"""The published static M-FAC: diagonals, products, masks and pruned weights, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import pruning

pytestmark = pytest.mark.oldest

KINDS = ("full", "block")


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "mfac_static.npz") as data:
        return dict(data)


def block_size(golden, kind):
    return int(golden["block_size"]) if kind == "block" else None


def assert_close(actual, expected):
    """To 1e-9 of the largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("on", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_and_product_equal_the_published(golden, kind, on):
    with jax.enable_x64(True):
        inverse = curvax.inverse_fisher(
            on(golden["grads"]), float(golden["damping"]), block_size=block_size(golden, kind)
        )
        assert_close(inverse.diagonal(), golden[f"{kind}_diag"])
        assert_close(inverse.solve(golden["x"]), golden[f"{kind}_solve"])


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_published_and_weights_equal(golden, kind, sparsity):
    with jax.enable_x64(True):
        result = pruning.prune(
            {"weight": jnp.asarray(golden["weights"]).reshape(20, 15)},
            {"weight": jnp.asarray(golden["grads"]).reshape(-1, 20, 15)},
            sparsity,
            update="independent",
            damping=float(golden["damping"]),
            relative_damping=False,
            block_size=block_size(golden, kind),
        )
    mask, weights = (np.ravel(tree["weight"]) for tree in (result.mask, result.params))
    np.testing.assert_array_equal(mask, golden[f"prune/{kind}/{sparsity}/mask"])
    assert_close(weights, golden[f"prune/{kind}/{sparsity}/weights"])
    assert np.all(weights[~mask] == 0)
