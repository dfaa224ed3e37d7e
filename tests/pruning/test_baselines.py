"""The baselines, a given diagonal of the Fisher matrix, and damping relative to the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax import pruning

from . import problems

every_seed = pytest.mark.parametrize("seed", range(3))
loss_fn = problems.regression_loss

SIZE = 56


def lowest(scores, number):
    gone = np.zeros(len(scores), bool)
    gone[np.argsort(scores, kind="stable")[:number]] = True
    return gone


def pruned_weights(result):
    return problems.kernels(result.mask) == 0


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.mask, other.mask)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


class TestSaliency:
    @every_seed
    @pytest.mark.parametrize("sparsity", [0.3, 0.8])
    def test_the_lowest_of_weight_times_mean_gradient_go(self, sparsity, seed):
        params, rows = problems.params(seed), problems.grads(seed + 10)
        result = problems.prune(params, rows, sparsity, method="saliency")
        w = problems.kernels(params)
        gone = lowest(
            np.abs(w * problems.kernel_rows(rows).mean(axis=0)), int(sparsity * SIZE + 1e-6)
        )
        np.testing.assert_array_equal(pruned_weights(result), gone)
        np.testing.assert_array_equal(problems.kernels(result.params), np.where(gone, 0, w))

    def test_a_mean_gradient_of_zero_goes_first_however_large_its_squares(self):
        params = {"kernel": jnp.array([[5.0, 0.1]])}
        rows = {"kernel": jnp.array([[[9.0, 1.0]], [[-9.0, 1.0]]])}
        saliency = problems.prune(params, rows, 0.5, method="saliency")
        fisher = problems.prune(params, rows, 0.5, method="fisher")
        np.testing.assert_array_equal(saliency.mask["kernel"], [[False, True]])
        np.testing.assert_array_equal(fisher.mask["kernel"], [[True, False]])

    def test_it_needs_gradients(self):
        with pytest.raises(ValueError, match="method='saliency' with update=None needs grads"):
            problems.prune(problems.params(), None, 0.5, method="saliency")

    @every_seed
    def test_the_update_may_be_joint(self, seed):
        params, rows = problems.params(seed), problems.grads(seed + 10)
        alone = problems.prune(params, rows, 0.5, method="saliency", damping=1e-2)
        moved = problems.prune(params, rows, 0.5, method="saliency", update="joint", damping=1e-2)
        jax.tree.map(np.testing.assert_array_equal, alone.mask, moved.mask)
        fisher = problems.dense_fisher(problems.kernel_rows(rows), 1e-2)
        kept, w = ~pruned_weights(moved), problems.kernels(params)
        expected = np.where(kept, w, 0)
        expected[kept] += np.linalg.solve(
            fisher[np.ix_(kept, kept)], fisher[np.ix_(kept, ~kept)] @ w[~kept]
        )
        np.testing.assert_allclose(problems.kernels(moved.params), expected, atol=1e-3)


class TestRandom:
    @staticmethod
    def prune(sparsity=0.5, **options):
        return problems.prune(problems.params(), None, sparsity, method="random", **options)

    def test_a_key_gives_the_same_weights_again(self):
        assert_same(self.prune(key=jax.random.key(3)), self.prune(key=jax.random.key(3)))

    def test_an_integer_is_a_seed_and_a_raw_key_is_a_key(self):
        assert_same(self.prune(key=3), self.prune(key=jax.random.key(3)))
        assert_same(self.prune(key=jax.random.PRNGKey(3)), self.prune(key=jax.random.key(3)))

    def test_without_a_key_it_is_key_zero(self):
        assert_same(self.prune(), self.prune(key=0))

    def test_other_keys_give_other_weights(self):
        masks = {pruned_weights(self.prune(key=seed)).tobytes() for seed in range(20)}
        assert len(masks) == 20

    def test_every_weight_goes_about_as_often(self):
        rates = np.mean([pruned_weights(self.prune(0.25, key=seed)) for seed in range(200)], axis=0)
        # Of 200 draws, within four standard deviations.
        np.testing.assert_allclose(rates, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 200))

    def test_weights_do_not_matter_and_stay(self):
        result = self.prune(key=1)
        w = problems.kernels(problems.params())
        expected = np.where(pruned_weights(result), 0, w)
        np.testing.assert_array_equal(problems.kernels(result.params), expected)
        other = problems.prune(problems.params(5), None, 0.5, method="random", key=1)
        np.testing.assert_array_equal(pruned_weights(other), pruned_weights(result))

    def test_a_step_draws_anew(self):
        """Whatever stays after the first step does not stay because of the same scores again."""
        params, batches = problems.regression()
        options = {"method": "random", "update": "joint", "num_grads": 8, "key": 0}
        run = pruning.prune_one_shot(loss_fn, params, batches, 0.5, recomputations=4, **options)
        once = pruning.prune_one_shot(loss_fn, params, batches, 0.5, recomputations=1, **options)
        assert run.sparsity == once.sparsity == 0.5
        assert not np.array_equal(run.mask["first"]["kernel"], once.mask["first"]["kernel"])
        again = pruning.prune_one_shot(loss_fn, params, batches, 0.5, recomputations=4, **options)
        assert_same(run, again)

    def test_what_is_no_key_is_an_error(self):
        with pytest.raises(ValueError, match="key must be a PRNG key"):
            self.prune(key="seed")


def adam_state(params, batches, steps=8):
    tx = optax.adam(0.01)
    state = tx.init(params)
    for batch in batches[:steps]:
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


class TestGivenDiagonal:
    @every_seed
    @pytest.mark.parametrize("update", [None, "none"])
    def test_second_moments_of_adam_score_weights_without_gradients(self, update, seed):
        params, state = adam_state(*problems.regression(seed))
        nu = optax.tree.get(state, "nu")
        result = pruning.prune(params, None, 0.6, method="fisher", fisher_diag=nu, update=update)
        names = "first", "second"
        scores = [np.asarray(params[n]["kernel"]) ** 2 * nu[n]["kernel"] for n in names]
        threshold = np.sort(np.concatenate([np.ravel(x) for x in scores]))[48]
        for name, values in zip(names, scores, strict=True):
            kept = np.asarray(values) >= threshold
            np.testing.assert_array_equal(result.mask[name]["kernel"], kept)
            expected = np.where(kept, params[name]["kernel"], 0)
            np.testing.assert_array_equal(result.params[name]["kernel"], expected)
        assert result.predicted_loss_change is None

    def test_its_scale_does_not_matter(self):
        params, state = adam_state(*problems.regression())
        nu = optax.tree.get(state, "nu")
        results = [
            pruning.prune(
                params,
                None,
                0.6,
                method="fisher",
                fisher_diag=jax.tree.map(lambda leaf, s=scale: s * leaf, nu),
            )
            for scale in (1.0, 2.0**-20, 2.0**20)
        ]
        for other in results[1:]:
            assert_same(other, results[0])

    def test_it_is_taken_of_the_weights_that_a_mask_keeps(self):
        params, state = adam_state(*problems.regression())
        nu = optax.tree.get(state, "nu")
        options = {"method": "fisher", "fisher_diag": nu}
        first = pruning.prune(params, None, 0.4, **options)
        second = pruning.prune(first.params, None, 0.6, mask=first.mask, **options)
        assert_same(second, pruning.prune(params, None, 0.6, **options))

    def test_the_diagonal_of_the_gradients_prunes_as_they_do(self):
        params, rows = problems.params(), problems.grads()
        diag = jax.tree.map(lambda leaf: jnp.mean(leaf**2, axis=0), rows)
        by_rows = problems.prune(params, rows, 0.5, method="fisher", damping=1e-12)
        by_diag = problems.prune(params, None, 0.5, method="fisher", fisher_diag=diag)
        np.testing.assert_array_equal(pruned_weights(by_diag), pruned_weights(by_rows))

    def test_moments_of_a_part_of_the_params_are_enough(self):
        params = problems.params()
        labels = jax.tree.map(lambda leaf: "adam" if leaf.ndim > 1 else "sgd", params)
        parts = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}
        nu = {}
        for name, tx in (("part", optax.multi_transform(parts, labels)), ("all", optax.adam(0.1))):
            _, state = tx.update(params, tx.init(params), params)
            nu[name] = optax.tree.get(state, "nu")
        part, whole = (
            pruning.prune(params, None, 0.5, method="fisher", fisher_diag=nu[name]) for name in nu
        )
        jax.tree.map(np.testing.assert_array_equal, part.mask, whole.mask)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_entries_are_finite_and_not_negative(self, bad):
        params = problems.params()
        diag = jax.tree.map(jnp.ones_like, params)
        diag["dense"]["kernel"] = diag["dense"]["kernel"].at[1, 1].set(bad)
        with pytest.raises(ValueError, match="fisher_diag must be finite and at least zero"):
            problems.prune(params, None, 0.5, method="fisher", fisher_diag=diag)

    def test_it_matches_the_params(self):
        params = problems.params()
        with pytest.raises(
            ValueError, match=r"fisher_diag must have a leaf of shape .* at conv/ker"
        ):
            problems.prune(
                params, None, 0.5, method="fisher", fisher_diag={"dense": params["dense"]}
            )

    @pytest.mark.parametrize(
        "options", [{"method": "obs"}, {"method": "fisher", "update": "joint"}]
    )
    def test_it_replaces_gradients_for_scores_only(self, options):
        diag = jax.tree.map(jnp.ones_like, problems.params())
        with pytest.raises(ValueError, match=r"needs grads, got None|replaces grads"):
            problems.prune(problems.params(), None, 0.5, fisher_diag=diag, **options)

    @pytest.mark.parametrize("method", ["magnitude", "random"])
    def test_a_method_that_does_not_use_it_is_an_error(self, method):
        diag = jax.tree.map(jnp.ones_like, problems.params())
        with pytest.raises(ValueError, match="fisher_diag"):
            problems.prune(problems.params(), None, 0.5, method=method, fisher_diag=diag)

    @pytest.mark.parametrize("method", ["fisher", "obs"])
    def test_gradients_as_well_are_an_error(self, method):
        """One of the two would be passed over without a word."""
        diag = jax.tree.map(jnp.ones_like, problems.params())
        with pytest.raises(ValueError, match="fisher_diag"):
            problems.prune(
                problems.params(), problems.grads(), 0.5, method=method, fisher_diag=diag
            )


METHODS = [
    {"method": "obs"},
    {"method": "obs", "update": "independent"},
    {"method": "greedy"},
    {"method": "fisher"},
    {"method": "saliency", "update": "joint"},
]
every_method = pytest.mark.parametrize(
    "options", METHODS, ids=lambda options: "-".join(options.values())
)


class TestRelativeDamping:
    @every_method
    @pytest.mark.parametrize("block_size", [7, 128, None])
    @pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
    def test_the_scale_of_the_loss_does_not_matter(self, scale, block_size, options):
        if options["method"] == "greedy" and block_size is None:
            pytest.skip("greedy removal works in blocks")
        params, rows = problems.params(), problems.grads()
        scaled = jax.tree.map(lambda leaf: scale * leaf, rows)
        one, other = (
            pruning.prune(params, grads, 0.6, block_size=block_size, **options)
            for grads in (rows, scaled)
        )
        np.testing.assert_array_equal(pruned_weights(one), pruned_weights(other))
        np.testing.assert_allclose(
            problems.kernels(one.params), problems.kernels(other.params), rtol=1e-3, atol=1e-5
        )

    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_nor_in_a_run(self, factor):
        params, batches = problems.regression()

        def scaled(*arguments):
            return factor * loss_fn(*arguments)

        one, other = (
            pruning.prune_one_shot(loss, params, batches, 0.6, recomputations=3)
            for loss in (loss_fn, scaled)
        )
        jax.tree.map(np.testing.assert_array_equal, one.mask, other.mask)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            one.params,
            other.params,
        )

    def test_a_fixed_damping_is_felt(self):
        params, rows = problems.params(), problems.grads()
        scaled = jax.tree.map(lambda leaf: 1e-3 * leaf, rows)
        one, other = (problems.prune(params, grads, 0.6, damping=1e-2) for grads in (rows, scaled))
        moved = problems.kernels(one.params) - problems.kernels(params)
        little = problems.kernels(other.params) - problems.kernels(params)
        kept = ~pruned_weights(other)
        assert np.abs(little[kept]).max() < 0.1 * np.abs(moved[~pruned_weights(one)]).max()

    @every_method
    @every_seed
    def test_it_is_in_units_of_the_mean_square_of_the_gradients(self, seed, options):
        params, rows = problems.params(seed), problems.grads(seed + 10)
        unit = float(np.mean(problems.kernel_rows(rows) ** 2))
        block_size = 16
        relative = pruning.prune(params, rows, 0.6, damping=0.05, block_size=block_size, **options)
        fixed = problems.prune(
            params, rows, 0.6, damping=0.05 * unit, block_size=block_size, **options
        )
        np.testing.assert_array_equal(pruned_weights(relative), pruned_weights(fixed))
        np.testing.assert_allclose(
            problems.kernels(relative.params), problems.kernels(fixed.params), rtol=1e-3, atol=1e-5
        )

    @every_method
    @pytest.mark.parametrize("scale", [1e-30, 1e25])
    def test_gradients_whose_squares_float32_cannot_hold_prune_alike(self, scale, options):
        params, rows = problems.params(), problems.grads()
        small = jax.tree.map(lambda leaf: scale * leaf, rows)
        one, other = (
            pruning.prune(params, grads, 0.6, block_size=16, **options) for grads in (rows, small)
        )
        np.testing.assert_array_equal(pruned_weights(one), pruned_weights(other))
        np.testing.assert_allclose(
            problems.kernels(one.params), problems.kernels(other.params), rtol=1e-3, atol=1e-5
        )
        assert np.isfinite(other.predicted_loss_change)

    def test_the_mean_is_over_the_weights_that_are_left(self):
        params, rows = problems.params(), problems.grads()
        first = problems.prune(params, None, 0.5, method="magnitude")
        alive = problems.kernels(first.mask) == 1
        unit = float(np.mean(problems.kernel_rows(rows)[:, alive] ** 2))
        options = {"mask": first.mask, "block_size": 16}
        relative = pruning.prune(first.params, rows, 0.7, damping=0.05, **options)
        fixed = problems.prune(first.params, rows, 0.7, damping=0.05 * unit, **options)
        np.testing.assert_array_equal(pruned_weights(relative), pruned_weights(fixed))

    @pytest.mark.parametrize("method", ["obs", "greedy", "fisher"])
    def test_gradients_of_zero_are_magnitude_pruning(self, method):
        zeros = jax.tree.map(jnp.zeros_like, problems.grads())
        result = pruning.prune(problems.params(), zeros, 0.5, method=method)
        by_magnitude = pruning.prune(problems.params(), None, 0.5, method="magnitude")
        np.testing.assert_array_equal(pruned_weights(result), pruned_weights(by_magnitude))
        np.testing.assert_allclose(
            problems.kernels(result.params), problems.kernels(by_magnitude.params), rtol=1e-6
        )
        assert result.predicted_loss_change == 0

    def test_it_is_the_default(self):
        params, rows = problems.params(), problems.grads()
        default = pruning.prune(params, rows, 0.5, damping=0.05)
        assert_same(default, pruning.prune(params, rows, 0.5, damping=0.05, relative_damping=True))
