"""Structured pruning: N of M along the fan-in, blocks of weights, whole outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems


def along_fan_in(mask, length):
    """Groups of ``length`` along the axis before the last, in rows."""
    moved = np.moveaxis(np.asarray(mask), -2, -1)
    return moved.reshape(-1, length)


@pytest.mark.parametrize("method", ["obs", "fisher", "magnitude"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 4)])
def test_n_of_m_along_the_fan_in_are_kept(n, m, method):
    result = problems.prune(
        problems.params(), problems.grads(), None, method=method, structure=pruning.NM(n, m)
    )
    for layer in ("conv", "dense"):
        groups = along_fan_in(result.mask[layer]["kernel"], m)
        assert np.all(groups.sum(axis=1) == n)
    assert result.sparsity == pytest.approx(1 - n / m)


def test_the_best_of_a_group_stay():
    kernel = jnp.array([[4.0, 1.0], [1.0, 2.0], [3.0, 3.0], [2.0, 4.0]])
    result = problems.prune(
        {"kernel": kernel}, None, None, method="magnitude", structure=pruning.NM(2, 4)
    )
    np.testing.assert_array_equal(
        result.mask["kernel"], [[True, False], [False, False], [True, True], [False, True]]
    )


def test_steps_towards_n_of_m_never_empty_a_group():
    params, rows = problems.params(), problems.grads()
    structure = pruning.NM(2, 4)
    half = problems.prune(params, rows, 0.3, structure=structure)
    assert half.sparsity == pytest.approx(16 / 56)
    for layer in ("conv", "dense"):
        assert np.all(along_fan_in(half.mask[layer]["kernel"], 4).sum(axis=1) >= 2)
    whole = problems.prune(half.params, rows, None, mask=half.mask, structure=structure)
    for layer in ("conv", "dense"):
        assert np.all(along_fan_in(whole.mask[layer]["kernel"], 4).sum(axis=1) == 2)


def test_more_than_a_mask_allows_of_n_of_m_goes():
    # The first group has lost three of four before.
    mask = {"kernel": jnp.array([[True], [False], [False], [False]] + [[True]] * 4)}
    result = problems.prune(
        {"kernel": jnp.arange(1.0, 9.0).reshape(8, 1)},
        None,
        None,
        method="magnitude",
        mask=mask,
        structure=pruning.NM(2, 4),
    )
    np.testing.assert_array_equal(
        along_fan_in(result.mask["kernel"], 4), [[1, 0, 0, 0], [0, 0, 1, 1]]
    )


@pytest.mark.parametrize("size", [2, 4])
def test_blocks_of_weights_go_together(size):
    result = problems.prune(
        problems.params(), problems.grads(), 0.5, structure=pruning.WeightBlocks(size)
    )
    for layer in ("conv", "dense"):
        groups = along_fan_in(result.mask[layer]["kernel"], size).sum(axis=1)
        assert set(np.unique(groups)) <= {0, size}
    assert result.sparsity == pytest.approx(0.5)


def test_output_units_go_together_and_the_lowest_mean_score_first():
    kernel = jnp.array([[3.0, 0.1, 1.0], [1.0, 0.2, 1.0]])
    other = jnp.array([[0.5], [0.5], [0.5], [0.5]])
    params = {"a": {"kernel": kernel}, "b": {"kernel": other}}
    structure = pruning.OutputUnits()
    with pytest.warns(UserWarning, match="left no weights in b/kernel"):
        result = problems.prune(params, None, 0.6, method="magnitude", structure=structure)
    # Of ten weights six may go: two of the first leaf's second output, four of the other leaf.
    np.testing.assert_array_equal(result.mask["a"]["kernel"], [[True, False, True]] * 2)
    assert not np.any(result.mask["b"]["kernel"])


def test_a_share_that_units_do_not_meet_is_rounded_down():
    params = {"kernel": jnp.arange(1.0, 13.0).reshape(4, 3)}
    result = problems.prune(params, None, 0.5, method="magnitude", structure=pruning.OutputUnits())
    assert result.sparsity == pytest.approx(1 / 3)


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_a_pattern_may_match_leaves_alone_that_cannot_hold_the_structure(distribution):
    params = {
        "odd": {"kernel": jax.random.normal(jax.random.key(0), (6, 3))},
        "even": {"kernel": jax.random.normal(jax.random.key(1), (8, 4))},
    }
    result = pruning.prune(
        params,
        None,
        {"odd": 0.25, "even": 0.5},
        method="magnitude",
        structure=pruning.NM(2, 4),
        distribution=distribution,
    )
    assert [leaf.path for leaf in result.skipped] == ["odd/kernel"]
    assert result.sparsity == 0.5
    np.testing.assert_array_equal(result.params["odd"]["kernel"], params["odd"]["kernel"])
