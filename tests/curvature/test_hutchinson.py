"""Estimates with standard errors, and the exact modes, against dense Hessians."""

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


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_exact_diagonal_and_trace_are_those_of_the_dense_hessian(batch_size, mode):
    with jax.enable_x64(True):
        params = coupled_params(dtype=jnp.float64)
        batch = batch_like(params)
        options = {"method": "exact", "probe_batch_size": batch_size, "mode": mode}
        diag = curvax.hessian_diag(coupled_loss, params, batch, **options)
        trace = curvax.hessian_trace(coupled_loss, params, batch, **options)
        expected = np.diag(dense_hessian(coupled_loss, params, batch))
        np.testing.assert_allclose(ravel(diag.value), expected, atol=1e-12)
        np.testing.assert_allclose(trace.value, expected.sum(), rtol=1e-12)
        per_leaf = jax.tree.map(jnp.sum, diag.value)
        chex.assert_trees_all_close(trace.per_leaf, per_leaf, rtol=1e-12)
        assert not np.any(ravel(diag.standard_error))
        assert float(trace.standard_error) == 0


def test_exact_diagonal_of_complex_leaves_holds_both_real_diagonals():
    def loss(p):
        z = p["z"]
        return jnp.sum(3 * jnp.real(z) ** 2 + 5 * jnp.imag(z) ** 2 + jnp.real(z) * jnp.imag(z))

    params = {"z": jnp.array([1.0 + 2.0j, 0.5j])}
    estimate = curvax.hessian_diag(loss, params, method="exact")
    np.testing.assert_allclose(estimate.value["z"], [6 + 10j, 6 + 10j], rtol=1e-6)
    np.testing.assert_allclose(curvax.hessian_trace(loss, params, method="exact").value, 32.0)
    sampled = curvax.hessian_diag(loss, params, key=jax.random.key(0), num_probes=2000)
    np.testing.assert_allclose(sampled.value["z"], estimate.value["z"], atol=0.3)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_mean_and_standard_error_are_those_of_the_samples(batch_size):
    matrix, loss = quadratic(0, 3)
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    key = jax.random.key(2)
    estimate = curvax.hessian_diag(
        loss, params, key=key, num_probes=50, probe_batch_size=batch_size
    )
    probes = [
        ravel(curvax.random_probe(probe_key, params)) for probe_key in jax.random.split(key, 50)
    ]
    samples = np.stack([z * (np.asarray(matrix) @ z) for z in probes])
    np.testing.assert_allclose(ravel(estimate.value), samples.mean(axis=0), rtol=1e-4, atol=1e-5)
    error = samples.std(axis=0, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(ravel(estimate.standard_error), error, rtol=1e-4)
    trace = curvax.hessian_trace(loss, params, key=key, num_probes=50, probe_batch_size=batch_size)
    totals = samples.sum(axis=1)
    np.testing.assert_allclose(trace.value, totals.mean(), rtol=1e-4)
    np.testing.assert_allclose(trace.standard_error, totals.std(ddof=1) / np.sqrt(50), rtol=1e-4)
    halves = samples[:, :3].sum(axis=1)
    np.testing.assert_allclose(trace.per_leaf["a"], halves.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        trace.per_leaf_standard_error["a"], halves.std(ddof=1) / np.sqrt(50), rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_estimates_lie_within_their_standard_errors(distribution, seed):
    params = coupled_params(seed)
    batch = batch_like(params)
    options = {"key": jax.random.key(seed), "num_probes": 400, "distribution": distribution}
    expected = np.diag(dense_hessian(coupled_loss, params, batch))
    diag = curvax.hessian_diag(coupled_loss, params, batch, probe_batch_size=100, **options)
    trace = curvax.hessian_trace(coupled_loss, params, batch, probe_batch_size=100, **options)
    error = np.abs(ravel(diag.value) - expected)
    np.testing.assert_array_less(error, 5 * ravel(diag.standard_error) + 1e-5)
    assert abs(float(trace.value) - expected.sum()) < 4 * float(trace.standard_error)


def test_a_single_probe_has_no_standard_error():
    estimate = curvax.hessian_trace(
        lambda x: jnp.sum(x**2) * x[0], jnp.ones(2), key=jax.random.key(0), num_probes=1
    )
    assert np.isnan(estimate.standard_error)


def test_low_precision_params_are_summed_in_float32():
    params = {"w": jnp.ones(3, jnp.bfloat16), "table": jnp.arange(2)}
    estimate = curvax.hessian_diag(
        lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 2), params, key=jax.random.key(0)
    )
    assert estimate.value["w"].dtype == jnp.float32
    np.testing.assert_allclose(estimate.value["w"], 2)
    np.testing.assert_array_equal(estimate.value["table"], 0)


def test_sequential_probes_keep_the_memory_of_one():
    params = jnp.ones(20_000)

    def peak(batch_size):
        def estimate(params, key):
            return curvax.hessian_trace(
                lambda x: jnp.sum(jnp.tanh(x) ** 2) ** 2,
                params,
                key=key,
                num_probes=32,
                probe_batch_size=batch_size,
            )

        compiled = jax.jit(estimate).lower(params, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(1) < peak(32) / 4


@pytest.mark.parametrize("estimate", [curvax.hessian_diag, curvax.hessian_trace])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'needs a key; pass key= or method="exact"'),
        ({"num_probes": 0}, "num_probes must be an integer"),
        ({"probe_batch_size": 0}, "probe_batch_size must be an integer"),
        ({"method": "guess"}, "method must be one of 'hutchinson', 'exact'"),
    ],
)
def test_bad_options_are_refused(estimate, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(lambda x: jnp.sum(x**2), jnp.ones(2), **options)


def test_each_device_of_a_shard_map_estimates_its_own_hessian():
    def loss(x):
        return jnp.sum(x**4) + jnp.prod(x)

    def traces(points):
        point = points[0]
        hutchinson = curvax.hessian_trace(loss, point, key=0, num_probes=3).value
        return jnp.stack([hutchinson, curvax.hvp(loss, point, jnp.ones(3)).sum()])[jnp.newaxis]

    mesh = jax.make_mesh((2,), ("models",), axis_types=(jax.sharding.AxisType.Auto,))
    points = jnp.array([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
    axis = jax.P("models")
    mapped = jax.jit(jax.shard_map(traces, mesh=mesh, in_specs=axis, out_specs=axis))
    expected = jnp.concatenate([traces(points[:1]), traces(points[1:])])
    np.testing.assert_allclose(mapped(points), expected, rtol=1e-5)
