"""Results rank, compare and plot; the linear datamodeling score."""

import numpy as np
import pytest
import scipy.stats

from curvax.influence import InfluenceScores, SelfInfluence, linear_datamodeling_score

SCORES = InfluenceScores(np.array([[1.0, -2.0, 3.0, 1.0], [0.0, 5.0, -1.0, 2.0]]))
VALUES = SelfInfluence(np.array([4.0, 0.0, 9.0, 1.0]))
WRONG = np.array([True, False, True, False])


def test_the_most_helpful_examples_come_first_and_equal_ones_in_order():
    np.testing.assert_array_equal(SCORES.top(3), [[2, 0, 3], [1, 3, 0]])


def test_the_most_harmful_examples_come_first():
    np.testing.assert_array_equal(SCORES.bottom(2), [[1, 0], [2, 0]])


def test_relative_scores_are_divided_by_roots_of_self_influences():
    np.testing.assert_allclose(SCORES.relative(VALUES).scores[0], [0.5, 0.0, 1.0, 1.0])


def test_found_is_the_share_of_wrong_examples_at_the_top():
    assert [VALUES.found(WRONG, k) for k in (1, 2)] == [0.5, 1.0]


def test_a_plot_shows_helpful_and_harmful_examples():
    ax = SCORES.plot(1, k=1, names="abcd")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c"]
    assert [bar.get_width() for bar in ax.patches] == [5.0, -1.0]


def test_a_plot_of_self_influences_falls_or_shows_what_is_found():
    np.testing.assert_array_equal(VALUES.plot().lines[0].get_ydata(), [9.0, 4.0, 1.0, 0.0])
    np.testing.assert_array_equal(
        VALUES.plot(wrong=WRONG).lines[0].get_ydata(), [0.0, 0.5, 1.0, 1.0, 1.0]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SCORES.top(5), "k must be at most the 4 training examples, got 5"),
        (lambda: SCORES.relative(SelfInfluence(np.ones(3))), r"one value for each of the 4"),
        (lambda: SCORES.plot(2), "test must be below 2"),
        (lambda: SCORES.plot(names=["a"]), "names must be 4"),
        (lambda: VALUES.found(WRONG * 1, 1), "wrong must be a bool array"),
        (lambda: VALUES.found(WRONG & False, 1), "with at least one True"),
        (lambda: lds(subsets=np.ones((6, 3), bool)), "subsets"),
        (lambda: lds(subsets=np.ones((6, 4))), "subsets must be bool"),
        (lambda: lds(outputs=np.ones((6, 3))), "outputs must have shape"),
        (lambda: lds(outputs=np.full((6, 2), np.nan)), "must be finite"),
    ],
)
def test_wrong_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def lds(subsets=None, outputs=None):
    rng = np.random.default_rng(0)
    subsets = rng.random((6, 4)) < 0.5 if subsets is None else subsets
    outputs = rng.integers(0, 3, (6, 2)) if outputs is None else outputs  # with ties
    return linear_datamodeling_score(SCORES, subsets, outputs)


def test_the_linear_datamodeling_score_is_a_mean_of_rank_correlations():
    rng = np.random.default_rng(0)
    subsets, outputs = rng.random((6, 4)) < 0.5, rng.integers(0, 3, (6, 2))
    predicted = subsets @ SCORES.scores.T
    expected = [scipy.stats.spearmanr(predicted[:, j], outputs[:, j])[0] for j in range(2)]
    found = lds()
    np.testing.assert_allclose(found.per_test, expected)
    np.testing.assert_allclose(found.value, np.mean(expected))
    np.testing.assert_allclose(found.standard_error, abs(expected[0] - expected[1]) / 2)


def test_outputs_that_do_not_vary_have_no_correlation():
    np.testing.assert_array_equal(lds(outputs=np.ones((6, 2))).per_test, [0.0, 0.0])
