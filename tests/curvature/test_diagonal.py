"""The one-pass diagonal: unbiased, with the variance that theory gives it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.reference import (
    batch_like,
    coupled_loss,
    coupled_params,
    dense_hessian,
    quadratic,
    ravel,
)

pytestmark = pytest.mark.oldest


def many_estimates(loss, params, count, seed=0, **options):
    one_pass = curvax.value_grad_and_hessian_diag(loss, **options)
    keys = jax.random.split(jax.random.key(seed), count)
    diag = jax.jit(jax.vmap(lambda key: one_pass(params, key=key)[2]))(keys)
    return np.concatenate([diag["a"], diag["b"]], axis=1).astype(np.float64)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("seed", range(2))
def test_the_mean_is_the_diagonal_on_two_equal_coupled_leaves(seed, distribution, mode):
    matrix, loss = quadratic(seed, 3)
    params = {"a": jnp.ones(3), "b": -jnp.ones(3)}
    samples = many_estimates(loss, params, 4000, distribution=distribution, mode=mode)
    error = samples.std(axis=0) / np.sqrt(4000)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - np.diag(matrix)), 5 * error + 1e-5)


def test_a_constant_probe_would_be_detected():
    # With z = 1 everywhere the estimate is the row sums, far from the diagonal.
    matrix, _ = quadratic(0, 3)
    assert np.max(np.abs(matrix.sum(axis=1) - np.diag(matrix))) > 1


@pytest.mark.parametrize("num_probes", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_the_mean_square_is_the_diagonal_and_a_share_of_the_row(seed, num_probes):
    # E[D²] = H_ii² + Σ_{j≠i} H_ij² / S for Rademacher probes
    matrix, loss = quadratic(seed, 3)
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    squares = many_estimates(loss, params, 6000, num_probes=num_probes) ** 2
    diagonal = np.diag(matrix) ** 2
    rows = np.sum(np.square(matrix), axis=1) - diagonal
    error = squares.std(axis=0) / np.sqrt(6000)
    expected = diagonal + rows / num_probes
    np.testing.assert_array_less(np.abs(squares.mean(axis=0) - expected), 5 * error)


def test_normal_probes_add_twice_the_squared_diagonal():
    matrix, loss = quadratic(0, 3)
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    squares = many_estimates(loss, params, 20000, distribution="normal") ** 2
    expected = np.sum(np.square(matrix), axis=1) + 2 * np.diag(matrix) ** 2
    error = squares.std(axis=0) / np.sqrt(20000)
    np.testing.assert_array_less(np.abs(squares.mean(axis=0) - expected), 5 * error)


def test_it_is_the_probe_times_the_dense_hessian():
    with jax.enable_x64(True):
        params = coupled_params(dtype=jnp.float64)
        batch, key = batch_like(params), jax.random.key(5)
        one_pass = curvax.value_grad_and_hessian_diag(coupled_loss, num_probes=2)
        _, _, diag = one_pass(params, batch, key=key)
        hessian = dense_hessian(coupled_loss, params, batch)
        probes = [ravel(curvax.random_probe(jax.random.fold_in(key, i), params)) for i in (0, 1)]
        expected = np.mean([z * (hessian @ z) for z in probes], axis=0)
        np.testing.assert_allclose(ravel(diag), expected, rtol=1e-10, atol=1e-12)


def test_a_complex_leaf_holds_both_real_diagonals():
    # f = a x² + b y²: the diagonals are 2a and 2b.
    def loss(z):
        return jnp.sum(3 * jnp.real(z) ** 2 + 5 * jnp.imag(z) ** 2)

    z = jnp.array([1.0 + 2.0j, -3.0j])
    _, _, diag = curvax.value_grad_and_hessian_diag(loss)(z, key=jax.random.key(0))
    np.testing.assert_allclose(diag, [6 + 10j, 6 + 10j], rtol=1e-6)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_dtypes_and_structure_are_those_of_params(num_probes):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": (jnp.ones(()), jnp.arange(2), None)}

    def loss(p):
        return jnp.sum(p["a"].astype(jnp.float32) ** 2) * p["b"][0] ** 2

    one_pass = curvax.value_grad_and_hessian_diag(loss, num_probes=num_probes)
    _, grads, diag = one_pass(params, key=jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, diag, params)


@pytest.mark.parametrize("value", [0, -1, 1.5, "two"])
def test_a_number_of_probes_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="num_probes must be an integer of at least 1"):
        curvax.value_grad_and_hessian_diag(coupled_loss, num_probes=value)
