"""Float32 prunes as float64 does where gradients are fewer than the weights of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import pruning

from . import problems

DAMPING = 1e-5


def problem(seed, num_grads, num_inputs, num_outputs, scale=1.0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(num_inputs, num_outputs))
    spread = np.exp(rng.normal(size=(1, num_inputs, num_outputs)))
    rows = scale * rng.normal(size=(num_grads, num_inputs, num_outputs)) * spread
    return weights, rows


def fisher_blocks(rows, size):
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    for start in range(0, flat.shape[1], size):
        part = flat[:, start : start + size]
        yield (
            slice(start, start + size),
            DAMPING * np.eye(part.shape[1]) + part.T @ part / len(rows),
        )


def cost(weights, pruned, rows, size):
    change = (np.asarray(pruned, np.float64) - weights).ravel()
    return sum(change[p] @ matrix @ change[p] / 2 for p, matrix in fisher_blocks(rows, size))


def least_cost(weights, mask, rows, size):
    """Of all weights that are zero outside of the mask."""
    best = np.zeros(weights.size)
    for part, matrix in fisher_blocks(rows, size):
        kept = np.asarray(mask).ravel()[part]
        moved = np.linalg.solve(
            matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, ~kept)] @ weights.ravel()[part][~kept]
        )
        best[part][kept] = weights.ravel()[part][kept] + moved
    return cost(weights, best.reshape(weights.shape), rows, size)


def pruned(weights, rows, sparsity, **options):
    params, grads = {"weight": jnp.asarray(weights)}, {"weight": jnp.asarray(rows)}
    result = problems.prune(params, grads, sparsity, damping=DAMPING, **options)
    return result.params["weight"], result.mask["weight"]


@pytest.mark.parametrize("method", ["obs", "fisher", "magnitude"])
@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_weights_whose_squares_float32_cannot_hold_are_ordered(scale, method):
    weights = np.float32(scale) * jnp.array([[3.0, 1.0], [2.0, 4.0]])
    rows = 1e-3 * jnp.ones((4, 2, 2))
    result = pruning.prune({"kernel": weights}, {"kernel": rows}, 0.5, method=method)
    np.testing.assert_array_equal(result.mask["kernel"], [[True, False], [False, True]])


@pytest.mark.parametrize("block_size", [32, None])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_joint_update_is_the_best_for_its_mask(seed, sparsity, block_size):
    weights, rows = problem(seed, num_grads=16, num_inputs=32, num_outputs=3)
    weights, rows = weights.astype(np.float32), rows.astype(np.float32)
    params, mask = pruned(weights, rows, sparsity, block_size=block_size)
    size = block_size or weights.size
    best = least_cost(weights, mask, rows, size)
    assert cost(weights, params, rows, size) <= 1.01 * best + 1e-3


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_chooses_as_well_as_in_float64(seed, sparsity):
    weights, rows = problem(seed, num_grads=16, num_inputs=32, num_outputs=3)
    weights, rows = weights.astype(np.float32), rows.astype(np.float32)
    options = {"method": "greedy", "block_size": 32}
    params, _ = pruned(weights, rows, sparsity, **options)
    with jax.enable_x64():
        wide, _ = pruned(weights.astype(np.float64), rows.astype(np.float64), sparsity, **options)
    assert cost(weights, params, rows, 32) <= 1.1 * cost(weights, wide, rows, 32) + 1e-3


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("block_scope", ["tree", "leaf"])
def test_the_full_inverse_of_no_more_weights_than_gradients_is_exact(scale, block_scope):
    _, rows = problem(0, num_grads=64, num_inputs=8, num_outputs=1, scale=scale)
    flat = rows[..., 0]
    exact = np.linalg.inv(DAMPING * np.eye(8) + flat.T @ flat / 64)
    inverse = curvax.inverse_fisher(
        jnp.asarray(flat, jnp.float32), DAMPING, block_scope=block_scope
    )
    vector = np.arange(1.0, 9)
    np.testing.assert_allclose(inverse.solve(jnp.asarray(vector)), exact @ vector, rtol=1e-3)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(exact), rtol=1e-3)
    np.testing.assert_allclose(inverse.element(0, 0), exact[0, 0], rtol=1e-3)


def test_a_diagonal_entry_is_positive_whatever_the_rounding():
    inverse = curvax.inverse_fisher(jnp.array([[300.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 1e-5)
    np.testing.assert_allclose(inverse.element(0, 0), inverse.diagonal()[0])
    assert inverse.element(0, 0) > 0


@pytest.mark.parametrize("method", ["obs", "greedy"])
@pytest.mark.parametrize("place", ["committed", "sharded", "host"])
def test_blocks_over_a_mesh_are_pruned_as_on_one_device(place, method):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    weights, rows = problem(0, num_grads=16, num_inputs=32, num_outputs=6)
    weights, rows = weights.astype(np.float32), rows.astype(np.float32)
    placed = {
        "committed": lambda: jax.device_put(rows, jax.devices()[3]),
        "sharded": lambda: jax.device_put(rows, jax.NamedSharding(mesh, jax.P(None, "x"))),
        "host": lambda: rows,
    }[place]()
    options = {"method": method, "block_size": 32, "damping": DAMPING}
    spread = problems.prune({"weight": weights}, {"weight": placed}, 0.9, mesh=mesh, **options)
    alone = problems.prune({"weight": weights}, {"weight": rows}, 0.9, **options)
    np.testing.assert_array_equal(spread.mask["weight"], alone.mask["weight"])
    np.testing.assert_allclose(spread.params["weight"], alone.params["weight"], rtol=1e-3)
