"""Lanczos, eigenpairs, density and trace against exact dense spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import spectrum
from curvax.spectrum._lanczos import lanczos_together

from . import problems
from .problems import loss_fn, ravel

KEY = jax.random.key(0)
every_seed = pytest.mark.parametrize("seed", range(3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def hessian(seed=0, hidden=8):
    one = problems.problem(seed, hidden)
    operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
    return operator, problems.dense_hessian(one)


def diagonal(entries):
    entries = jnp.asarray(entries, float)
    return spectrum.Operator(lambda v: entries * v, jnp.zeros(len(entries)))


def exact_end(entries, k, which):
    descending = np.sort(entries)[::-1]
    ends = {
        "largest": descending[:k],
        "smallest": descending[::-1][:k],
        "both": np.r_[descending[: k - k // 2], descending[len(entries) - k // 2 :]],
        "magnitude": entries[np.argsort(-np.abs(entries))][:k],
    }
    return ends[which]


class TestLanczos:
    @pytest.mark.parametrize("reorthogonalize", ["full", "selective"])
    @every_seed
    def test_of_full_order_it_has_all_eigenvalues(self, seed, reorthogonalize):
        operator, matrix = hessian(seed)
        start = operator.random_vector(KEY)
        result = spectrum.lanczos(operator, start, 10**6, reorthogonalize=reorthogonalize)
        values = np.linalg.eigvalsh(matrix)
        found = result.eigh()[0]
        # Each distinct eigenvalue once, none that is not there.
        distances = np.abs(found[:, np.newaxis] - values)
        assert distances.min(axis=1).max() < 1e-10
        assert distances.min(axis=0).max() < 1e-8

    def test_its_moments_are_those_of_the_start_vector(self):
        operator, matrix = hessian()
        start = operator.random_vector(KEY)
        values, vectors = spectrum.lanczos(operator, start, 5).eigh()
        v = ravel(start) / np.linalg.norm(ravel(start))
        for power in range(10):
            exact = v @ np.linalg.matrix_power(matrix, power) @ v
            np.testing.assert_allclose(vectors[0] ** 2 @ values**power, exact, atol=1e-12)

    def test_without_reorthogonalization_it_has_the_same_start(self):
        operator, _ = hessian()
        start = operator.random_vector(KEY)
        one, other = (
            spectrum.lanczos(operator, start, 6, reorthogonalize=kind) for kind in ("full", "none")
        )
        np.testing.assert_allclose(one.diagonal, other.diagonal, atol=1e-10)
        np.testing.assert_allclose(one.off_diagonal, other.off_diagonal, atol=1e-10)

    def test_it_ends_where_the_space_is_exhausted(self):
        operator = diagonal([1.0, 1.0, 3.0, 3.0, 3.0])
        result = spectrum.lanczos(operator, jnp.arange(1.0, 6.0), 5)
        assert result.residual == 0
        np.testing.assert_allclose(result.eigh()[0], [1.0, 3.0], atol=1e-12)

    def test_more_steps_than_rows_are_not_made(self):
        result = spectrum.lanczos(diagonal([1.0, 2.0]), jnp.ones(2), 50)
        assert result.num_matvecs == 2

    def test_a_zero_operator_has_the_eigenvalue_zero(self):
        result = spectrum.lanczos(diagonal(np.zeros(4)), jnp.ones(4), 3)
        np.testing.assert_array_equal(result.diagonal, [0.0])

    def test_compilation_does_not_depend_on_the_order(self):
        count = 0

        def product(v):
            nonlocal count
            count += 1
            return jnp.arange(30.0) * v

        operator = spectrum.Operator(jax.jit(product), jnp.zeros(30))
        for order in (3, 12):
            spectrum.lanczos(operator, jnp.ones(30), order)
        assert count == 1

    def test_bad_input(self):
        operator = diagonal([1.0, 2.0])
        with pytest.raises(ValueError, match="finite positive length, got 0"):
            spectrum.lanczos(operator, jnp.zeros(2), 2)
        with pytest.raises(ValueError, match="finite positive length, got inf"):
            spectrum.lanczos(operator, jnp.full(2, jnp.inf), 2)
        with pytest.raises(ValueError, match="the start vector must match"):
            spectrum.lanczos(operator, jnp.ones(3), 2)
        with pytest.raises(ValueError, match="order must be"):
            spectrum.lanczos(operator, jnp.ones(2), 0)
        with pytest.raises(ValueError, match="reorthogonalize must be one of"):
            spectrum.lanczos(operator, jnp.ones(2), 2, reorthogonalize="partial")
        broken = spectrum.Operator(lambda v: v * jnp.nan, jnp.zeros(2))
        with pytest.raises(ValueError, match="not finite"):
            spectrum.lanczos(broken, jnp.ones(2), 2)


class TestEigenpairs:
    @every_seed
    @pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
    def test_values_and_vectors_are_the_dense_ones(self, which, seed):
        operator, matrix = hessian(seed)
        pairs = spectrum.top_eigenpairs(operator, 5, key=KEY, which=which, tolerance=1e-7)
        exact = np.linalg.eigvalsh(matrix)
        expected = {
            "largest": exact[::-1][:5],
            "smallest": exact[:5],
            "both": np.concatenate([exact[::-1][:3], exact[1::-1]]),
            "magnitude": exact[np.argsort(-np.abs(exact))[:5]],
        }[which]
        np.testing.assert_allclose(pairs.values, expected, atol=1e-8)
        assert pairs.converged.all()
        for index, value in enumerate(pairs.values):
            vector = ravel(jax.tree.map(lambda x, i=index: x[i], pairs.vectors))
            np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-10)
            residual = np.linalg.norm(matrix @ vector - value * vector)
            np.testing.assert_allclose(residual, pairs.residuals[index], atol=1e-9)

    def test_residuals_bound_the_errors_before_convergence(self):
        operator, matrix = hessian()
        pairs = spectrum.top_eigenpairs(operator, 3, key=KEY, tolerance=0.0, max_matvecs=9)
        exact = np.linalg.eigvalsh(matrix)
        assert pairs.num_matvecs == 9
        assert not pairs.converged.all()
        for value, residual in zip(pairs.values, pairs.residuals, strict=True):
            assert np.abs(exact - value).min() <= residual * (1 + 1e-9)

    def test_small_eigenvalues_are_as_accurate_as_large_ones(self):
        """Found with a tolerance relative to the largest, which let values of the bulk pass."""
        entries = np.concatenate([[10.0, 5.0], np.linspace(0.001, 0.1, 300)])
        pairs = spectrum.top_eigenpairs(diagonal(entries), 6, key=KEY, tolerance=1e-2)
        assert pairs.converged.all()
        np.testing.assert_allclose(pairs.values, np.sort(entries)[::-1][:6], rtol=2e-2)
        assert (pairs.residuals <= 1e-2 * pairs.values).all()

    def test_a_small_basis_restarts_and_finds_the_same(self):
        operator, matrix = hessian(hidden=20)
        pairs = spectrum.top_eigenpairs(operator, 3, key=KEY, basis_size=6, tolerance=1e-6)
        assert pairs.num_matvecs > 6
        np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(matrix)[::-1][:3], atol=1e-8)

    def test_multiple_eigenvalues_are_all_found(self):
        operator = diagonal([5.0, 5.0, 5.0, 1.0, 1.0, 0.0, -2.0])
        pairs = spectrum.top_eigenpairs(operator, 5, key=KEY, tolerance=1e-9)
        np.testing.assert_allclose(pairs.values, [5.0, 5.0, 5.0, 1.0, 1.0], atol=1e-10)
        flat = np.asarray(pairs.vectors)
        np.testing.assert_allclose(flat @ flat.T, np.eye(5), atol=1e-10)

    def test_copies_outside_of_an_exhausted_space_are_not_missed(self):
        """Three vectors span the space of a start; the copies of 7 lie outside of it."""
        operator = diagonal([7.0] * 50 + [1.0, 2.0])
        pairs = spectrum.top_eigenpairs(operator, 5, key=KEY)
        np.testing.assert_allclose(pairs.values, [7.0] * 5)

    def test_in_float32_a_large_operator_is_not_taken_for_exhausted(self):
        entries = jnp.linspace(0, 0.1, 10**6, dtype=jnp.float32).at[0].set(100)
        operator = spectrum.Operator(lambda v: entries * v, jnp.zeros(10**6, jnp.float32))
        result = spectrum.lanczos(operator, operator.random_vector(KEY), 16)
        assert result.num_matvecs == 16
        assert result.residual > 0
        pairs = spectrum.top_eigenpairs(operator, 2, key=KEY, tolerance=1e-2)
        np.testing.assert_allclose(pairs.values, [100, 0.1], rtol=1e-2)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_residuals_of_low_precision_params_are_true(self, dtype):
        one = problems.problem(dtype=dtype)
        operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        pairs = spectrum.top_eigenpairs(operator, 3, key=KEY, tolerance=1e-6)
        for index in range(3):
            vector = jax.tree.map(lambda leaf, i=index: leaf[i], pairs.vectors)
            error = ravel(operator(vector)) - pairs.values[index] * ravel(vector)
            assert np.linalg.norm(error) <= 2 * pairs.residuals[index]

    def test_a_product_that_is_not_finite_is_an_error_everywhere(self):
        operator = spectrum.Operator(lambda v: v / 0, jnp.zeros(3))
        for call in (
            lambda: spectrum.top_eigenpairs(operator, 1, key=KEY),
            lambda: spectrum.spectral_density(operator, key=KEY),
            lambda: spectrum.trace(operator, key=KEY),
            lambda: spectrum.trace(operator, key=KEY, method="hutch++"),
        ):
            with pytest.raises(ValueError, match="not finite"):
                call()

    def test_a_warm_start_takes_fewer_products_and_an_eigenvector_does_not_mislead(self):
        operator, _ = hessian()
        cold = spectrum.top_eigenpairs(operator, 2, key=KEY, tolerance=1e-6)
        warm = spectrum.top_eigenpairs(operator, 2, key=KEY, tolerance=1e-6, start=cold.vectors)
        assert warm.num_matvecs < cold.num_matvecs
        np.testing.assert_allclose(warm.values, cold.values, atol=1e-8)
        # Started from the eigenvector of a smaller eigenvalue, it still finds the largest.
        misled = diagonal([1.0, 2.0, 7.0])
        pairs = spectrum.top_eigenpairs(misled, 1, key=KEY, start=jnp.array([1.0, 0.0, 0.0]))
        np.testing.assert_allclose(pairs.values, [7.0])

    def test_a_zero_operator_has_zeros(self):
        pairs = spectrum.top_eigenpairs(diagonal(np.zeros(100)), 3, key=KEY)
        np.testing.assert_array_equal(pairs.values, np.zeros(3))
        assert pairs.converged.all()

    def test_in_float32_values_are_right_to_its_precision(self):
        one = problems.problem(dtype=jnp.float32)
        operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        exact = np.linalg.eigvalsh(problems.dense_hessian(problems.problem()))
        pairs = spectrum.top_eigenpairs(operator, 3, key=KEY)
        np.testing.assert_allclose(pairs.values, exact[::-1][:3], rtol=1e-5)

    @pytest.mark.parametrize("kind", ["Auto", "Explicit"])
    def test_sharded_vectors_give_the_same_values_and_stay_sharded(self, kind):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
        sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
        matrix = jax.random.normal(jax.random.key(1), (16, 16))
        inputs = jax.random.normal(jax.random.key(2), (20, 4))

        def loss(w, x):
            return jnp.mean(jnp.tanh(x @ w) ** 2)

        weights = matrix[:4]
        alone = spectrum.top_eigenpairs(
            spectrum.hessian_operator(loss, weights, [inputs]), 3, key=KEY
        )
        with jax.set_mesh(mesh):
            sharded = jax.device_put(weights, sharding)
            operator = spectrum.hessian_operator(loss, sharded, [inputs])
            assert operator(sharded).sharding.is_equivalent_to(sharding, 2)
            pairs = spectrum.top_eigenpairs(operator, 3, key=KEY)
            assert not pairs.vectors.sharding.is_fully_replicated
        np.testing.assert_allclose(pairs.values, alone.values, atol=1e-9)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": 3}, "at most the operator's 2 rows"),
            ({"k": 0}, "k must be"),
            ({"which": "top"}, "which must be one of"),
            ({"tolerance": -1.0}, "tolerance must be"),
            ({"max_matvecs": 0}, "max_matvecs must be"),
            ({"basis_size": 1}, "basis_size must be at least"),
            ({"start": jnp.zeros(2)}, "start must have a finite positive length"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            spectrum.top_eigenpairs(diagonal([1.0, 2.0]), **{"k": 1, "key": KEY, **options})


class TestDensity:
    @every_seed
    @pytest.mark.parametrize("order", [10, 40])
    def test_its_distance_to_the_exact_density_is_within_the_stated_error(self, order, seed):
        operator, matrix = hessian(seed, hidden=20)
        exact = np.linalg.eigvalsh(matrix)
        result = spectrum.spectral_density(
            operator, key=jax.random.key(seed), order=order, num_probes=10
        )
        distance = spectrum.wasserstein_distance(
            np.concatenate(result.nodes),
            np.concatenate(result.weights),
            exact,
            np.ones_like(exact),
        )
        assert distance <= result.wasserstein_error
        assert result.wasserstein_error < np.ptp(exact) / 4

    @pytest.mark.parametrize("reorthogonalize", ["full", "selective", "none"])
    @pytest.mark.parametrize("together", [2, 3, 10])
    def test_probes_taken_together_give_the_same(self, together, reorthogonalize):
        operator, _ = hessian()
        options = {"key": KEY, "num_probes": 5, "order": 7, "reorthogonalize": reorthogonalize}
        one = spectrum.spectral_density(operator, **options)
        several = spectrum.spectral_density(operator, probe_batch_size=together, **options)
        assert several.num_matvecs == one.num_matvecs == 35
        for name in ("nodes", "weights"):
            for a, b in zip(getattr(one, name), getattr(several, name), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-9)

    def test_probe_batch_size_go_on_after_one_has_ended(self):
        entries = jnp.array([1.0, 1.0, 2.0, 5.0])
        operator = spectrum.Operator(lambda v: entries * v, jnp.zeros(4))
        starts = [jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.ones(4)]
        short, long = lanczos_together(operator, starts, 4)
        np.testing.assert_allclose(short.eigh()[0], [1.0])
        np.testing.assert_allclose(long.eigh()[0], [1.0, 2.0, 5.0])

    def test_probes_of_a_batch_take_one_pass_over_the_data(self):
        one, passes = problems.problem(), []

        class Stream:
            def __iter__(self):
                passes.append(1)
                return iter(one.batches)

        operator = spectrum.hessian_operator(
            loss_fn, one.params, Stream(), check_deterministic=False
        )
        passes.clear()
        spectrum.spectral_density(operator, key=KEY, order=4, num_probes=6, probe_batch_size=3)
        assert len(passes) == 8

    def test_it_integrates_to_one_and_smooths_the_nodes(self):
        operator, _ = hessian()
        result = spectrum.spectral_density(operator, key=KEY, order=20, num_probes=4)
        step = result.grid[1] - result.grid[0]
        np.testing.assert_allclose(result.density.sum() * step, 1, atol=1e-3)
        np.testing.assert_allclose(
            result.smoothed(result.grid, result.bandwidth), result.density, rtol=1e-10
        )
        assert np.all(result.standard_error >= 0)

    def test_one_probe_has_no_error_bar_and_a_zero_operator_has_a_spike(self):
        single = spectrum.spectral_density(diagonal([1.0, 2.0]), key=KEY, num_probes=1)
        assert np.all(np.isnan(single.standard_error))
        assert np.isinf(single.wasserstein_error)
        zero = spectrum.spectral_density(diagonal(np.zeros(5)), key=KEY, num_probes=2)
        assert np.all(np.concatenate(zero.nodes) == 0)
        assert np.all(np.isfinite(zero.density))

    def test_the_distance_of_two_points_is_their_distance(self):
        one = np.ones(1)
        assert spectrum.wasserstein_distance(np.array([1.0]), one, np.array([3.5]), one) == 2.5

    @pytest.mark.parametrize(
        "options",
        [
            {"order": 0},
            {"num_probes": 0},
            {"bandwidth": 0.0},
            {"grid_size": 0},
            {"probe_batch_size": 0},
        ],
    )
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            spectrum.spectral_density(diagonal([1.0, 2.0]), key=KEY, **options)


class TestTrace:
    @pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
    def test_it_is_within_four_standard_errors_over_twenty_seeds(self, method):
        operator, matrix = hessian(hidden=20)
        exact = np.trace(matrix)
        for seed in range(20):
            result = spectrum.trace(
                operator, key=jax.random.key(seed), num_probes=12, method=method
            )
            assert abs(result.value - exact) <= 4 * result.standard_error

    def test_hutch_plus_plus_is_better_at_equal_products_where_few_eigenvalues_dominate(self):
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.standard_normal((60, 60)))
        values = np.concatenate([[50, 30, 20], rng.uniform(0, 0.1, 57)])
        matrix = jnp.asarray(basis * values @ basis.T)
        operator = spectrum.Operator(lambda v: matrix @ v, jnp.zeros(60))

        def error(method, num_probes):
            results = [
                spectrum.trace(
                    operator, key=jax.random.key(seed), num_probes=num_probes, method=method
                )
                for seed in range(10)
            ]
            return np.sqrt(np.mean([(one.value - values.sum()) ** 2 for one in results]))

        assert error("hutch++", 8) < error("hutchinson", 24) / 10

    def test_of_a_small_matrix_hutch_plus_plus_is_exact(self):
        result = spectrum.trace(diagonal([1.0, 2.0, 4.0]), key=KEY, method="hutch++")
        np.testing.assert_allclose(result.value, 7.0)
        assert result.standard_error == 0

    @pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
    def test_probes_taken_together_give_the_same(self, method):
        operator, _ = hessian()
        options = {"key": KEY, "num_probes": 7, "method": method}
        one = spectrum.trace(operator, **options)
        several = spectrum.trace(operator, probe_batch_size=3, **options)
        np.testing.assert_allclose(several.samples, one.samples, rtol=1e-9, atol=1e-12)
        assert several.num_matvecs == one.num_matvecs

    @pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
    def test_of_a_zero_operator_it_is_zero(self, method):
        result = spectrum.trace(diagonal([0.0] * 9), key=KEY, num_probes=3, method=method)
        assert result.value == result.standard_error == 0

    def test_a_single_probe_has_no_standard_error(self):
        assert np.isnan(spectrum.trace(diagonal([1.0, 2.0]), key=KEY, num_probes=1).standard_error)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="method must be one of"):
            spectrum.trace(diagonal([1.0]), key=KEY, method="xtrace")
        with pytest.raises(ValueError, match="num_probes must be"):
            spectrum.trace(diagonal([1.0]), key=KEY, num_probes=0)


class TestFloat32:
    @pytest.fixture(autouse=True)
    def float32(self, float64):
        with jax.enable_x64(False):
            yield

    @pytest.mark.parametrize("seed", range(6))
    def test_all_copies_of_few_distinct_eigenvalues_are_found(self, seed):
        rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))
        matrix = jnp.asarray(rotation * np.r_[[4.0] * 3, 3.0, [0.0] * 296] @ rotation.T, "float32")
        operator = spectrum.Operator(lambda v: matrix @ v, jnp.zeros(300))
        pairs = spectrum.top_eigenpairs(operator, 3, key=jax.random.key(seed))
        np.testing.assert_allclose(pairs.values, [4.0, 4.0, 4.0], atol=1e-4)

    def test_a_leaf_without_entries_takes_no_part(self):
        like = {"weights": jnp.zeros(3), "empty": jnp.zeros((0, 2))}
        entries = jnp.array([1.0, 2.0, 5.0])
        operator = spectrum.Operator(
            lambda v: {"weights": entries * v["weights"], "empty": v["empty"]}, like
        )
        pairs = spectrum.top_eigenpairs(operator, 2, key=KEY, basis_size=3)
        np.testing.assert_allclose(pairs.values, [5.0, 2.0], rtol=1e-5)
        assert pairs.vectors["empty"].shape == (2, 0, 2)

    def test_more_pairs_than_products_are_refused(self):
        operator = spectrum.Operator(lambda v: v, jnp.zeros(5))
        with pytest.raises(ValueError, match="at least 3 products, got max_matvecs=2"):
            spectrum.top_eigenpairs(operator, 3, key=KEY, max_matvecs=2)

    def test_no_copy_of_few_distinct_eigenvalues_is_missed(self):
        """Operators of 24 entries with up to five distinct values, at every end."""
        rng = np.random.default_rng(0)
        product = jax.jit(jnp.multiply)
        for index in range(20):
            distinct = rng.integers(-6, 7, size=rng.integers(1, 6))
            entries = rng.choice(distinct, size=24).astype(float)
            factors = jnp.asarray(entries, jnp.float32)
            operator = spectrum.Operator(lambda v, f=factors: product(f, v), jnp.zeros(24))
            for which in ("largest", "smallest", "both", "magnitude"):
                pairs = spectrum.top_eigenpairs(operator, 5, key=jax.random.key(index), which=which)
                signs = np.abs if which == "magnitude" else np.asarray  # 5 and -5 are level there
                exact = exact_end(entries, 5, which)
                assert pairs.converged.all()
                np.testing.assert_allclose(signs(pairs.values), signs(exact), atol=1e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_double_eigenvalue_above_a_bulk_is_found_twice(self, seed):
        rng = np.random.default_rng(seed)
        entries = np.r_[[9.0, 8.0, 8.0, 7.0, 7.0, 7.0, 6.0], np.abs(rng.normal(size=2000)) / 2]
        factors = jnp.asarray(entries, jnp.float32)
        operator = spectrum.Operator(lambda v: factors * v, jnp.zeros(len(entries)))
        pairs = spectrum.top_eigenpairs(operator, 5, key=jax.random.key(seed))
        assert pairs.converged.all()
        np.testing.assert_allclose(pairs.values, entries[:5], rtol=1e-4)

    def test_pairs_that_were_not_verified_are_not_converged(self):
        factors = jnp.arange(1.0, 101.0).at[0].set(1000)
        operator = spectrum.Operator(lambda v: factors * v, jnp.zeros(100))
        pairs = spectrum.top_eigenpairs(operator, 1, key=KEY, max_matvecs=5)
        assert pairs.num_matvecs == 5
        np.testing.assert_allclose(pairs.values, [1000.0], rtol=1e-4)
        assert not pairs.converged.any()
        assert spectrum.top_eigenpairs(operator, 1, key=KEY).converged.all()

    @pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
    def test_the_scale_of_an_operator_makes_no_difference(self, scale):
        rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
        matrix = rotation * np.r_[np.linspace(-1, 1, 38), 3.0, 5.0] @ rotation.T

        def results(scale):
            entries = jnp.asarray(matrix * scale, jnp.float32)
            operator = spectrum.Operator(lambda v: entries @ v, jnp.zeros(40))
            pairs = spectrum.top_eigenpairs(operator, 2, key=KEY)
            density = spectrum.spectral_density(operator, key=KEY, order=6, num_probes=2)
            tridiagonal = spectrum.lanczos(operator, jnp.full(40, scale), 4)
            assert pairs.converged.all()
            return [
                pairs.values / scale,
                tridiagonal.diagonal / scale,
                tridiagonal.residual / scale,
                density.grid / scale,
                density.density * scale,
                density.wasserstein_error / scale,
                *(
                    spectrum.trace(operator, key=KEY, num_probes=4, method=method).value / scale
                    for method in ("hutchinson", "hutch++")
                ),
            ]

        for scaled, plain in zip(results(scale), results(1.0), strict=True):
            np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-4)
