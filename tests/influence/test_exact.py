"""Scores are those of dense matrices, whichever way the inverse is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import influence
from tests.influence.problems import (
    BATCHES,
    NUM_TRAIN,
    TEST,
    TRAIN,
    dense,
    dense_scores,
    loss_fn,
    make_params,
    network,
    right_logit,
)

DAMPING = 0.1
FEW, MANY = 4, 20  # hidden units: 24 parameters, fewer than rows, and 120, more than rows


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def ggn(hidden=FEW, batches=TRAIN, **options):
    options = {"damping": DAMPING, **options}
    loss = "softmax_cross_entropy"
    return influence.ggn_influence(network, loss, make_params(hidden), batches, **options)


@pytest.mark.parametrize("hidden", [FEW, MANY])
def test_scores_with_the_gauss_newton_matrix(hidden):
    found, exact = ggn(hidden).scores(TEST).scores, dense(hidden)
    expected = dense_scores(exact["ggn"], DAMPING, -exact["test"], exact["train"])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_scores_with_the_empirical_fisher_matrix():
    function = influence.empirical_fisher_influence(loss_fn, make_params(), TRAIN, damping=DAMPING)
    exact = dense()
    fisher = exact["train"].T @ exact["train"] / NUM_TRAIN
    expected = dense_scores(fisher, DAMPING, -exact["test"], exact["train"])
    np.testing.assert_allclose(function.scores(TEST).scores, expected, atol=1e-12)


def test_blocks_are_those_on_the_diagonal():
    exact, block = dense(), np.arange(24) // 5
    blocks = np.where(block[:, None] == block, exact["ggn"], 0)
    expected = dense_scores(blocks, DAMPING, -exact["test"], exact["train"])
    np.testing.assert_allclose(ggn(block_size=5).scores(TEST).scores, expected, atol=1e-12)


def test_batches_give_the_scores_of_one_batch():
    found = ggn(batches=BATCHES, micro_batch_size=7)
    np.testing.assert_allclose(found.scores(TEST).scores, ggn().scores(TEST).scores, atol=1e-12)


def test_an_iterator_of_batches_is_kept():
    found = ggn(batches=iter(BATCHES), micro_batch_size=7).scores(iter([TEST])).scores
    np.testing.assert_allclose(found, ggn().scores(TEST).scores, atol=1e-12)


def test_self_influence_is_minus_the_score_for_its_own_loss():
    function = ggn()
    expected = np.diag(function.scores(TRAIN).scores)
    np.testing.assert_allclose(function.self_influence().values, expected, atol=1e-12)


def test_any_function_of_a_test_example_can_be_measured():
    exact = dense()
    expected = dense_scores(exact["ggn"], DAMPING, exact["logit"], exact["train"])
    found = ggn().scores(TEST, measure=right_logit).scores
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_selected_leaves_alone_take_part():
    found = ggn(select=lambda path, _: path == "second").scores(TEST).scores
    exact, part = dense(), slice(12, 24)
    expected = dense_scores(
        exact["ggn"][part, part], DAMPING, -exact["test"][:, part], exact["train"][:, part]
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_default_damping_is_the_mean_of_the_diagonal():
    mean = np.trace(dense(MANY)["ggn"]) / 120
    np.testing.assert_allclose(ggn(MANY, damping=None).damping, mean)


def test_a_stream_estimates_it_from_a_row_of_each_example():
    copies = tuple(np.concatenate([x] * 100) for x in TRAIN)  # each has a direction of its own
    found = ggn(batches=copies, damping=None, micro_batch_size=7200).damping
    np.testing.assert_allclose(found, np.trace(dense()["ggn"]) / 24, rtol=0.05)


def test_random_directions_have_the_expectation_of_all_rows():
    found = ggn(num_directions=2000).scores(TEST).scores
    expected = ggn().scores(TEST).scores
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_random_directions_do_not_depend_on_how_examples_are_split():
    one, other = (ggn(num_directions=1, micro_batch_size=size) for size in (5, 100))
    np.testing.assert_allclose(one.self_influence().values, other.self_influence().values)


def test_an_example_may_be_a_sequence():
    inputs, labels = (np.stack([x[:12], x[12:]], axis=1) for x in TRAIN)  # 12 of two tokens

    def as_outputs(params, batch):
        return network(params, batch).reshape(len(batch), 2 * 3)

    def mean_of_tokens(outputs, targets):
        log_probs = jax.nn.log_softmax(outputs.reshape(2, 3))
        return -jnp.mean(jnp.take_along_axis(log_probs, targets[:, None], axis=1))

    loss = "softmax_cross_entropy"
    tokens = influence.ggn_influence(
        network, loss, make_params(), (inputs, labels), damping=DAMPING
    )
    whole = influence.ggn_influence(
        as_outputs, mean_of_tokens, make_params(), (inputs, labels), damping=DAMPING
    )
    found, expected = tokens.self_influence().values, whole.self_influence().values
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_narrow_parameters_give_scores_in_float32():
    batch = TRAIN[0].astype(np.float32), TRAIN[1]
    found = influence.ggn_influence(
        network, "softmax_cross_entropy", make_params(dtype=jnp.bfloat16), batch, damping=DAMPING
    ).self_influence()
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, ggn().self_influence().values, rtol=0.05, atol=1e-3)


def test_the_same_call_gives_the_same_numbers():
    one, other = (ggn(damping=None).scores(TEST).scores for _ in range(2))
    np.testing.assert_array_equal(one, other)
