"""The tracker of sharpness, learning rates from spectra, batch sizes, the tangent kernel, plots."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax import spectrum

from . import problems
from .problems import loss_fn, network, ravel


def largest(params, one):
    return np.linalg.eigvalsh(
        problems.dense(lambda p: loss_fn(p, one.inputs, one.targets), params)
    )[-1]


class TestTracker:
    @pytest.mark.parametrize("update_interval", [1, 3])
    def test_it_follows_the_largest_eigenvalue_and_hands_updates_on(self, update_interval):
        one = problems.problem(dtype=jnp.float32)
        plain = optax.sgd(0.1)
        tx = optax.chain(spectrum.track_sharpness(0.1, update_interval=update_interval), plain)
        params, state = one.params, tx.init(one.params)

        def loss(p):
            return loss_fn(p, one.inputs, one.targets)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
            return updates, optax.apply_updates(params, updates), state

        for count in range(31):
            before = params
            updates, params, state = step(params, state)
            if count % update_interval == 0:
                measured = before
        expected, _ = plain.update(jax.grad(loss)(before), plain.init(before))
        np.testing.assert_allclose(ravel(updates), ravel(expected), rtol=1e-5, atol=1e-7)
        exact = largest(measured, one)
        sharpness = optax.tree.get(state, "sharpness")
        np.testing.assert_allclose(sharpness, exact, rtol=1e-3)
        np.testing.assert_allclose(
            optax.tree.get(state, "sharpness_times_lr"), 0.1 * sharpness, rtol=1e-6
        )
        assert np.isfinite(optax.tree.get(state, "hessian_trace"))

    @pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e30])
    def test_the_scale_of_the_loss_makes_no_difference(self, scale):
        matrix = jnp.asarray(np.diag([5.0, 3.0, -4.0]) + 0.5, jnp.float32) * scale
        tx = spectrum.track_sharpness(0.1, num_matvecs=4)
        params = jnp.zeros(3)
        _, state = tx.update(params, tx.init(params), params, obj_fn=lambda x: x @ matrix @ x / 2)
        exact = np.linalg.eigvalsh(np.asarray(matrix, np.float64))[-1]
        np.testing.assert_allclose(state.sharpness, exact, rtol=1e-5)

    def test_an_exhausted_space_gives_the_exact_value(self):
        def loss(x):
            return jnp.sum(jnp.array([3.0, -1.0]) * x**2) / 2

        tx = spectrum.track_sharpness(lambda count: 0.5 / (1 + count), num_matvecs=6)
        params = jnp.ones(2)
        _, state = tx.update(params, tx.init(params), params, obj_fn=loss)
        np.testing.assert_allclose(state.sharpness, 3.0, rtol=1e-5)
        np.testing.assert_allclose(state.hessian_trace, 2.0, rtol=1e-5)
        np.testing.assert_allclose(state.sharpness_times_lr, 1.5, rtol=1e-5)

    @pytest.mark.parametrize("diagonal", [[3.0, 1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, -2.0]])
    def test_a_converged_direction_stays_finite(self, diagonal):
        """The vector of an exhausted space was divided by its length of zero."""
        entries = jnp.array(diagonal)
        tx = spectrum.track_sharpness(0.1, num_matvecs=3)
        params, state = jnp.ones(2), tx.init(jnp.ones(2))
        for _ in range(6):
            _, state = tx.update(
                params, state, params, obj_fn=lambda x: jnp.sum(entries * x**2) / 2
            )
            assert np.isfinite(state.direction).all()
        np.testing.assert_allclose(state.sharpness, max(diagonal), rtol=1e-5, atol=1e-6)

    def test_integer_leaves_take_no_part_and_complex_ones_are_refused(self):
        tx = spectrum.track_sharpness(0.1, update_interval=2)
        params = {"w": jnp.ones(2), "n": jnp.int32(3)}

        def loss(p):
            return jnp.sum(jnp.array([3.0, 1.0]) * p["w"] ** 2) / 2

        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params, obj_fn=loss)
        np.testing.assert_allclose(state.sharpness, 3.0, rtol=1e-5)
        with pytest.raises(ValueError, match="needs real parameters"):
            tx.init(jnp.ones(2, jnp.complex64))

    def test_a_product_that_is_not_finite_shows_and_leaves_the_direction(self):
        tx = spectrum.track_sharpness(0.1)
        params = jnp.ones(3)
        state = tx.init(params)
        _, after = tx.update(params, state, params, obj_fn=lambda x: jnp.sum(x**2) * jnp.nan)
        assert np.isnan(after.sharpness)
        np.testing.assert_array_equal(after.direction, state.direction)
        _, again = tx.update(params, after, params, obj_fn=lambda x: jnp.sum(x**2))
        np.testing.assert_allclose(again.sharpness, 2.0, rtol=1e-5)

    def test_a_value_from_outside_is_kept_until_the_next(self):
        tx = spectrum.track_sharpness(0.25, from_outside=True)
        params = jnp.ones(2)
        state = tx.init(params)
        assert state.direction is None
        _, state = tx.update(params, state, params, sharpness=6.0)
        _, state = tx.update(params, state, params)
        assert (float(state.sharpness), float(state.sharpness_times_lr)) == (6.0, 1.5)

    def test_the_state_has_a_fixed_type_and_may_be_donated(self):
        def loss(x):
            return jnp.sum(x**4)

        tx = spectrum.track_sharpness(0.1, update_interval=2)
        params = jnp.ones(3)
        state = tx.init(params)
        step = jax.jit(lambda s: tx.update(params, s, params, obj_fn=loss)[1], donate_argnums=0)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        for _ in range(3):
            state = step(state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes

    def test_bad_input(self):
        tx, ones = spectrum.track_sharpness(0.1), jnp.ones(2)
        with pytest.raises(ValueError, match="needs params and the loss"):
            tx.update(ones, tx.init(ones), ones)
        for options in ({"update_interval": 0}, {"num_matvecs": 0}, {"trace_decay": 1.0}):
            with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
                spectrum.track_sharpness(0.1, **options)


class TestStepSizes:
    def test_they_are_the_best_on_a_quadratic(self):
        sizes = spectrum.step_sizes(10.0, 0.1)
        values = np.array([0.1, 1.0, 10.0])

        def rate(learning_rate, momentum=0.0):
            """The spectral radius of an iteration."""
            return max(
                np.abs(
                    np.linalg.eigvals([[1 + momentum - learning_rate * v, -momentum], [1, 0]])
                ).max()
                for v in values
            )

        assert rate(sizes.largest_stable) == pytest.approx(1)
        assert rate(1.01 * sizes.largest_stable) > 1
        best = rate(sizes.gradient_descent)
        assert all(best <= rate(f * sizes.gradient_descent) for f in (0.9, 0.99, 1.005))
        with_momentum = rate(sizes.heavy_ball, sizes.momentum)
        assert with_momentum < best
        assert with_momentum == pytest.approx(np.sqrt(sizes.momentum), rel=1e-4)

    def test_bad_input(self):
        for ends in ((0.0,), (-1.0,), (1.0, 2.0), (1.0, -0.1)):
            with pytest.raises(ValueError, match="must be a number in"):
                spectrum.step_sizes(*ends)


class TestBatchSizes:
    def test_ends_are_those_of_dense_hessians_and_small_batches_are_sharper(self):
        with jax.enable_x64(True):
            one = problems.problem()
            study = spectrum.batch_size_study(
                loss_fn,
                one.params,
                (one.inputs, one.targets),
                [4, 41],
                key=jax.random.key(0),
                num_draws=3,
                micro_batch_size=15,
                tolerance=1e-6,
            )
            exact = np.linalg.eigvalsh(problems.dense_hessian(one))
        np.testing.assert_allclose([study.full_smallest, study.full_largest], exact[[0, -1]])
        np.testing.assert_allclose(study.largest[1], exact[-1])
        np.testing.assert_allclose(study.smallest[1], exact[0])
        assert study.largest[0].mean() > exact[-1]
        assert study.smallest[0].mean() < exact[0]
        assert spectrum.plot_batch_sizes(study).get_xscale() == "log"

    def test_a_batch_larger_than_the_data_is_an_error(self):
        one = problems.problem(dtype=jnp.float32)
        with pytest.raises(ValueError, match="at most the 41 examples, got 42"):
            spectrum.batch_size_study(
                loss_fn, one.params, (one.inputs, one.targets), [42], key=jax.random.key(0)
            )


class TestTangentKernel:
    @pytest.mark.parametrize("micro_batch_size", [1, 5, 100])
    def test_the_gram_matrix_is_that_of_the_dense_jacobian(self, micro_batch_size):
        with jax.enable_x64(True):
            one = problems.problem()
            gram = spectrum.ntk_gram(
                network, one.params, one.inputs, micro_batch_size=micro_batch_size
            )
            jacobian = jax.jacobian(network)(one.params, one.inputs)
        J = np.concatenate([np.reshape(x, (41 * 4, -1)) for x in jax.tree.leaves(jacobian)], axis=1)
        np.testing.assert_allclose(gram, J @ J.T, atol=1e-12)

    def test_its_spectrum_is_the_gauss_newton_matrixs(self):
        with jax.enable_x64(True):
            one = problems.problem()
            kernel = spectrum.ntk_eigenpairs(network, one.params, one.inputs, 5)
            targets = jnp.zeros((41, 4))
            ggn = spectrum.ggn_operator(
                network, "squared_error", one.params, [(one.inputs, targets)]
            )
            pairs = spectrum.top_eigenpairs(ggn, 5, key=jax.random.key(0), tolerance=1e-8)
            np.testing.assert_allclose(kernel.values / 41, pairs.values, rtol=1e-9)
            for index in range(5):
                one_vector, other = (
                    ravel(jax.tree.map(lambda x, i=index: x[i], tree))
                    for tree in (kernel.parameter_vectors, pairs.vectors)
                )
                np.testing.assert_allclose(abs(one_vector @ other), 1, atol=1e-9)

    def test_bad_input(self):
        one = problems.problem(dtype=jnp.float32)
        with pytest.raises(ValueError, match=r"outputs of shape \(N, C\)"):
            spectrum.ntk_gram(lambda p, x: network(p, x).sum(), one.params, one.inputs)
        with pytest.raises(ValueError, match="inputs are empty"):
            spectrum.ntk_gram(network, one.params, one.inputs[:0])
        with pytest.raises(ValueError, match="at most the 164 outputs"):
            spectrum.ntk_eigenpairs(network, one.params, one.inputs, 165)
        with pytest.raises(ValueError, match="micro_batch_size must be"):
            spectrum.ntk_gram(network, one.params, one.inputs, micro_batch_size=0)


def test_plots_draw_on_given_axes_and_touch_nothing_global():
    from matplotlib.figure import Figure

    operator = spectrum.Operator(lambda v: jnp.arange(20.0) ** 2 * v, jnp.zeros(20))
    density = spectrum.spectral_density(operator, key=jax.random.key(0), num_probes=3)
    axes = Figure().subplots(1, 4)
    assert spectrum.plot_density(density, outliers=[361.0], ax=axes[0]) is axes[0]
    assert spectrum.plot_density(density, log_x=True, ax=axes[1]).get_xscale() == "symlog"
    assert spectrum.plot_sharpness([0, 1], [1.0, 2.0], [0.5, 0.4], ax=axes[2]) is axes[2]
    trace = spectrum.trace(operator, key=jax.random.key(0), num_probes=2)
    assert spectrum.plot_layer_traces(trace, ax=axes[3]) is axes[3]
    by_parts = spectrum.trace(operator, key=jax.random.key(0), num_probes=2, method="hutch++")
    with pytest.raises(ValueError, match='no values per leaf: use method="hutchinson"'):
        spectrum.plot_layer_traces(by_parts)


def test_hidden_parts_of_the_params_are_an_error_that_says_where_to_put_it():
    tx = optax.masked(spectrum.track_sharpness(0.1), {"a": True, "b": False})
    with pytest.raises(ValueError, match="put it in a chain outside them"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_params_without_entries_have_no_sharpness():
    with pytest.raises(ValueError, match="at least one entry, got none"):
        spectrum.track_sharpness(0.1).init({})
