"""Losses and slopes of single examples are those of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import spectrum

INPUTS = jax.random.normal(jax.random.key(0), (7, 3))
TARGETS = jnp.sin(INPUTS[:, :2])
PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (3, 2)), "count": jnp.array(3)}


def loss_fn(params, inputs, targets, scale):
    return jnp.mean((jnp.tanh(inputs @ params["kernel"]) - targets) ** 2) * scale


BATCH = (INPUTS, TARGETS, jnp.array(2.0))


def example_gradients():
    def of_one(x, y):
        grad = jax.grad(lambda kernel: loss_fn({"kernel": kernel}, x[None], y[None], 2.0))
        return grad(PARAMS["kernel"])

    return jax.vmap(of_one)(INPUTS, TARGETS)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 256])
def test_slopes_are_products_with_each_gradient(micro_batch_size):
    vectors = jax.random.normal(jax.random.key(2), (4, 3, 2))
    found = spectrum.example_projections(
        loss_fn, PARAMS, BATCH, {"kernel": vectors}, micro_batch_size=micro_batch_size
    )
    expected = jnp.einsum("nij,kij->nk", example_gradients(), vectors)
    np.testing.assert_allclose(found.slopes, expected, rtol=1e-4, atol=1e-5)
    losses = [loss_fn(PARAMS, x[None], y[None], 2.0) for x, y in zip(INPUTS, TARGETS, strict=True)]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)


def test_their_mean_is_the_slope_of_the_loss_along_an_eigenvector():
    hessian = spectrum.hessian_operator(
        lambda p, *batch: loss_fn(p, *batch), PARAMS, [BATCH], batch_weight=lambda *_: 1.0
    )
    pairs = spectrum.top_eigenpairs(hessian, 2, key=jax.random.key(0))
    found = spectrum.example_projections(loss_fn, PARAMS, BATCH, pairs.vectors)
    gradient = jax.grad(loss_fn, allow_int=True)(PARAMS, *BATCH)["kernel"]
    expected = jnp.einsum("ij,kij->k", gradient, pairs.vectors["kernel"])
    np.testing.assert_allclose(found.slopes.mean(axis=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "directions",
    [{"kernel": jnp.ones((3, 2))}, {"kernel": jnp.ones((4, 2, 3))}, {}, {"kernel": jnp.ones(())}],
)
def test_directions_of_another_shape_are_refused(directions):
    with pytest.raises(ValueError, match=r"leaves of shape \(k, \*leaf.shape\)"):
        spectrum.example_projections(loss_fn, PARAMS, BATCH, directions)


def test_examples_that_disagree_are_refused():
    with pytest.raises(ValueError, match="same number of examples"):
        spectrum.example_projections(
            loss_fn, PARAMS, (INPUTS, TARGETS[:3], jnp.array(1.0)), {"kernel": jnp.ones((1, 3, 2))}
        )
