"""The functions of docs/uncertainty.md, as they stand there, against dense float64 matrices."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax

PAGE = Path(__file__).parents[2] / "docs" / "uncertainty.md"
NUM_INPUTS = 2
NUM_OUTPUTS = 3
PRECISION = 0.7
NOISE = 0.4

LOSSES = {
    "classification": curvax.softmax_cross_entropy,
    "regression": curvax.squared_error,
    "counts": curvax.convex_loss(lambda f, y: jnp.sum(jnp.exp(f) - y * f)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)
# Of 21 parameters: fewer rows, solved in sample space, and more.
every_number = pytest.mark.parametrize("number", [4, 20])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def page():
    """The functions of the page's block about the posterior, with what it imports."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [block] = [block for block in blocks if "def posterior" in block]
    names = {}
    exec("import functools, jax, optax, curvax\nimport jax.numpy as jnp\n" + block, names)
    names["posterior"] = jax.jit(names["posterior"])  # compiled once for all cases of a shape
    return names


def network(params, x):
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return hidden @ params["second"]


def problem(loss, number, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"first": (NUM_INPUTS, 3), "bias": (3,), "second": (3, NUM_OUTPUTS)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    # The outputs do not depend on these: they keep the prior's variance.
    params["unused"] = jnp.zeros(3)
    inputs = jnp.asarray(rng.standard_normal((number, NUM_INPUTS)))
    if loss == "classification":
        return params, inputs, jnp.asarray(rng.integers(0, NUM_OUTPUTS, number))
    return params, inputs, jnp.asarray(rng.poisson(2, (number, NUM_OUTPUTS)), float)


def jacobians(params, inputs):
    """Of shape (n, C, d)."""
    vector, unflatten = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacrev(lambda v: network(unflatten(v), inputs)))(vector))


def gauss_newton(loss, params, inputs, targets, weights=None):
    """The dense sum of J^T H J over the examples, from the Hessian that JAX takes of the loss."""
    outputs = network(params, inputs)
    hessians = jax.jit(jax.vmap(jax.hessian(LOSSES[loss].value)))(outputs, targets)
    weights = np.ones(len(inputs)) if weights is None else weights
    J = jacobians(params, inputs)
    return np.einsum("n,nca,nce,neb->ab", weights, J, hessians, J)


def case(page, loss, number):
    """The posterior of the page, its dense precision matrix, and the problem."""
    params, inputs, targets = problem(loss, number)
    noise = NOISE if loss == "regression" else 1.0
    rows = page["gauss_newton_rows"](network, params, inputs, targets, LOSSES[loss])
    inverse, c = page["posterior"](rows, PRECISION, noise)
    H = gauss_newton(loss, params, inputs, targets) / noise**2
    return inverse, c, H + PRECISION * np.eye(len(H)), params


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@every_loss
@every_number
def test_covariance_variances_and_determinant(page, loss, number):
    inverse, c, P, params = case(page, loss, number)
    covariance = np.linalg.inv(P)
    identity = jax.vmap(ravel_pytree(params)[1])(jnp.eye(len(P)))
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(inverse.solve(v))[0]))(identity)
    assert_close(columns / c, covariance)
    assert_close(flat(inverse.diagonal()) / c, np.diag(covariance))
    assert_close(inverse.logdet() + len(P) * np.log(c), np.linalg.slogdet(P)[1])


@every_number
def test_draws_have_the_posterior_covariance(page, number):
    inverse, c, P, _ = case(page, "regression", number)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    draws = jax.jit(jax.vmap(lambda key: ravel_pytree(inverse.sample(key))[0]))(keys)
    white = np.asarray(draws) / np.sqrt(c) @ np.linalg.cholesky(P)
    error = white.T @ white / count - np.eye(len(P))
    assert np.abs(error).max() < 5 * np.sqrt(2 / count)


@every_number
def test_variance_of_an_output(page, number):
    inverse, c, P, params = case(page, "classification", number)
    inputs = jnp.asarray(np.random.default_rng(5).standard_normal((4, NUM_INPUTS)))
    J = jacobians(params, inputs)
    expected = np.einsum("nca,ab,ncb->nc", J, np.linalg.inv(P), J)
    of_output = jax.vmap(inverse.quadratic_form)
    found = jax.jit(jax.vmap(lambda x: of_output(jax.jacrev(network)(params, x)) / c))(inputs)
    assert_close(found, expected)


@every_number
def test_evidence_and_its_gradient_under_jit(page, number):
    params, inputs, targets = problem("regression", number)
    rows = page["gauss_newton_rows"](network, params, inputs, targets, curvax.squared_error)
    residuals = targets - network(params, inputs)

    @jax.jit
    def evidence(precision, noise):
        log_likelihood = jax.scipy.stats.norm.logpdf(residuals, scale=noise).sum()
        inverse, c = page["posterior"](rows, precision, noise)
        return page["log_evidence"](log_likelihood, params, inverse, c, precision)

    H = gauss_newton("regression", params, inputs, targets)
    theta, r, identity = flat(params), np.asarray(residuals), np.eye(len(H))

    def dense(precision, noise):
        P = H / noise**2 + precision * identity
        size = r.size
        log_likelihood = -0.5 * (r**2).sum() / noise**2 - size * np.log(noise * (2 * np.pi) ** 0.5)
        log_prior = 0.5 * len(H) * np.log(precision / (2 * np.pi)) - precision / 2 * theta @ theta
        log_volume = 0.5 * len(H) * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(P)[1]
        covariance = np.linalg.inv(P)
        by_precision = 0.5 * (len(H) / precision - theta @ theta - np.trace(covariance))
        by_noise = (r**2).sum() / noise**3 - size / noise + np.trace(covariance @ H) / noise**3
        return log_likelihood + log_prior + log_volume, (by_precision, by_noise)

    value, gradient = jax.value_and_grad(evidence, argnums=(0, 1))(PRECISION, NOISE)
    expected, expected_gradient = dense(PRECISION, NOISE)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("number", [8, 30])  # of 12 features
def test_a_last_layer_is_bayesian_linear_regression(page, number):
    rng = np.random.default_rng(1)
    features, targets = rng.standard_normal((number, 12)), rng.standard_normal(number)

    def last_layer(params, features):
        return features @ params["kernel"]

    like = {"kernel": jnp.zeros((12, 1))}
    rows = page["gauss_newton_rows"](
        last_layer, like, jnp.asarray(features), targets[:, np.newaxis], curvax.squared_error
    )
    inverse, c = page["posterior"](rows, PRECISION, NOISE)
    mean = inverse.solve_in_sample_space(targets / number)
    P = features.T @ features / NOISE**2 + PRECISION * np.eye(12)
    assert_close(flat(mean), np.linalg.solve(P, features.T @ targets) / NOISE**2)

    residuals = targets - last_layer(mean, features)[:, 0]
    log_likelihood = jax.scipy.stats.norm.logpdf(residuals, scale=NOISE).sum()
    covariance = NOISE**2 * np.eye(number) + features @ features.T / PRECISION
    assert_close(
        page["log_evidence"](log_likelihood, mean, inverse, c, PRECISION),
        jax.scipy.stats.multivariate_normal.logpdf(targets, np.zeros(number), covariance),
    )


@every_number
def test_weighted_examples(page, number):
    """Each row has its example's weight, and the sum of the weights takes the place of m."""
    loss = "classification"
    params, inputs, targets = problem(loss, number)
    weights = np.random.default_rng(3).uniform(0, 2, number)
    rows = page["gauss_newton_rows"](network, params, inputs, targets, LOSSES[loss])
    of_rows = np.repeat(weights, NUM_OUTPUTS)
    inverse = curvax.inverse_fisher(rows, PRECISION / of_rows.sum(), weights=of_rows)
    H = gauss_newton(loss, params, inputs, targets, weights)
    covariance = np.linalg.inv(H + PRECISION * np.eye(len(H)))
    assert_close(flat(inverse.diagonal()) / of_rows.sum(), np.diag(covariance))


def test_sums_of_squares_of_rows_are_the_expected_squares_of_gradients(page):
    """The diagonal Fisher matrix of EWC, with the expectation over all labels."""
    params, inputs, targets = problem("classification", 20)
    loss = curvax.softmax_cross_entropy
    rows = page["gauss_newton_rows"](network, params, inputs, targets, loss)

    def gradient(x, label):
        return ravel_pytree(jax.grad(lambda p: loss.value(network(p, x), label))(params))[0]

    labels = jnp.arange(NUM_OUTPUTS)
    of_labels = jax.vmap(gradient, in_axes=(None, 0))
    gradients = jax.jit(jax.vmap(of_labels, in_axes=(0, None)))(inputs, labels)
    probabilities = jax.nn.softmax(network(params, inputs))
    expected = jnp.einsum("nc,ncd->d", probabilities, gradients**2)
    assert_close(flat(jax.tree.map(lambda leaf: jnp.sum(leaf**2, axis=0), rows)), expected)


def test_an_evidence_may_close_over_its_rows():
    rows = np.random.default_rng(0).standard_normal((5, 8))
    on_device = jnp.asarray(rows)
    found = jax.jit(lambda damping: curvax.inverse_fisher(on_device, damping).logdet())(0.1)
    assert_close(found, np.linalg.slogdet(rows.T @ rows / 5 + 0.1 * np.eye(8))[1])


def test_a_gradient_passes_through_many_rows():
    """With blocks of rows of 32 or more, XLA's CPU backend crashed in the transposed products."""
    rows = np.random.default_rng(0).standard_normal((140, 150))

    @jax.jit
    @jax.grad
    def gradient(scale, rows):
        return curvax.inverse_fisher(scale * rows, 0.1).logdet()

    H = rows.T @ rows / 140
    covariance = np.linalg.inv(4 * H + 0.1 * np.eye(150))
    assert_close(gradient(2.0, jnp.asarray(rows)), 4 * np.trace(covariance @ H))
