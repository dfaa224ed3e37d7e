"""The damped Gram system: exact where it can be, safe where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher import solve_damped_gram

pytestmark = pytest.mark.oldest


def gram_of(rows):
    rows = np.asarray(rows, np.float64)
    return rows @ rows.T


def unit(size, index):
    return jnp.zeros(size).at[index].set(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_it_solves_the_damped_system(seed):
    rows = np.random.default_rng(seed).standard_normal((12, 40))
    rhs = np.random.default_rng(seed + 10).standard_normal(12)
    with jax.enable_x64(True):
        solution = solve_damped_gram(jnp.asarray(gram_of(rows)), 0.3, jnp.asarray(rhs))
    expected = np.linalg.solve(gram_of(rows) + 0.3 * np.eye(12), rhs)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-10)
    assert not solution.failed


def test_gradients_of_very_different_length_are_solved_to_full_precision():
    # The condition number is 1e16; scaled to a unit diagonal it is about 10.
    lengths = np.geomspace(1e4, 1e-4, 16)
    rows = np.random.default_rng(0).standard_normal((16, 200)) * lengths[:, np.newaxis]
    gram, shift = gram_of(rows), 1e-12
    solution = solve_damped_gram(jnp.asarray(gram, jnp.float32), shift, unit(16, 15))
    expected = np.linalg.solve(gram + shift * np.eye(16), np.eye(16)[15])
    assert not solution.failed
    scaled = np.abs(solution.x - expected) / np.abs(expected).max() * (lengths / lengths[-1])
    assert scaled.max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_window_of_one_direction_takes_the_second_try_and_stays_bounded(size, seed):
    row = np.random.default_rng(seed).standard_normal(50)
    gram = jnp.asarray(gram_of(np.tile(row, (size, 1))), jnp.float32)
    solution = solve_damped_gram(gram, 1e-12, unit(size, 7))
    assert solution.failed
    # The exact combination of equal gradients is one of them over their number times its square.
    # What rounding leaves of that differs from version to version; it must not be a longer step.
    length = float(jnp.sum(solution.x)) * (size * row @ row)
    assert 0.5 < length < 1.5


def test_a_right_hand_side_on_which_equal_gradients_cancel_is_solved():
    gram = jnp.asarray(gram_of(np.tile([[3.0, 4.0]], (4, 1))))
    rhs = jnp.array([1.0, -1.0, 0.0, 0.0])
    solution = solve_damped_gram(gram, 0.5, rhs)
    assert not solution.failed
    np.testing.assert_allclose(solution.x, rhs / 0.5, atol=1e-4)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_should_every_factorization_fail_each_gradient_stands_for_itself(damage):
    gram = jnp.eye(4).at[0, 1].set(damage).at[1, 0].set(damage)
    solution = solve_damped_gram(gram, 1.0, unit(4, 3))
    assert solution.failed
    np.testing.assert_allclose(solution.x, [0, 0, 0, 0.5])


def test_a_vector_orthogonal_to_the_window_gives_zeros():
    solution = solve_damped_gram(jnp.eye(3), 1.0, jnp.zeros(3))
    assert not solution.failed
    np.testing.assert_array_equal(solution.x, np.zeros(3))


def update_and_exact(noise, damping, seed, size=64):
    """The newest gradient times the inverse, from a float32 Gram matrix and exactly."""
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(1000) / np.sqrt(1000)
    rows = mean + noise * generator.standard_normal((size, 1000)) / np.sqrt(1000)
    gram, shift = gram_of(rows), size * damping
    solution = solve_damped_gram(jnp.asarray(gram, jnp.float32), shift, unit(size, size - 1))
    exact = np.linalg.solve(gram + shift * np.eye(size), np.eye(size)[-1])
    return rows.T @ np.asarray(solution.x, np.float64), rows.T @ exact, solution.failed


@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_differ_by_a_few_roundings_are_not_damped_more(seed):
    # With a residual as large as the right-hand side, and yet an update right to some percent.
    update, exact, failed = update_and_exact(noise=1e-3, damping=1e-7, seed=seed)
    assert not failed
    assert np.linalg.norm(update - exact) < 0.15 * np.linalg.norm(exact)


@pytest.mark.parametrize("seed", range(3))
def test_a_matrix_that_is_singular_to_rounding_is_damped_as_little_as_works(seed):
    # A damping that is safe for any matrix of this size, 16 m eps, leaves 1 % of the length.
    update, exact, _ = update_and_exact(noise=1e-3, damping=1e-8, seed=seed)
    assert 0.1 < np.linalg.norm(update) / np.linalg.norm(exact) < 1.5


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_gradients_makes_no_difference(scale):
    rows = np.random.default_rng(0).standard_normal((6, 20))
    gram, rhs = jnp.asarray(gram_of(rows), jnp.float32), jnp.arange(6.0)
    one = solve_damped_gram(gram, 0.1, rhs)
    other = solve_damped_gram(gram * scale**2, 0.1 * scale**2, rhs * scale)
    assert not other.failed
    np.testing.assert_allclose(other.x * scale, one.x, rtol=1e-4)
