"""The blocked Cholesky solve: any size, and NaN for a matrix that is not positive definite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher._cholesky import cholesky_solver

pytestmark = pytest.mark.oldest


@jax.jit
def solve(matrix, rhs):
    return cholesky_solver(matrix)(rhs)


def positive_definite(size, seed=0):
    factor = np.random.default_rng(seed).standard_normal((size, size + 3))
    return factor @ factor.T / size + 0.01 * np.eye(size)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100, 128, 129, 300])
def test_it_equals_a_dense_solve_in_float64(size):
    matrix = positive_definite(size)
    rhs = np.random.default_rng(1).standard_normal(size)
    with jax.enable_x64(True):
        solution = solve(jnp.asarray(matrix), jnp.asarray(rhs))
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, rhs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [5, 128, 200, 384])
def test_in_float32_its_backward_error_is_a_few_roundings(size, seed):
    matrix = positive_definite(size, seed).astype(np.float32)
    rhs = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    solution = np.asarray(solve(jnp.asarray(matrix), jnp.asarray(rhs)), np.float64)
    residual = np.linalg.norm(rhs - matrix.astype(np.float64) @ solution)
    scale = np.linalg.norm(matrix, 2) * np.linalg.norm(solution) + np.linalg.norm(rhs)
    assert residual < 10 * np.finfo(np.float32).eps * scale


@pytest.mark.parametrize("index", [0, 150])
def test_a_negative_pivot_in_any_block_makes_nan(index):
    matrix = jnp.eye(200).at[index, index].set(-1.0)
    assert bool(jnp.isnan(solve(matrix, jnp.ones(200))).any())
