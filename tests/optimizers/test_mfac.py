"""The dynamic rule of M-FAC against dense inverses of the Fisher matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest

NUM_GRADS, SIZE, DAMPING = 5, 8, 0.02


def stream(seed, steps, size=SIZE):
    return np.random.default_rng(seed).standard_normal((steps, size))


def dense_fisher(grads, damping=DAMPING, normalizer=NUM_GRADS):
    grads = np.asarray(grads, np.float64)
    return damping * np.eye(grads.shape[1]) + grads.T @ grads / normalizer


def run(tx, grads):
    """The update of each step and the last state, in the dtype of ``grads``."""
    update = jax.jit(tx.update)
    state = tx.init(jnp.asarray(grads[0]))
    history = []
    for gradient in grads:
        updates, state = update(jnp.asarray(gradient), state)
        history.append(np.asarray(updates))
    return history, state


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("density", [None, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_each_update_solves_with_the_fisher_of_the_last_gradients(x64, seed, density):
    grads = stream(seed, 3 * NUM_GRADS)  # part-filled, filled, wrapped around
    history, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING, density=density), grads)
    for t, updates in enumerate(history):
        window = grads[max(0, t + 1 - NUM_GRADS) : t + 1]
        expected = np.linalg.solve(dense_fisher(window), grads[t])
        np.testing.assert_allclose(updates, expected, rtol=1e-9, atol=1e-12)


def test_the_first_step_is_the_gradient_over_damping_and_its_square(x64):
    (gradient,) = stream(0, 1)
    (updates,), _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), [gradient])
    expected = gradient / (DAMPING + gradient @ gradient / NUM_GRADS)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_filled_scaling_divides_by_the_gradients_there_are(x64):
    grads = stream(1, 2 * NUM_GRADS)
    history, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING, window_scaling="filled"), grads)
    for t, updates in enumerate(history):
        number = min(t + 1, NUM_GRADS)
        fisher = dense_fisher(grads[t + 1 - number : t + 1], normalizer=number)
        np.testing.assert_allclose(updates, np.linalg.solve(fisher, grads[t]), rtol=1e-9)


def test_relative_scaling_is_in_units_of_the_mean_square_of_the_gradients_there_are(x64):
    grads = stream(1, 2 * NUM_GRADS)
    history, state = run(curvax.scale_by_mfac(NUM_GRADS, 0.3, window_scaling="relative"), grads)
    for t, updates in enumerate(history):
        window = grads[max(0, t + 1 - NUM_GRADS) : t + 1]
        square = np.mean(np.sum(window**2, axis=1))
        fisher = dense_fisher(window, 0.3 * square / len(window), normalizer=len(window))
        expected = np.sqrt(square) / len(window) * np.linalg.solve(fisher, grads[t])
        np.testing.assert_allclose(updates, expected, rtol=1e-9)
    np.testing.assert_allclose(state.damping, 0.3 * square / NUM_GRADS)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_relative_scaling_does_not_see_the_scale_of_the_loss(scale):
    grads = stream(2, 3 * NUM_GRADS).astype(np.float32)
    tx = curvax.scale_by_mfac(NUM_GRADS, 0.1, window_scaling="relative")
    expected, _ = run(tx, grads)
    history, _ = run(tx, np.float32(scale) * grads)
    np.testing.assert_allclose(history, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_grads", [1, 4, 16])
def test_relative_scaling_of_unrelated_gradients_is_their_direction(num_grads):
    grads = 3 * np.eye(16)
    tx = curvax.scale_by_mfac(num_grads, 0.25, window_scaling="relative")
    history, _ = run(tx, grads.astype(np.float32))
    np.testing.assert_allclose(history, np.eye(16) / 1.25, rtol=1e-6, atol=1e-6)


def test_relative_scaling_of_zero_gradients_is_zero():
    (updates,), state = run(
        curvax.scale_by_mfac(NUM_GRADS, window_scaling="relative"), np.zeros((1, SIZE))
    )
    assert not updates.any()
    assert state.failures == 0


def test_inserting_first_only_scales_what_the_other_gradients_give(x64):
    # F^-1 g = A^-1 g / (1 + g A^-1 g / m), where A leaves g out: so g u < m.
    grads = stream(2, NUM_GRADS)
    history, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads)
    others = np.linalg.solve(dense_fisher(grads[:-1]), grads[-1])
    expected = others / (1 + grads[-1] @ others / NUM_GRADS)
    np.testing.assert_allclose(history[-1], expected, rtol=1e-9)
    assert grads[-1] @ history[-1] < NUM_GRADS


def test_the_order_of_slots_does_not_matter(x64):
    grads = stream(3, 2 * NUM_GRADS + 1)
    full, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads)
    rolled, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads[-NUM_GRADS:])
    np.testing.assert_allclose(rolled[-1], full[-1], rtol=1e-9)


def test_a_tree_is_preconditioned_as_one_vector(x64):
    grads = stream(4, NUM_GRADS)

    def tree(vector):
        return {"a": vector[:6].reshape(2, 3), "b": (vector[6], vector[7:])}

    tx = curvax.scale_by_mfac(NUM_GRADS, DAMPING)
    history, _ = run(tx, grads)
    state, update = tx.init(tree(jnp.asarray(grads[0]))), jax.jit(tx.update)
    for gradient, expected in zip(grads, history, strict=True):
        updates, state = update(tree(jnp.asarray(gradient)), state)
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        np.testing.assert_allclose(flat, expected, rtol=1e-9)


def test_a_damping_schedule_changes_the_diagonal_alone(x64):
    grads = stream(5, 2 * NUM_GRADS)

    def damping(count):
        return 0.1 / (1 + count)

    history, state = run(curvax.scale_by_mfac(NUM_GRADS, damping), grads)
    for t, updates in enumerate(history):
        fisher = dense_fisher(grads[max(0, t + 1 - NUM_GRADS) : t + 1], damping=damping(t))
        np.testing.assert_allclose(updates, np.linalg.solve(fisher, grads[t]), rtol=1e-8)
    assert state.damping == pytest.approx(damping(len(grads) - 1))
    assert state.damping.dtype == state.gram.dtype


def test_momentum_averages_what_the_inverse_gives(x64):
    grads = stream(6, 2 * NUM_GRADS)
    plain, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads)
    history, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING, momentum=0.7), grads)
    mean = np.zeros(SIZE)
    for updates, preconditioned in zip(history, plain, strict=True):
        mean = 0.7 * mean + 0.3 * preconditioned
        np.testing.assert_allclose(updates, mean, rtol=1e-9)


def test_the_norm_of_an_update_is_bounded_and_its_direction_kept(x64):
    grads = stream(7, 2 * NUM_GRADS)
    free, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads)
    bound = float(np.median([np.linalg.norm(updates) for updates in free]))
    bounded, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING, max_update_norm=bound), grads)
    for updates, expected in zip(bounded, free, strict=True):
        factor = min(1.0, bound / np.linalg.norm(expected))
        np.testing.assert_allclose(updates, factor * expected, rtol=1e-9)


def test_decoupled_decay_is_outside_the_window(x64):
    params, gradient = jnp.asarray(stream(8, 1)[0]), jnp.asarray(stream(9, 1)[0])
    plain = curvax.mfac(0.1, NUM_GRADS, DAMPING)
    decayed = curvax.mfac(0.1, NUM_GRADS, DAMPING, weight_decay=0.5)
    expected, state = plain.update(gradient, plain.init(params), params)
    updates, decayed_state = decayed.update(gradient, decayed.init(params), params)
    np.testing.assert_allclose(updates, expected - 0.05 * params, rtol=1e-12)
    np.testing.assert_array_equal(decayed_state[0].gram, state[0].gram)


def test_sparse_updates_are_dense_updates_of_what_the_rows_keep(x64):
    size, num_grads = 600, 4
    grads = stream(10, 10, size)
    tx = curvax.scale_by_mfac(num_grads, DAMPING, density=0.05)
    history, _ = run(tx, grads)
    feedback, kept = np.zeros(size), []
    state, update = tx.init(jnp.asarray(grads[0])), jax.jit(tx.update)
    for t, gradient in enumerate(grads):
        entering = gradient + feedback
        _, state = update(jnp.asarray(gradient), state)
        feedback = np.asarray(state.feedback)
        kept.append(entering - feedback)
        assert np.count_nonzero(kept[-1]) <= 0.05 * size
        fisher = dense_fisher(kept[-num_grads:], normalizer=num_grads)
        np.testing.assert_allclose(history[t], np.linalg.solve(fisher, kept[-1]), rtol=1e-8)
    # Error feedback: what entered and what waits is what came.
    np.testing.assert_allclose(np.sum(kept, axis=0) + feedback, grads.sum(axis=0), atol=1e-12)


def published_difference(grads, damping):
    """The published form, (g - G^T c) / damping, in the dtype of ``grads``."""
    m = len(grads)
    kernel = grads @ grads.T + np.eye(m, dtype=grads.dtype) * grads.dtype.type(m * damping)
    coefficients = np.linalg.solve(kernel, grads @ grads[-1])
    return (grads[-1] - grads.T @ coefficients) / grads.dtype.type(damping)


@pytest.mark.parametrize("damping", [1e-6, 1e-7])
@pytest.mark.parametrize("seed", range(3))
def test_in_float32_it_keeps_the_digits_that_the_published_difference_cancels(seed, damping):
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((64, 3000)) / np.sqrt(3000)
    mean = generator.standard_normal(3000) / np.sqrt(3000)
    grads = (mean + noise).astype(np.float32)
    exact = published_difference(grads.astype(np.float64), damping)

    def error(updates):
        return np.linalg.norm(updates - exact) / np.linalg.norm(exact)

    history, state = run(curvax.scale_by_mfac(64, damping), grads)
    assert error(history[-1]) < 2e-5
    assert error(published_difference(grads, damping)) > 200 * error(history[-1])
    assert state.failures == 0


def test_a_run_that_converges_exactly_stays_finite_in_float32():
    # A parabola sends gradients of one direction that shrink to nothing: K is singular to
    # working precision.
    tx = curvax.mfac(1e-5, num_grads=32, damping=1e-5)

    def loss(params):
        return jnp.sum((params - jnp.array([1.0, -1.0, 1.0])) ** 2)

    @jax.jit
    def steps(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), loss(params)

        return jax.lax.scan(step, (params, state), length=2000)

    params = jnp.array([-1.0, 10.0, 1.0])
    (params, state), losses = steps(params, tx.init(params))
    assert bool(jnp.all(jnp.isfinite(losses)))
    assert losses[-1] < losses[0]
    assert 0 < state[0].failures < 2000
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("damping", [1e-3, 1e-7])
@pytest.mark.parametrize("options", [{}, {"density": 0.5}, {"momentum": 0.5}], ids=str)
def test_no_update_is_longer_than_its_bound_where_rows_cancel(noise, damping, options):
    generator = np.random.default_rng(0)
    grads = generator.standard_normal(20) + noise * generator.standard_normal((40, 20))
    tx = curvax.scale_by_mfac(16, damping, max_update_norm=0.5, **options)
    history, _ = run(tx, grads.astype(np.float32))
    lengths = np.linalg.norm(np.asarray(history, np.float64), axis=1)
    assert lengths.max() <= 0.5 * (1 + 1e-6)
    assert lengths.max() > 0.2


def test_in_bfloat16_the_bound_holds_up_to_its_rounding():
    grads = jnp.asarray(stream(0, 8, 300), jnp.bfloat16)
    history, _ = run(curvax.scale_by_mfac(4, 1e-5, max_update_norm=0.5), grads)
    assert np.linalg.norm(np.asarray(history, np.float64), axis=1).max() <= 0.5 * (1 + 2**-8)


@pytest.mark.parametrize("bound", [None, 1e-3])
@pytest.mark.parametrize("options", [{}, {"window_dtype": "bfloat16"}, {"density": 1.0}], ids=str)
def test_a_gradient_whose_squares_vanish_is_divided_by_the_damping(options, bound):
    tx = curvax.scale_by_mfac(4, 1e-3, max_update_norm=bound, **options)
    gradient = jnp.full(3, 1e-24)
    history, _ = run(tx, [gradient] * 6)
    np.testing.assert_allclose(history[-1] / (gradient / 1e-3), 1, rtol=0.01)


@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e10, 1e15])
def test_gradients_and_damping_of_any_scale(scale):
    # F scales with the square of the gradients, so that an update scales with their inverse.
    grads = stream(0, 8).astype(np.float32)
    plain, _ = run(curvax.scale_by_mfac(NUM_GRADS, DAMPING), grads)
    scaled, state = run(
        curvax.scale_by_mfac(NUM_GRADS, DAMPING * scale**2), grads * np.float32(scale)
    )
    np.testing.assert_allclose(np.asarray(scaled[-1]) * scale, plain[-1], rtol=1e-3)
    assert state.failures == 0
