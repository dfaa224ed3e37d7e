"""Value, gradient and Hessian-vector products against dense autodiff."""

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
    random_like,
    ravel,
)

pytestmark = pytest.mark.oldest

MODES = ("forward_over_reverse", "reverse_over_reverse", "finite_differences")
TOLERANCE = {  # mode -> relative to the product's norm, in float64
    "forward_over_reverse": 1e-12,
    "reverse_over_reverse": 1e-12,
    "finite_differences": 1e-7,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_the_dense_hessian(mode, seed):
    with jax.enable_x64(True):
        params = coupled_params(seed, jnp.float64)
        batch, tangent = batch_like(params), random_like(params, seed + 10)
        expected = dense_hessian(coupled_loss, params, batch) @ ravel(tangent)
        products = (
            curvax.hvp(coupled_loss, params, tangent, batch, mode=mode),
            curvax.value_grad_and_hvp(coupled_loss, mode=mode)(params, tangent, batch)[2],
            curvax.linearized_hvp(coupled_loss, params, batch, mode=mode)(tangent),
        )
        for product in products:
            error = np.linalg.norm(ravel(product) - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_value_and_grad(mode):
    params = coupled_params()
    batch = batch_like(params)
    value, grads, _ = curvax.value_grad_and_hvp(coupled_loss, mode=mode)(params, params, batch)
    chex.assert_trees_all_close(
        (value, grads), jax.value_and_grad(coupled_loss)(params, batch), rtol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_aux_comes_back_once_and_untouched(mode):
    def loss(params, batch):
        return coupled_loss(params, batch), {"batch": batch, "name": jnp.int32(3)}

    params = coupled_params()
    batch = batch_like(params)
    one_pass = jax.jit(curvax.value_grad_and_hvp(loss, has_aux=True, mode=mode))
    (value, aux), _, product = one_pass(params, params, batch)
    np.testing.assert_allclose(value, coupled_loss(params, batch), rtol=1e-6)
    chex.assert_trees_all_equal(aux, {"batch": batch, "name": jnp.int32(3)})
    plain = curvax.hvp(loss, params, params, batch, has_aux=True, mode=mode)
    chex.assert_trees_all_close(product, plain, rtol=1e-4)


def test_the_loss_is_traced_once():
    calls = []

    def loss(params, batch):
        calls.append(None)
        return coupled_loss(params, batch)

    params = coupled_params()
    curvax.value_grad_and_hessian_diag(loss, num_probes=3)(
        params, batch_like(params), key=jax.random.key(0)
    )
    assert len(calls) == 1


def test_only_params_get_a_tangent():
    # d²/dx dbatch is not zero here: a tangent on the batch would change the product.
    def loss(x, batch):
        return jnp.sum(x**2 * batch**3)

    product = curvax.hvp(loss, jnp.ones(2), jnp.ones(2), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(product, [2.0, 16.0])


def test_keyword_arguments_go_to_the_loss():
    def loss(x, *, scale):
        return scale * jnp.sum(x**2)

    np.testing.assert_allclose(curvax.hvp(loss, jnp.ones(2), jnp.ones(2), scale=3.0), [6.0, 6.0])


@pytest.mark.parametrize("mode", MODES)
def test_integer_and_bool_leaves_get_zeros_of_their_dtype(mode):
    params = {"w": jnp.array([1.0, 2.0]), "table": jnp.array([1, 0]), "flag": jnp.array(True)}

    def loss(p):
        return jnp.sum(p["w"][p["table"]] ** 3) * jnp.where(p["flag"], 1.0, 0.0)

    value, grads, product = curvax.value_grad_and_hvp(loss, mode=mode)(params, params)
    np.testing.assert_allclose(value, 9.0)
    chex.assert_trees_all_close(grads["w"], jnp.array([3.0, 12.0]))
    np.testing.assert_allclose(product["w"], [6.0, 24.0], rtol=1e-3)
    for tree in (grads, product):
        chex.assert_trees_all_equal_dtypes(tree, params)
        assert not np.any(tree["table"])
        assert not np.any(tree["flag"])


def test_products_have_the_dtypes_of_a_mixed_tree():
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.float16)}

    def loss(p):
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 4) for leaf in p.values())

    probe = curvax.random_probe(jax.random.key(0), params)
    _, grads, product = curvax.value_grad_and_hvp(loss)(params, probe)
    chex.assert_trees_all_equal_dtypes(grads, product, params)
    expected = jax.tree.map(lambda z: 12 * z, probe)
    chex.assert_trees_all_close(product, expected, rtol=1e-2)


def test_complex_products_follow_jax_gradients():
    # f = Re(z³) has the gradient 3 z² in JAX's convention, so H t = 6 z t.
    def loss(z):
        return jnp.sum(jnp.real(z**3))

    z = jnp.array([1.0 + 2.0j, -0.5 + 0.3j])
    tangent = jnp.array([0.3 - 1.0j, 2.0 + 0.1j])
    for mode in MODES[:2]:
        product = curvax.hvp(loss, z, tangent, mode=mode)
        np.testing.assert_allclose(product, 6 * z * tangent, rtol=1e-5)


def test_a_loss_without_a_forward_rule_works_in_the_other_modes():
    @jax.custom_vjp
    def kernel(x):
        return jnp.sum(x**4)

    kernel.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * kernel_backward(x),))

    @jax.custom_vjp
    def kernel_backward(x):
        return 4 * x**3

    kernel_backward.defvjp(lambda x: (kernel_backward(x), x), lambda x, g: (12 * x**2 * g,))

    x = jnp.array([1.0, 2.0])
    for mode in MODES[1:]:
        product = curvax.hvp(kernel, x, jnp.ones(2), mode=mode)
        np.testing.assert_allclose(product, [12.0, 48.0], rtol=1e-3)


@pytest.mark.parametrize("params", [{}, (), {"a": jnp.zeros((0, 3)), "b": None, "c": jnp.ones(())}])
def test_odd_trees(params):
    def loss(p):
        return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)), start=jnp.zeros(()))

    _, grads, product = curvax.value_grad_and_hvp(loss)(params, params)
    chex.assert_trees_all_equal_structs(grads, product, params)
    chex.assert_trees_all_close(product, jax.tree.map(lambda p: 2 * p, params))


@pytest.mark.parametrize(
    ("loss", "has_aux", "message"),
    [
        (lambda x: x**2, False, r"real floating-point scalar, got shape \(2,\)"),
        (lambda x: (jnp.sum(x), x), False, "pass has_aux=True"),
        (lambda x: jnp.sum(x), True, r"pair \(loss, aux\)"),
        (lambda x: (x, x), True, "real floating-point scalar"),
        (lambda x: jnp.sum(x + 1j), False, "dtype complex64"),
        (lambda x: jnp.int32(1), False, "dtype int32"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, has_aux, message):
    with pytest.raises(ValueError, match=message):
        curvax.value_grad_and_hvp(loss, has_aux=has_aux)(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=message):
        curvax.value_grad_and_hessian_diag(loss, has_aux=has_aux)(
            jnp.ones(2), key=jax.random.key(0)
        )


def test_a_tangent_that_does_not_match_is_refused_by_path():
    params = coupled_params()
    tangent = dict(params, head=(jnp.ones(3), jnp.ones(())))
    with pytest.raises(ValueError, match=r"tangent has head/0 of shape \(3,\)"):
        curvax.hvp(coupled_loss, params, tangent, batch_like(params))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of 'forward_over_reverse'"):
        curvax.value_grad_and_hvp(coupled_loss, mode="backward")
