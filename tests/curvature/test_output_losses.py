"""Losses of the outputs: weights of examples, labels, precision, memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax import spectrum
from tests.reference import random_like

pytestmark = pytest.mark.oldest

NUM_CLASSES = 3
LABELS = jnp.array([[0, 2, 1, 1], [2, 0, 0, 1]])
WEIGHTS = jnp.array([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 0.0, 3.0]])
COUNTED = WEIGHTS > 0
TARGETS = {
    "softmax_cross_entropy": LABELS,
    "squared_error": jax.nn.one_hot(LABELS, NUM_CLASSES) - 0.3,
}
ESTIMATORS = (curvax.value_grad_and_ggn_diag, curvax.value_grad_and_ggn_diag_from_outputs)


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


@pytest.fixture
def params():
    shapes = {"first": jnp.zeros((2, 4)), "second": jnp.zeros((4, NUM_CLASSES))}
    return random_like(shapes, 0)


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 4, 2))


def repeated(tree):
    """Examples as often as twice their weight says."""
    counts = np.asarray(2 * WEIGHTS, int).ravel()
    return jax.tree.map(lambda x: jnp.repeat(x.reshape(8, *x.shape[2:]), counts, axis=0), tree)


@pytest.mark.parametrize("loss", TARGETS)
def test_a_weight_counts_like_repeated_examples(params, inputs, loss):
    weighted = curvax.WeightedTargets(TARGETS[loss], WEIGHTS)
    tangent = random_like(params, 2)
    chex.assert_trees_all_close(
        curvax.ggn_vp(network, loss, params, tangent, inputs, weighted),
        curvax.ggn_vp(network, loss, params, tangent, *repeated((inputs, TARGETS[loss]))),
        rtol=1e-5,
        atol=1e-6,
    )
    chex.assert_trees_all_close(
        curvax.fisher_vp(network, loss, params, tangent, inputs, weighted, empirical=True),
        curvax.fisher_vp(
            network, loss, params, tangent, *repeated((inputs, TARGETS[loss])), empirical=True
        ),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_data_set_of_weighted_batches_is_one_weighted_batch(params, inputs):
    def targets(part):
        return curvax.WeightedTargets(LABELS[part], WEIGHTS[part])

    def operator(batches):
        return spectrum.ggn_operator(network, "softmax_cross_entropy", params, batches)

    whole = operator([(inputs, targets(slice(None)))])
    halves = operator([(inputs[:1], targets(slice(1))), (inputs[1:], targets(slice(1, 2)))])
    tangent = random_like(params, 2)
    chex.assert_trees_all_close(halves(tangent), whole(tangent), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", TARGETS)
def test_value_and_gradient_are_those_of_the_weighted_mean(params, inputs, loss, estimator):
    def direct(params):
        outputs = network(params, inputs)
        if loss == "squared_error":
            losses = 0.5 * jnp.sum(jnp.square(outputs - TARGETS[loss]), axis=-1)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, LABELS)
        return jnp.sum(WEIGHTS * losses) / jnp.sum(WEIGHTS)

    one_pass = jax.jit(estimator(network, loss))
    targets = curvax.WeightedTargets(TARGETS[loss], WEIGHTS)
    value, grads, _ = one_pass(params, inputs, targets, key=jax.random.key(0))
    chex.assert_trees_all_close((value, grads), jax.value_and_grad(direct)(params), rtol=1e-5)


def test_the_weighted_diagonal_from_outputs_is_unbiased(params, inputs):
    targets = curvax.WeightedTargets(LABELS, WEIGHTS)
    one_pass = curvax.value_grad_and_ggn_diag_from_outputs(network, "softmax_cross_entropy")
    keys = jax.random.split(jax.random.key(3), 2000)
    diags = jax.jit(jax.vmap(lambda k: one_pass(params, inputs, targets, key=k)[2]))(keys)
    samples = np.concatenate([np.reshape(d, (2000, -1)) for d in jax.tree.leaves(diags)], axis=1)
    units = jnp.eye(samples.shape[1])
    _, unravel = ravel_pytree(params)

    def entry(unit):
        product = curvax.ggn_vp(
            network, "softmax_cross_entropy", params, unravel(unit), inputs, targets
        )
        return unit @ ravel_pytree(product)[0]

    exact = jax.vmap(entry)(units)
    error = samples.std(axis=0) / np.sqrt(2000)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - exact), 5 * error + 1e-7)


@pytest.mark.parametrize("product", ["hessian_vp", "hessian_factor_vp"])
def test_products_with_many_vectors_are_those_with_each(product):
    logits = jax.random.normal(jax.random.key(0), (8, NUM_CLASSES))
    vectors = jax.random.normal(jax.random.key(1), (2000, 8, NUM_CLASSES))
    probs = np.asarray(jax.nn.softmax(np.float64(logits)), np.float64)
    factor = {"hessian_vp": probs, "hessian_factor_vp": np.sqrt(probs)}[product]
    weights = {"hessian_vp": np.ones_like(probs), "hessian_factor_vp": factor}[product]
    inner = np.sum(factor * vectors, axis=-1, keepdims=True)
    one = jax.vmap(lambda f, v: getattr(curvax.softmax_cross_entropy, product)(f, 0, v))
    many = jax.jit(jax.vmap(one, in_axes=(None, 0)))(logits, vectors)
    np.testing.assert_allclose(many, factor * vectors - factor * weights * inner, atol=2e-6)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_examples_of_weight_zero_may_have_any_label(params, inputs, jit):
    labels = jnp.where(COUNTED, LABELS, -100)
    one_pass = curvax.value_grad_and_ggn_diag(network, "softmax_cross_entropy")
    key = jax.random.key(0)
    chex.assert_trees_all_close(
        jit(one_pass)(params, inputs, curvax.WeightedTargets.ignoring(labels), key=key),
        one_pass(params, inputs, curvax.WeightedTargets(LABELS, COUNTED), key=key),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_a_label_that_is_no_class_is_refused(params, inputs, label):
    labels = LABELS.at[1, 2].set(label)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\).*got {label}.*ignoring"):
        curvax.ggn_vp(network, "softmax_cross_entropy", params, params, inputs, labels)


@pytest.mark.parametrize("loss", [*TARGETS, lambda f, y: jnp.sum(jnp.square(f - y))])
def test_nothing_that_is_not_finite_at_a_weight_of_zero_counts(params, inputs, loss):
    ignored = jnp.where(COUNTED, 0.0, jnp.nan)[..., jnp.newaxis]
    plain = TARGETS.get(loss, TARGETS["squared_error"])
    broken = plain if loss == "softmax_cross_entropy" else plain + ignored

    def results(ignored, targets):
        def shifted(params, inputs):
            return network(params, inputs) + ignored

        arguments = inputs, curvax.WeightedTargets(targets, WEIGHTS)
        yield curvax.ggn_vp(shifted, loss, params, params, *arguments)
        yield curvax.fisher_vp(shifted, loss, params, params, *arguments, empirical=True)
        for estimator in ESTIMATORS:
            yield estimator(shifted, loss)(params, *arguments, key=0)

    chex.assert_trees_all_close(
        list(results(ignored, broken)), list(results(0.0, plain)), rtol=1e-5, atol=1e-6
    )


def test_traced_weights_that_are_all_zero_are_not_a_number(params, inputs):
    @jax.jit
    def value(weights):
        targets = curvax.WeightedTargets(LABELS, weights)
        one_pass = curvax.value_grad_and_ggn_diag(network, "softmax_cross_entropy")
        return one_pass(params, inputs, targets, key=0)[0]

    assert jnp.isnan(value(0 * WEIGHTS))


def test_a_label_that_is_no_class_is_not_a_number_under_jit(params, inputs):
    one_pass = jax.jit(curvax.value_grad_and_ggn_diag(network, "softmax_cross_entropy"))
    value, grads, _ = one_pass(params, inputs, LABELS.at[0, 0].set(-1), key=jax.random.key(0))
    assert jnp.isnan(value)
    assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (jnp.zeros((2, 4)), "must not all be zero"),
        (-WEIGHTS, "must not be negative"),
        (WEIGHTS[0], r"example axes \(2, 4\)"),
    ],
)
def test_weights_that_make_no_mean_are_refused(params, inputs, weights, message):
    targets = curvax.WeightedTargets(LABELS, weights)
    with pytest.raises(ValueError, match=message):
        curvax.ggn_vp(network, "softmax_cross_entropy", params, params, inputs, targets)


@pytest.mark.parametrize("loss", [curvax.softmax_cross_entropy, curvax.squared_error])
def test_named_losses_are_objects_too(params, inputs, loss):
    name = "squared_error" if loss is curvax.squared_error else "softmax_cross_entropy"
    chex.assert_trees_all_equal(
        curvax.ggn_vp(network, loss, params, params, inputs),
        curvax.ggn_vp(network, name, params, params, inputs),
    )


def test_logits_in_bfloat16_are_summed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (4096, 16), jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(1), (4096,), 0, 16)
    one_pass = curvax.value_grad_and_ggn_diag(lambda p, x: p, "softmax_cross_entropy")
    value, grads, diag = one_pass(logits, None, labels, key=jax.random.key(0))
    exact = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, jnp.mean(exact), rtol=1e-6)
    assert grads.dtype == diag.dtype == jnp.bfloat16


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_take_no_memory_of_the_logits_size(estimator):
    params = {"first": jnp.ones((8, 8)), "second": jnp.ones((8, 1024))}
    inputs, labels = jnp.ones((4, 16, 8)), jnp.zeros((4, 16), int)
    one_pass = jax.jit(estimator(network, "softmax_cross_entropy"))

    def temporary(targets):
        lowered = one_pass.lower(params, inputs, targets, key=jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    weighted = curvax.WeightedTargets(labels, jnp.ones((4, 16)))
    assert temporary(weighted) <= 1.5 * temporary(labels)


def test_dense_factors_in_groups_equal_those_at_once(params, inputs, monkeypatch):
    loss = curvax.convex_loss(lambda f, y: jnp.sum(jnp.exp(f)) - f[y])
    one_pass = curvax.value_grad_and_ggn_diag_from_outputs(network, loss)
    at_once = one_pass(params, inputs, LABELS, key=jax.random.key(0))
    monkeypatch.setattr("curvax.curvature._batch_loss._DENSE_ENTRIES", 3 * NUM_CLASSES**2)
    chex.assert_trees_all_close(
        one_pass(params, inputs, LABELS, key=jax.random.key(0)), at_once, rtol=1e-5, atol=1e-7
    )
