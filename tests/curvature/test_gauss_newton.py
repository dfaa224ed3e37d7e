"""Gauss-Newton and Fisher products and diagonals against dense Jacobians."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from tests.reference import random_like, ravel

pytestmark = pytest.mark.oldest

NUM_EXAMPLES, NUM_OUTPUTS = 5, 3


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"] + params["bias"]


def poisson(outputs, target):
    return jnp.sum(jnp.exp(outputs) - target * outputs)


def coupled(outputs, target):
    return jnp.sum(jnp.square(outputs - target)) ** 2 + jax.nn.logsumexp(outputs)


LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "squared_error": lambda outputs, target: 0.5 * jnp.sum(jnp.square(outputs - target)),
    poisson: poisson,
    coupled: coupled,
}


@pytest.fixture
def problem():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        normal = jax.random.normal
        params = {
            "first": normal(keys[0], (2, 4)),
            "second": normal(keys[1], (4, NUM_OUTPUTS)),
            "bias": normal(keys[2], (NUM_OUTPUTS,)),
        }
        inputs = normal(keys[3], (NUM_EXAMPLES, 2))
        targets = jax.nn.softmax(normal(keys[4], (NUM_EXAMPLES, NUM_OUTPUTS)))
        yield params, inputs, targets


def batch_loss(example_loss, targets):
    return lambda outputs: jnp.mean(jax.vmap(example_loss)(outputs, targets))


def dense(loss, params, inputs, targets):
    """Jacobian (N C, d) and output Hessian (N C, N C) of the batch's mean loss."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda x: network(unravel(x), inputs).ravel())(flat)
    outputs = network(params, inputs)
    of_outputs = batch_loss(LOSSES[loss], targets)
    hessian = jax.hessian(lambda f: of_outputs(f.reshape(outputs.shape)))(outputs.ravel())
    return np.asarray(jacobian), np.asarray(hessian)


@pytest.mark.parametrize("loss", LOSSES)
def test_ggn_products_are_those_of_the_dense_matrix(problem, loss):
    params, inputs, targets = problem
    tangent = random_like(params, 1)
    jacobian, hessian = dense(loss, *problem)
    product = curvax.ggn_vp(network, loss, params, tangent, inputs, targets)
    expected = jacobian.T @ hessian @ jacobian @ ravel(tangent)
    np.testing.assert_allclose(ravel(product), expected, rtol=1e-10, atol=1e-12)


def test_a_linear_network_has_its_hessian_as_ggn(problem):
    _, inputs, targets = problem
    params, tangent = jnp.ones((2, NUM_OUTPUTS)), jnp.arange(6.0).reshape(2, 3)

    def linear(params, inputs):
        return inputs @ params

    def loss(params):
        return jnp.mean(optax.softmax_cross_entropy(linear(params, inputs), targets))

    product = curvax.ggn_vp(linear, "softmax_cross_entropy", params, tangent, inputs)
    np.testing.assert_allclose(product, curvax.hvp(loss, params, tangent), atol=1e-12)


def test_integer_labels_and_their_one_hots_agree(problem):
    params, inputs, _ = problem
    labels = jnp.array([0, 2, 1, 1, 0])
    options = {"key": jax.random.key(0)}
    one_pass = curvax.value_grad_and_ggn_diag(network, "softmax_cross_entropy")
    chex.assert_trees_all_close(
        one_pass(params, inputs, labels, **options),
        one_pass(params, inputs, jax.nn.one_hot(labels, NUM_OUTPUTS), **options),
        rtol=1e-10,
    )


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared_error"])
def test_the_fisher_matrix_of_a_likelihood_is_its_ggn(problem, loss):
    params, inputs, _ = problem
    tangent = random_like(params, 1)
    jacobian, _ = dense(loss, *problem)
    blocks = jacobian.reshape(NUM_EXAMPLES, NUM_OUTPUTS, -1)
    probs = np.asarray(jax.nn.softmax(network(params, inputs)))
    fisher = np.zeros((jacobian.shape[1],) * 2)
    for block, prob in zip(blocks, probs, strict=True):
        if loss == "squared_error":  # unit normal noise: E[r rᵀ] = I
            fisher += block.T @ block / NUM_EXAMPLES
            continue
        for label in range(NUM_OUTPUTS):
            gradient = block.T @ (prob - np.eye(NUM_OUTPUTS)[label])
            fisher += prob[label] * np.outer(gradient, gradient) / NUM_EXAMPLES
    product = curvax.fisher_vp(network, loss, params, tangent, inputs)
    np.testing.assert_allclose(ravel(product), fisher @ ravel(tangent), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_empirical_fisher_matrix_is_the_mean_outer_product_of_gradients(problem, loss):
    params, inputs, targets = problem
    tangent = random_like(params, 1)

    def example_gradient(x, y):
        return jax.grad(lambda p: LOSSES[loss](network(p, x[None])[0], y))(params)

    gradients = jax.vmap(example_gradient)(inputs, targets)
    rows = np.stack(
        [ravel(jax.tree.map(lambda g, i=i: g[i], gradients)) for i in range(NUM_EXAMPLES)]
    )
    product = curvax.fisher_vp(network, loss, params, tangent, inputs, targets, empirical=True)
    expected = rows.T @ (rows @ ravel(tangent)) / NUM_EXAMPLES
    np.testing.assert_allclose(ravel(product), expected, rtol=1e-9, atol=1e-12)


ESTIMATORS = {
    "signed": curvax.value_grad_and_ggn_diag,
    "from_outputs": curvax.value_grad_and_ggn_diag_from_outputs,
}


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_diagonals_are_unbiased(problem, estimator, loss, distribution):
    params, inputs, targets = problem
    one_pass = ESTIMATORS[estimator](network, loss, distribution=distribution)
    keys = jax.random.split(jax.random.key(3), 3000)
    diags = jax.jit(jax.vmap(lambda k: one_pass(params, inputs, targets, key=k)[2]))(keys)
    samples = np.concatenate([np.reshape(d, (3000, -1)) for d in jax.tree.leaves(diags)], axis=1)
    jacobian, hessian = dense(loss, *problem)
    expected = np.diag(jacobian.T @ hessian @ jacobian)
    error = samples.std(axis=0) / np.sqrt(3000)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), 5 * error + 1e-12)
    assert estimator == "signed" or samples.min() >= 0


@pytest.mark.parametrize("num_probes", [1, 4])
def test_what_the_mean_square_of_each_diagonal_estimates(problem, num_probes):
    params, inputs, targets = problem
    jacobian, hessian = dense("squared_error", *problem)
    matrix = jacobian.T @ hessian @ jacobian
    diagonal = np.diag(matrix) ** 2
    rows = np.sum(matrix**2, axis=1) - diagonal
    expected = {
        "signed": diagonal + rows / num_probes,
        "from_outputs": (1 + 2 / num_probes) * diagonal,
    }
    keys = jax.random.split(jax.random.key(4), 8000)
    for name, distribution in (("signed", "rademacher"), ("from_outputs", "normal")):
        one_pass = ESTIMATORS[name](
            network, "squared_error", num_probes=num_probes, distribution=distribution
        )
        diags = jax.jit(jax.vmap(lambda k, f=one_pass: f(params, inputs, targets, key=k)[2]))(keys)
        leaves = [np.reshape(d, (8000, -1)) for d in jax.tree.leaves(diags)]
        squares = np.concatenate(leaves, axis=1) ** 2
        error = squares.std(axis=0) / np.sqrt(8000)
        np.testing.assert_array_less(np.abs(squares.mean(axis=0) - expected[name]), 6 * error)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_gradient_and_aux_come_with_the_diagonal(problem, loss, estimator):
    params, inputs, targets = problem

    def with_aux(params, inputs, *, shift):
        return network(params, inputs) + shift, {"shift": shift}

    one_pass = ESTIMATORS[estimator](with_aux, loss, has_aux=True)
    (value, aux), grads, diag = one_pass(
        params, inputs, targets, key=jax.random.key(0), shift=jnp.float64(0.5)
    )

    def direct(params):
        return batch_loss(LOSSES[loss], targets)(network(params, inputs) + 0.5)

    expected = jax.value_and_grad(direct)(params)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-10)
    assert float(aux["shift"]) == 0.5
    chex.assert_trees_all_equal_shapes_and_dtypes(diag, params)


def test_examples_may_have_several_axes(problem):
    params, _, _ = problem
    inputs = jax.random.normal(jax.random.key(1), (2, 5, 2))
    targets = jnp.zeros((2, 5), jnp.int32)
    flat = inputs.reshape(10, 2), targets.reshape(10)
    one_pass = curvax.value_grad_and_ggn_diag(network, "softmax_cross_entropy")
    key = jax.random.key(0)
    chex.assert_trees_all_close(
        one_pass(params, inputs, targets, key=key), one_pass(params, *flat, key=key), rtol=1e-10
    )


def test_the_diagonal_feeds_adahessian(problem):
    params, inputs, targets = problem
    # One probe may leave an entry almost no curvature in the first steps; the bound holds them.
    tx = curvax.adahessian(0.1, clip_threshold=1.0)
    state = tx.init(params)
    one_pass = jax.jit(
        curvax.value_grad_and_ggn_diag_from_outputs(network, "softmax_cross_entropy")
    )
    values = []
    for step in range(20):
        value, grads, diag = one_pass(params, inputs, targets, key=jax.random.key(step))
        updates, state = tx.update(grads, state, params, hessian_diag=diag)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x, y: curvax.ggn_vp(network, "hinge", p, p, x, y), "loss must be one of"),
        (lambda p, x, y: curvax.ggn_vp(network, poisson, p, p, x, y[:2]), "leading axes"),
        (lambda p, x, y: curvax.ggn_vp(network, poisson, p, {}, x, y), "tangent has no more"),
        (lambda p, x, y: curvax.fisher_vp(network, poisson, p, p, x, y), "is_likelihood=True"),
        (
            lambda p, x, y: curvax.fisher_vp(network, poisson, p, p, x, empirical=True),
            "needs targets",
        ),
        (
            lambda p, x, y: curvax.ggn_vp(lambda p, x: (network(p, x), 1), poisson, p, p, x, y),
            "pass has_aux=True",
        ),
    ],
)
def test_bad_input_is_refused(problem, call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem)
