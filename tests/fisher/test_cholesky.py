"""The blocked Cholesky solve: any size, and NaN for a matrix that is not positive definite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher._cholesky import blocked_cholesky, inverse_factor

pytestmark = pytest.mark.oldest


@jax.jit
def solve(matrix, rhs):
    return blocked_cholesky(matrix).solve(rhs)


compiled_factor = jax.jit(inverse_factor)


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


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("size", [1, 3, 128, 200, 384])
def test_an_inverse_factor_gives_inverse_and_determinant(size, dtype):
    factors = np.random.default_rng(0).standard_normal((2, 2, size, size + 3))
    rows = (factors[0] + 1j * factors[1] if dtype == np.complex128 else factors[0]).astype(dtype)
    matrices = rows @ rows.conj().swapaxes(-1, -2) / size
    with jax.enable_x64(True):
        found = compiled_factor(jnp.asarray(matrices))
        inverse = np.asarray(
            found.solve(jnp.broadcast_to(jnp.eye(size, dtype=dtype), matrices.shape))
        )
        logdet = found.logdet()
    np.testing.assert_allclose(np.triu(found.matrix, 1), 0)
    np.testing.assert_allclose(matrices @ inverse, matrices * 0 + np.eye(size), atol=1e-8)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrices)[1], rtol=1e-9, atol=1e-9)
    assert not found.failed.any()


def test_of_several_matrices_only_the_singular_ones_are_damped():
    good = positive_definite(8).astype(np.float32)
    bad = np.ones((8, 8), np.float32)
    found = compiled_factor(jnp.asarray([good, bad, good]))
    assert found.failed.tolist() == [False, True, False]
    alone = compiled_factor(jnp.asarray(good))
    for index in (0, 2):
        np.testing.assert_allclose(found.matrix[index], alone.matrix, rtol=1e-5, atol=1e-6)
    solved = np.float64(found.matrix[1]) @ np.ones(8)
    # A damping of a few roundings leaves the solution on the matrix's range.
    np.testing.assert_allclose(solved @ solved, 1.0, rtol=1e-2)


@pytest.mark.parametrize("size", [3, 130])
def test_an_inverse_factor_is_differentiable(size):
    matrix = positive_definite(size)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda a: inverse_factor(a).logdet()))(jnp.asarray(matrix))
    # Cholesky reads the lower triangle alone.
    inverse = np.linalg.inv(matrix)
    np.testing.assert_allclose(gradient + gradient.T, 2 * inverse, rtol=1e-7, atol=1e-7)
