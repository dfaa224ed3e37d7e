"""What a probe must be: independent, in the leaf's dtype, the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rademacher_probes_are_signs_in_the_leaf_dtype(dtype):
    probe = curvax.random_probe(jax.random.key(0), jnp.zeros((64, 3), dtype))
    assert probe.dtype == dtype
    np.testing.assert_array_equal(jnp.abs(probe), 1)
    assert {-1.0, 1.0} == set(np.unique(probe.astype(jnp.float32)).tolist())


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_probes_have_mean_zero_and_identity_covariance_over_the_tree(distribution, dtype):
    params = {"a": jnp.zeros(3, dtype), "b": jnp.zeros(3, dtype)}
    keys = jax.random.split(jax.random.key(1), 4000)
    probes = jax.vmap(lambda k: curvax.random_probe(k, params, distribution))(keys)
    samples = np.concatenate([probes["a"], probes["b"]], axis=-1)
    if dtype == jnp.complex64:
        samples = np.concatenate([samples.real, samples.imag], axis=-1)
    # The standard error of a product's mean is at most sqrt(2 / 4000) = 0.022.
    np.testing.assert_allclose(samples.mean(axis=0), 0, atol=0.09)
    np.testing.assert_allclose(samples.T @ samples / 4000, np.eye(samples.shape[1]), atol=0.11)


def test_equal_shaped_leaves_do_not_share_a_probe():
    params = [jnp.zeros(64), jnp.zeros(64)]
    first, second = curvax.random_probe(jax.random.key(0), params)
    assert abs(float(first @ second)) < 64 * 0.6


def test_typed_and_raw_keys_draw_the_same():
    params = jnp.zeros(8)
    raw = curvax.random_probe(jax.random.key_data(jax.random.key(3)), params)
    np.testing.assert_array_equal(raw, curvax.random_probe(jax.random.key(3), params))


def test_integers_get_zeros():
    probe = curvax.random_probe(jax.random.key(0), {"i": jnp.arange(3), "b": jnp.array([True])})
    np.testing.assert_array_equal(probe["i"], 0)
    assert probe["i"].dtype == jnp.int32
    assert probe["b"].dtype == jnp.bool_


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="distribution must be one of 'rademacher', 'normal'"):
        curvax.random_probe(jax.random.key(0), jnp.ones(2), "uniform")
