"""Kernels without a forward-mode rule: one error wherever a product is taken, one way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import spectrum

pytestmark = pytest.mark.oldest

KEY = jax.random.key(0)
POINT = jnp.array([[0.3], [0.6]])
INPUTS = jnp.array([[1.0, 0.5], [-0.5, 2.0]])
TARGETS = jnp.zeros((2, 1))
BATCH = [(INPUTS, TARGETS)]
FORWARD, REVERSE, DIFFERENCES = (
    "forward_over_reverse",
    "reverse_over_reverse",
    "finite_differences",
)


@jax.custom_vjp
def sine(x):
    """A kernel written as usual: its forward rule calls the kernel itself."""
    return jnp.sin(x)


sine.defvjp(lambda x: (sine(x), x), lambda x, c: (c * jnp.cos(x),))


@jax.custom_vjp
def opaque(x):
    """A kernel whose backward pass has no derivative."""
    return jnp.sin(x)


def opaque_backward(x, cotangent):
    cosine = jax.pure_callback(np.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return (cotangent * cosine,)


opaque.defvjp(lambda x: (jnp.sin(x), x), opaque_backward)


def network(kernel):
    return lambda params, inputs: kernel(inputs @ params)


def loss(kernel):
    return lambda params, inputs, targets: 0.5 * jnp.mean((kernel(inputs @ params) - targets) ** 2)


# Each takes a kernel, a point and a mode.
HESSIANS = {
    "hvp": lambda k, p, mode: curvax.hvp(loss(k), p, p, *BATCH[0], mode=mode),
    "linearized_hvp": lambda k, p, mode: curvax.linearized_hvp(loss(k), p, *BATCH[0], mode=mode)(p),
    "one pass": lambda k, p, mode: curvax.value_grad_and_hessian_diag(loss(k), mode=mode)(
        p, *BATCH[0], key=KEY
    )[2],
    "hessian_diag": lambda k, p, mode: (
        curvax.hessian_diag(loss(k), p, *BATCH[0], key=KEY, num_probes=2, mode=mode).value
    ),
    "hessian_trace": lambda k, p, mode: (
        curvax.hessian_trace(loss(k), p, *BATCH[0], key=KEY, num_probes=2, mode=mode).value
    ),
    "operator": lambda k, p, mode: spectrum.hessian_operator(loss(k), p, BATCH, mode=mode)(p),
    "operator, two batches": lambda k, p, mode: spectrum.hessian_operator(
        loss(k), p, 2 * BATCH, mode=mode
    )(p),
}
JACOBIANS = {
    "ggn_vp": lambda k, p, mode: curvax.ggn_vp(
        network(k), "squared_error", p, p, *BATCH[0], mode=mode
    ),
    "fisher_vp": lambda k, p, mode: curvax.fisher_vp(
        network(k), "squared_error", p, p, *BATCH[0], empirical=True, mode=mode
    ),
    "ggn_diag": lambda k, p, mode: curvax.value_grad_and_ggn_diag(
        network(k), "squared_error", mode=mode
    )(p, *BATCH[0], key=KEY)[2],
    "ggn_operator": lambda k, p, mode: spectrum.ggn_operator(
        network(k), "squared_error", p, BATCH, mode=mode
    )(p),
    "ntk_gram": lambda k, p, mode: spectrum.ntk_gram(network(k), p, INPUTS, mode=mode),
}
PRODUCTS = {**HESSIANS, **JACOBIANS}
WITHIN_JIT = [name for name in PRODUCTS if name != "ntk_gram"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_forward_mode_names_the_mode_to_pass(name):
    with pytest.raises(ValueError, match=r'custom_vjp.*pass mode="reverse_over_reverse"'):
        PRODUCTS[name](sine, POINT, FORWARD)


@pytest.mark.parametrize("name", WITHIN_JIT)
def test_forward_mode_names_the_mode_to_pass_within_jit_too(name):
    with pytest.raises(ValueError, match=r'custom_vjp.*pass mode="reverse_over_reverse"'):
        jax.jit(lambda point: PRODUCTS[name](sine, point, FORWARD))(POINT)


@pytest.mark.parametrize("name", PRODUCTS)
def test_reverse_mode_gives_what_forward_mode_gives_of_the_same_function(name):
    expected = PRODUCTS[name](jnp.sin, POINT, FORWARD)
    np.testing.assert_allclose(PRODUCTS[name](sine, POINT, REVERSE), expected, rtol=1e-5)


@pytest.mark.parametrize("name", HESSIANS)
def test_a_backward_pass_without_a_derivative_needs_finite_differences(name):
    with pytest.raises(ValueError, match=r'no derivative of its own.*pass mode="finite_diff'):
        HESSIANS[name](opaque, POINT, REVERSE)
    expected = HESSIANS[name](jnp.sin, POINT, FORWARD)
    product = HESSIANS[name](opaque, POINT, DIFFERENCES)
    np.testing.assert_allclose(product, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in JACOBIANS if name != "ntk_gram"])
def test_a_backward_pass_that_is_not_transposed_needs_the_output_probe(name):
    @jax.custom_vjp
    def kernel(x):
        return jnp.sin(x)

    def backward(x, cotangent):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(lambda x, c: c * np.cos(x), shape, x, cotangent),)

    kernel.defvjp(lambda x: (jnp.sin(x), x), backward)
    with pytest.raises(ValueError, match=r"no derivative of its own.*ggn_diag_from_outputs"):
        JACOBIANS[name](kernel, POINT, REVERSE)


def test_the_output_probe_takes_any_kernel_with_a_gradient():
    def diag(kernel):
        one_pass = curvax.value_grad_and_ggn_diag_from_outputs(network(kernel), "squared_error")
        return jax.jit(one_pass)(POINT, *BATCH[0], key=KEY)

    for found, expected in zip(diag(opaque), diag(jnp.sin), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_other_errors_of_a_loss_stay_what_they_are():
    def broken(params):
        raise TypeError("a loss's own error")

    with pytest.raises(TypeError, match="a loss's own error"):
        curvax.hvp(broken, POINT, POINT)


def test_aux_that_is_no_array_passes_through_jit():
    def with_name(params):
        return jnp.sum(params**2), {"name": "mse", "params": params}

    @jax.jit
    def step(params):
        (value, aux), _, product = curvax.value_grad_and_hvp(with_name, has_aux=True)(
            params, params
        )
        assert aux["name"] == "mse"
        return value, aux["params"], product

    np.testing.assert_allclose(step(POINT)[2], 2 * POINT)


def test_modes_that_are_not_offered_are_refused():
    for call in (
        lambda: curvax.ggn_vp(
            network(jnp.sin), "squared_error", POINT, POINT, INPUTS, mode=DIFFERENCES
        ),
        lambda: spectrum.ntk_gram(network(jnp.sin), POINT, INPUTS, mode="forward"),
        lambda: spectrum.hessian_operator(loss(jnp.sin), POINT, BATCH, mode="forward"),
        lambda: curvax.value_grad_and_ggn_diag(network(jnp.sin), "squared_error", mode=DIFFERENCES),
    ):
        with pytest.raises(ValueError, match="mode must be one of 'forward_over_reverse'"):
            call()
    with pytest.raises(ValueError, match="linearize=True does not work"):
        spectrum.hessian_operator(loss(jnp.sin), POINT, BATCH, mode=DIFFERENCES, linearize=True)
