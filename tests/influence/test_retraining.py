"""Scores predict what retraining does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import influence

NUMBER, WIDTH, DECAY = 120, 4, 0.01


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(params, inputs):
    return inputs @ params


def loss_fn(params, inputs, labels):
    log_probs = jax.nn.log_softmax(network(params, inputs))
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


def make_examples(number, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((number, WIDTH))
    noisy = inputs[:, 0] + rng.standard_normal(number) > 0
    return inputs, noisy.astype(int)


TRAIN, TEST = make_examples(NUMBER, 0), make_examples(3, 1)


@jax.jit
def trained(inputs, labels, counts):
    """Logistic regression by Newton's method, to full precision."""

    def objective(flat):
        params = flat.reshape(WIDTH, 2)
        log_probs = jax.nn.log_softmax(network(params, inputs))
        losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
        return jnp.sum(counts * losses) / NUMBER + DECAY / 2 * jnp.sum(flat**2)

    def step(flat, _):
        return flat - jnp.linalg.solve(
            jax.hessian(objective)(flat), jax.grad(objective)(flat)
        ), None

    return jax.lax.scan(step, jnp.zeros(2 * WIDTH), length=12)[0].reshape(WIDTH, 2)


def influence_of(params, train=TRAIN):
    return influence.ggn_influence(network, "softmax_cross_entropy", params, train, damping=DECAY)


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        return trained(*TRAIN, np.ones(NUMBER))


def test_leaving_an_example_out_lowers_the_measure_by_its_score(params):
    scores = influence_of(params).scores(TEST).scores

    def measures(params):
        return np.array([-loss_fn(params, x[None], y[None]) for x, y in zip(*TEST, strict=True)])

    changes = [
        measures(params) - measures(trained(*TRAIN, np.arange(NUMBER) != left_out))
        for left_out in range(10)
    ]
    assert np.linalg.norm(scores[:, :10].T - changes) < 0.05 * np.linalg.norm(changes)


def test_a_score_is_a_derivative_in_the_weight_of_an_example(params):
    def measure(params, inputs, labels):
        return -loss_fn(params, inputs, labels)

    scores = influence_of(params).scores(TEST, measure=measure).scores
    test = tuple(x[:1] for x in TEST)
    more, less = (
        measure(trained(*TRAIN, np.ones(NUMBER) + step * (np.arange(NUMBER) == 3)), *test)
        for step in (1e-4, -1e-4)
    )
    np.testing.assert_allclose(scores[0, 3], (more - less) / 2e-4, rtol=1e-5)


def test_wrong_labels_have_large_self_influence():
    inputs, _ = TRAIN
    right = (inputs[:, 0] > 0).astype(int)
    wrong = np.arange(NUMBER) % 12 == 0
    batch = inputs, np.where(wrong, 1 - right, right)
    values = influence_of(trained(*batch, np.ones(NUMBER)), batch).self_influence()
    assert values.found(wrong, 10) >= 0.7
