"""The numbers that explain the training tables: against matrices whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import curvature
from training.curvature import SAMPLES, Moments
from training.tasks.task import Task, Variables, warmup_cosine

import curvax


def test_the_signal_is_the_squared_mean_over_the_mean_square():
    generator = np.random.default_rng(0)
    samples = generator.normal([3.0, 0.0, 1.0], [1.0, 1.0, 0.0], size=(200, SAMPLES, 3))
    signals = [Moments.of({"a": x[:1], "b": x[1:]} for x in draw).signal() for draw in samples]
    assert np.mean(signals) == pytest.approx(10 / 12, rel=0.01)


def test_the_signal_of_pure_noise_is_about_zero():
    samples = np.random.default_rng(0).normal(size=(SAMPLES, 10_000))
    assert Moments.of(iter(samples)).signal() == pytest.approx(0, abs=1e-3)


def test_moments_count_what_is_not_zero():
    samples = np.zeros((SAMPLES, 2))
    samples[:3, 0] = 1.0
    np.testing.assert_array_equal(Moments.of(iter(samples)).nonzero, [3, 0])


def test_denominators_that_differ_by_a_factor_for_each_leaf_are_correlated():
    leaves = [np.random.default_rng(0).exponential(size=shape) for shape in ((2, 2), (6,))]
    numbers = curvature._comparison([4.0 * leaves[0], leaves[1]], leaves)
    assert numbers["correlation"] == pytest.approx(1)
    assert numbers["leaf_factor"] == pytest.approx(np.sqrt(2))  # lengths 2 and 1 about their mean


def test_entries_without_curvature_are_left_out_of_the_comparison():
    numbers = curvature._comparison([np.array([1.0, 2.0, 3.0, 9.0])], [np.array([1.0, 2, 3, 0])])
    assert numbers["correlation"] == pytest.approx(1)


def test_denominators_are_those_of_the_two_optimizers():
    """Adam's square gradients; AdaHessian's average curvature over the spatial axes of a kernel."""
    params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 2, 4))}}
    generator = np.random.default_rng(0)
    channels = generator.exponential(size=(1, 1, 2, 4))
    noise = generator.exponential(size=(3, 3, 2, 4))
    diag = channels * noise / noise.mean(axis=(0, 1))
    tree = lambda leaf: {"Conv_0": {"kernel": jnp.broadcast_to(leaf, (3, 3, 2, 4))}}  # noqa: E731
    passes = [(tree(jnp.asarray(channels)), tree(jnp.asarray(diag)))] * 3
    assert curvature._denominators(params, passes)["correlation"] == pytest.approx(1, abs=1e-5)


def test_the_effective_rank_counts_directions():
    assert curvature._effective_rank(np.eye(5)) == pytest.approx(5)
    assert curvature._effective_rank(np.ones((5, 5))) == pytest.approx(1)


def quadratic_task(matrix):
    """Half the squared length of ``params @ matrix``, the same in every batch."""

    def apply(params, inputs, statistics, noise_key):
        del noise_key
        return inputs * (params @ matrix), statistics

    return Task(
        name="quadratic",
        words="",
        metric="loss",
        data=(jnp.ones((8, 1)), jnp.zeros((8, matrix.shape[1]))),
        num_examples=8,
        batch_size=4,
        steps=10,
        evaluations=10,
        init=lambda _: Variables(jnp.ones(len(matrix)), {}),
        apply=apply,
        loss=curvax.squared_error,
        sample=lambda data, indices, _: jax.tree.map(lambda leaf: leaf[indices], data),
        evaluate=lambda variables, split: {},
        schedule=warmup_cosine,
    )


def test_the_numbers_of_a_quadratic_are_those_of_its_matrix():
    factor = jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 3.0]])
    task = quadratic_task(factor)
    numbers = curvature.measure(task, Variables(jnp.ones(3), {}))
    hessian = jax.hessian(lambda p: curvax.squared_error.value(p @ factor, jnp.zeros(2)))(
        jnp.ones(3)
    )
    expected = jnp.sum(jnp.diag(hessian) ** 2) / jnp.sum(hessian**2)
    assert numbers["probe_signal"] == pytest.approx(float(expected), rel=0.15)
    assert numbers["gradient_signal"] == pytest.approx(1, rel=1e-5)
    assert numbers["directions"] == pytest.approx(1, rel=1e-5)
    assert numbers["zeros"] == 0
    assert numbers["negative"] == pytest.approx(0, abs=1e-5)


def test_the_negative_part_is_of_the_absolute_eigenvalues():
    signs = jnp.tile(jnp.array([3.0, -1.0]), 200)

    def loss_fn(params, inputs, targets):
        del inputs, targets
        return jnp.sum(signs * params**2)

    numbers = curvature._spectrum(loss_fn, jnp.ones(400), [(jnp.ones(1), jnp.ones(1))])
    assert numbers["negative"] == pytest.approx(1 / 4, abs=0.05)
    assert numbers["lowest"] == pytest.approx(-1 / 3)


def test_snapshots_are_those_of_the_run():
    points = curvature.snapshots(quadratic_task(jnp.eye(2)), rate=0.3)
    lengths = [float(jnp.linalg.norm(point.params)) for point in points.values()]
    assert list(points) == ["tenth", "half", "whole"]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


def test_the_table_has_a_row_for_each_point():
    numbers = dict.fromkeys(curvature.COLUMNS, 0.5)
    text = curvature.table({"tasks": {"a": {"tenth": numbers, "whole": numbers}}})
    assert text.count("\n") == 3
    assert "| a | whole | 0.5 |" in text
