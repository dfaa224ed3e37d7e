"""How a sparsity is spread over leaves, against plain loops in NumPy; what the result counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems

every_seed = pytest.mark.parametrize("seed", range(3))

SHAPES = {
    "first_conv": (3, 3, 3, 8),
    "second_conv": (3, 3, 8, 16),
    "dense": (64, 30),
    "head": (30, 5),
}


def network(seed=0, shapes=SHAPES):
    """Kernels of different scales, and a bias that is never pruned."""
    rng = np.random.default_rng(seed)
    tree = {
        name: {
            "kernel": jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.7, 1.5), jnp.float32)
        }
        for name, shape in shapes.items()
    }
    tree["head"]["bias"] = jnp.ones(shapes["head"][-1])
    return tree


def by_magnitude(params, sparsity, **options):
    return problems.prune(params, None, sparsity, method="magnitude", **options)


def kept(result):
    return {layer.path.split("/")[0]: layer.kept for layer in result.layers}


def size(name):
    return int(np.prod(SHAPES[name]))


def erk_densities(shapes, density):
    """Leaf after leaf is made dense until no density is above one."""
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    ratios = {name: sum(shape) / np.prod(shape) for name, shape in shapes.items()}
    dense = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = budget / sum(ratios[name] * sizes[name] for name in rest)
        above = {name for name in rest if factor * ratios[name] > 1}
        if not above:
            return {name: 1.0 if name in dense else factor * ratios[name] for name in shapes}
        dense |= above


def erk_kept(shapes, sparsity):
    densities = erk_densities(shapes, 1 - sparsity)
    return {
        name: int(np.prod(shape)) - int((1 - densities[name]) * np.prod(shape) + 1e-6)
        for name, shape in shapes.items()
    }


class TestGlobal:
    @every_seed
    def test_the_lowest_scores_of_all_leaves_go(self, seed):
        params = network(seed)
        result = by_magnitude(params, 0.7)
        magnitudes = np.sort(
            np.concatenate([np.abs(np.ravel(params[n]["kernel"])) for n in SHAPES])
        )
        threshold = magnitudes[int(0.7 * len(magnitudes))]
        for name in SHAPES:
            expected = np.abs(params[name]["kernel"]) >= threshold
            np.testing.assert_array_equal(result.mask[name]["kernel"], expected)

    def test_a_leaf_of_tiny_weights_is_lost_and_named(self):
        params = network()
        params["dense"]["kernel"] *= 1e-6
        params["second_conv"]["kernel"] *= 1e-6
        with pytest.warns(UserWarning, match="no weights in dense/kernel, second_conv/kernel,"):
            result = by_magnitude(params, 0.95)
        assert kept(result)["dense"] == kept(result)["second_conv"] == 0

    def test_a_member_of_a_stack_that_vanishes_is_named(self):
        kernel = jax.random.normal(jax.random.key(0), (3, 8, 8)).at[1].multiply(1e-3)
        params = {"ScanBlock_0": {"Dense_0": {"kernel": kernel}}}
        with pytest.warns(UserWarning, match=r"no weights in ScanBlock_0/Dense_0/kernel\[1\],"):
            by_magnitude(params, 0.5)

    def test_the_warning_points_at_the_callers_line(self):
        params = network()
        params["dense"]["kernel"] *= 1e-6
        for prune in (
            lambda: pruning.prune(params, None, 0.8, method="magnitude"),
            lambda: pruning.prune_one_shot(None, params, [], 0.8, method="magnitude"),
        ):
            with pytest.warns(UserWarning, match="left no weight") as caught:
                prune()
            assert caught[0].filename == __file__


class TestUniform:
    @every_seed
    @pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
    def test_each_leaf_loses_its_own_lowest(self, sparsity, seed):
        params = network(seed)
        result = by_magnitude(params, sparsity, distribution="uniform")
        for name in SHAPES:
            magnitudes = np.abs(np.ravel(params[name]["kernel"]))
            number = int(sparsity * len(magnitudes) + 1e-6)
            gone = np.argsort(magnitudes, kind="stable")[:number]
            np.testing.assert_array_equal(
                np.flatnonzero(~result.mask[name]["kernel"]), np.sort(gone)
            )

    def test_a_leaf_below_its_own_sparsity_already_is_an_error(self):
        params = network()
        mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        mask["dense"]["kernel"] = jnp.arange(size("dense")).reshape(SHAPES["dense"]) < 100
        with pytest.raises(ValueError, match=r"below the current .* of dense/kernel"):
            by_magnitude(params, 0.5, mask=mask, distribution="uniform")


class TestErdosRenyiKernel:
    @pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.98])
    def test_densities_are_those_of_a_plain_loop(self, sparsity):
        result = by_magnitude(network(), sparsity, distribution="erk")
        assert kept(result) == erk_kept(SHAPES, sparsity)

    def test_some_leaves_of_these_are_dense(self):
        densities = erk_densities(SHAPES, 0.7)
        assert sum(density == 1.0 for density in densities.values()) == 2
        result = by_magnitude(network(), 0.3, distribution="erk")
        full = {name for name, number in kept(result).items() if number == size(name)}
        assert full == {name for name, density in densities.items() if density == 1.0}

    @pytest.mark.parametrize("sparsity", [0.3, 0.9])
    def test_together_they_have_the_sparsity(self, sparsity):
        result = by_magnitude(network(), sparsity, distribution="erk")
        total = sum(map(size, SHAPES))
        missing = sum(kept(result).values()) - (1 - sparsity) * total
        assert 0 <= missing <= len(SHAPES)  # each leaf is rounded down

    @pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9, 0.99])
    @pytest.mark.parametrize("shape", [(10, 10), (30, 100), (100, 70)])
    def test_a_single_leaf_has_the_sparsity_exactly(self, shape, sparsity):
        params = {"kernel": jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)}
        result = by_magnitude(params, sparsity, distribution="erk")
        assert result.layers == by_magnitude(params, sparsity, distribution="uniform").layers

    @pytest.mark.parametrize("width", [10, 30, 70, 130])
    def test_equal_leaves_have_equal_sparsities_exactly(self, width):
        rng = np.random.default_rng(width)
        params = {
            name: {"kernel": jnp.asarray(rng.standard_normal((width, width)))} for name in "abc"
        }
        for sparsity in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9):
            result = by_magnitude(params, sparsity, distribution="erk")
            assert {layer.kept for layer in result.layers} == {round((1 - sparsity) * width**2)}

    def test_the_axes_of_outputs_and_inputs_count_as_one_each(self):
        """Linen's attention keeps (in, heads, head_dim) and (heads, head_dim, out)."""
        rng = np.random.default_rng(0)
        attention = {
            "query": {"kernel": jnp.asarray(rng.standard_normal((12, 4, 5)))},
            "out": {"kernel": jnp.asarray(rng.standard_normal((4, 5, 12)))},
        }
        params = {"MultiHeadDotProductAttention_0": attention, "Dense_0": {}}
        params["Dense_0"]["kernel"] = jnp.asarray(rng.standard_normal((12, 60)))
        result = by_magnitude(params, 0.6, distribution="erk")
        expected = erk_kept({"dense": (12, 60), "query": (12, 20), "out": (20, 12)}, 0.6)
        assert [layer.kept for layer in result.layers] == [
            *(expected[name] for name in ("dense", "out", "query"))
        ]

    def test_patterns_have_their_own_densities(self):
        result = by_magnitude(network(), {"conv": 0.5, "": 0.9}, distribution="erk")
        convolutions = {name: SHAPES[name] for name in SHAPES if "conv" in name}
        others = {name: SHAPES[name] for name in SHAPES if "conv" not in name}
        assert kept(result) == {**erk_kept(convolutions, 0.5), **erk_kept(others, 0.9)}

    def test_leaves_without_a_pattern_stay_dense(self):
        result = by_magnitude(network(), {"conv": 0.7}, distribution="erk")
        assert kept(result)["dense"] == size("dense")
        assert kept(result)["head"] == size("head")

    def test_several_steps_end_there_too(self):
        params, batches = problems.regression()
        result = pruning.prune_one_shot(
            problems.regression_loss, params, batches, 0.8, distribution="erk", recomputations=3
        )
        assert [layer.kept for layer in result.layers] == [
            *erk_kept({"first": (6, 10), "second": (10, 2)}, 0.8).values()
        ]


class TestPatterns:
    def test_the_first_pattern_that_matches_counts(self):
        result = by_magnitude(network(), {"second": 0.25, "conv": 0.5, "d": 0.75})
        assert kept(result)["second_conv"] == 0.75 * size("second_conv")
        assert kept(result)["first_conv"] == 0.5 * size("first_conv")
        total = size("dense") + size("head")
        assert kept(result)["dense"] + kept(result)["head"] == total - int(0.75 * total)

    def test_leaves_of_one_pattern_compete(self):
        params = network()
        params["second_conv"]["kernel"] *= 100
        result = by_magnitude(params, {"conv": 0.15})
        assert kept(result)["second_conv"] > 0.98 * size("second_conv")
        assert kept(result)["dense"] == size("dense")

    def test_a_pattern_that_only_earlier_ones_match_is_an_error(self):
        with pytest.raises(ValueError, match=r"sparsity\['first_conv'\] matches no selected leaf"):
            by_magnitude(network(), {"conv": 0.5, "first_conv": 0.25})


class TestMinDensity:
    @every_seed
    def test_a_leaf_of_tiny_weights_keeps_its_best(self, seed):
        params = network(seed)
        params["dense"]["kernel"] *= 1e-6
        result = by_magnitude(params, 0.8, min_density=0.1)
        magnitudes = np.abs(np.ravel(params["dense"]["kernel"]))
        best = np.argsort(-magnitudes, kind="stable")[: size("dense") // 10]
        np.testing.assert_array_equal(np.flatnonzero(result.mask["dense"]["kernel"]), np.sort(best))
        assert result.sparsity == pytest.approx(0.8, abs=1e-3)

    @pytest.mark.parametrize("structure", [None, pruning.OutputUnits()])
    def test_so_does_a_member_of_a_stack(self, structure):
        kernel = jax.random.normal(jax.random.key(0), (8, 3, 10)).at[:, 1].multiply(1e-3)
        layout = {"experts": "ILO"}
        result = by_magnitude(
            {"experts": kernel}, 0.5, min_density=0.2, layout=layout, structure=structure
        )
        found = np.asarray(result.mask["experts"]).sum(axis=(0, 2))
        assert found[1] == 16
        assert found.sum() == 120

    def test_every_leaf_keeps_at_least_its_share_rounded_up(self):
        params = network()
        for name in ("first_conv", "head"):
            params[name]["kernel"] *= 1e-6
        result = by_magnitude(params, 0.9, min_density=0.07)
        assert kept(result)["first_conv"] == int(np.ceil(0.07 * size("first_conv")))
        assert kept(result)["head"] == int(np.ceil(0.07 * size("head")))

    def test_it_counts_all_weights_of_a_leaf_in_every_step(self):
        params = network()
        params["dense"]["kernel"] *= 1e-6
        first = by_magnitude(params, 0.5, min_density=0.2)
        second = by_magnitude(first.params, 0.75, min_density=0.2, mask=first.mask)
        assert kept(second)["dense"] == 0.2 * size("dense")

    @pytest.mark.parametrize("distribution", ["global", "uniform"])
    def test_more_than_the_sparsity_leaves_is_an_error(self, distribution):
        with pytest.raises(ValueError, match="min_density keeps more weights than"):
            by_magnitude(network(), 0.8, min_density=0.25, distribution=distribution)

    def test_more_than_n_of_m_is_an_error_too(self):
        with pytest.raises(ValueError, match=r"min_density=0\.8 is more than NM"):
            by_magnitude(
                network(),
                None,
                structure=pruning.NM(2, 4),
                min_density=0.8,
                select=lambda path, leaf: path == "dense/kernel",
            )

    def test_units_keep_the_share_as_well(self):
        params = network()
        params["dense"]["kernel"] *= 1e-6
        result = by_magnitude(params, 0.6, min_density=0.1, structure=pruning.WeightBlocks(2))
        assert kept(result)["dense"] >= 0.1 * size("dense")

    @pytest.mark.parametrize(
        "structure",
        [pruning.OutputUnits(), pruning.WeightBlocks(4), pruning.WeightBlocks((2, 2))],
    )
    def test_units_above_the_share_are_still_pruned(self, structure):
        keys = jax.random.split(jax.random.key(0))
        params = {
            name: {"kernel": jax.random.normal(key, (100, 20))}
            for name, key in zip("ab", keys, strict=True)
        }
        params["a"]["kernel"] *= 1e-6
        result = by_magnitude(params, 0.5, min_density=0.1, structure=structure)
        assert result.sparsity == pytest.approx(0.5)
        assert kept(result)["a"] == 0.1 * 2000

    def test_units_that_must_stay_are_no_sparsity(self):
        with pytest.raises(ValueError, match="min_density keeps more weights than"):
            by_magnitude(network(), 0.8, min_density=0.5, structure=pruning.OutputUnits())

    def test_n_of_m_keeps_its_share_by_itself(self):
        params = {"kernel": jax.random.normal(jax.random.key(0), (100, 20))}
        options = {"structure": pruning.NM(2, 4), "min_density": 0.5}
        assert by_magnitude(params, None, **options).sparsity == 0.5


class TestNormalizedScores:
    @every_seed
    def test_scores_are_divided_by_their_mean_in_each_leaf(self, seed):
        params = network(seed)
        result = by_magnitude(params, 0.6, normalize_scores=True)
        scores = {n: np.square(np.asarray(params[n]["kernel"], np.float64)) for n in SHAPES}
        scores = {name: values / values.mean() for name, values in scores.items()}
        every = np.sort(np.concatenate([np.ravel(values) for values in scores.values()]))
        threshold = every[int(0.6 * len(every))]
        for name in SHAPES:
            np.testing.assert_array_equal(
                result.mask[name]["kernel"], scores[name] >= threshold * (1 - 1e-5)
            )

    @every_seed
    def test_they_do_not_depend_on_a_leafs_scale(self, seed):
        params = network(seed)
        result = by_magnitude(params, 0.6, normalize_scores=True)
        params["dense"]["kernel"] *= 2.0**-10
        scaled = by_magnitude(params, 0.6, normalize_scores=True)
        jax.tree.map(np.testing.assert_array_equal, result.mask, scaled.mask)

    def test_nor_on_that_of_a_member_of_a_stack(self):
        kernel = jax.random.normal(jax.random.key(0), (3, 8, 8))
        options = {"layout": {"": "LIO"}, "normalize_scores": True}
        result, scaled = (
            by_magnitude({"kernel": stack}, 0.6, **options)
            for stack in (kernel, kernel.at[1].multiply(2.0**-10))
        )
        jax.tree.map(np.testing.assert_array_equal, result.mask, scaled.mask)

    def test_the_mean_is_that_of_the_unpruned_weights(self):
        params = {"a": {"kernel": jnp.array([[1.0, 2.0, 9.0, 9.0]])}}
        params["b"] = {"kernel": jnp.array([[1.1, 1.3, 1.2, 1.4]])}
        mask = {"a": {"kernel": jnp.array([[True, True, False, False]])}}
        mask["b"] = {"kernel": jnp.ones((1, 4), bool)}
        # Of a: 0.4 and 1.6, of b: 0.77 and more. With nines in the mean, 2.0 would be at 0.1.
        result = by_magnitude(params, 4 / 8, mask=mask, normalize_scores=True)
        np.testing.assert_array_equal(result.mask["a"]["kernel"], [[False, True, False, False]])
        np.testing.assert_array_equal(result.mask["b"]["kernel"], [[False, True, True, True]])

    def test_a_leaf_that_is_pruned_completely_does_not_matter(self):
        params = network()
        mask = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        mask["head"]["kernel"] = jnp.zeros(SHAPES["head"], bool)
        with pytest.warns(UserWarning, match="no weights in head/kernel"):
            result = by_magnitude(params, 0.5, mask=mask, normalize_scores=True)
        assert result.sparsity == pytest.approx(0.5, abs=1e-3)

    def test_a_leaf_of_zero_scores_goes_first(self):
        params = network()
        rows = jax.tree.map(lambda leaf: np.ones((2, *leaf.shape), np.float32), params)
        rows["head"]["kernel"][:] = 0
        options = {"method": "saliency", "normalize_scores": True}
        with pytest.warns(UserWarning, match="no weights in head/kernel"):
            result = problems.prune(params, rows, 0.5, **options)
        assert kept(result)["head"] == 0


class TestTooFewLeft:
    @pytest.mark.parametrize("distribution", ["uniform", "erk"])
    def test_a_leaf_of_which_nothing_would_be_left_is_named(self, distribution):
        params = {"kernel": jnp.ones((2, 2)), "other": {"kernel": jnp.ones((100, 100))}}
        target = {"^kernel": 1 - 1e-9, "other": 0.5}
        with pytest.raises(ValueError, match="none of the 4 weights of kernel: lower it"):
            by_magnitude(params, target, distribution=distribution)

    def test_nothing_left_of_all_is_an_error(self):
        with pytest.raises(
            ValueError, match="none of the 3438 weights of dense/kernel, first_conv"
        ):
            by_magnitude(network(), 1 - 1e-10)

    def test_it_is_one_before_a_gradient_is_taken(self):
        def batches():
            raise AssertionError("a batch was taken")
            yield

        params, _ = problems.regression()
        with pytest.raises(ValueError, match="would leave none of the 80 weights"):
            pruning.prune_one_shot(problems.regression_loss, params, batches(), 1 - 1e-10)

    def test_one_weight_may_be_left(self):
        params = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}
        assert by_magnitude(params, 0.99).num_kept == 1


class TestCounts:
    def test_num_other_counts_what_is_kept_elsewhere(self):
        params = network()
        result = by_magnitude(params, 0.5, select=lambda path, leaf: path == "dense/kernel")
        others = sum(size(name) for name in SHAPES if name != "dense")
        assert result.num_other == others + 5
        assert result.num_kept == others + 5 + size("dense") // 2
        assert result.sparsity == 0.5

    def test_what_a_mask_has_pruned_elsewhere_is_not_counted(self):
        params = network()
        first = by_magnitude(params, 0.5, select=lambda path, leaf: path == "head/kernel")
        second = by_magnitude(
            first.params, 0.5, mask=first.mask, select=lambda path, leaf: path == "dense/kernel"
        )
        others = size("first_conv") + size("second_conv")
        assert second.num_other == others + size("head") // 2 + 5

    def test_scalars_of_a_mask_stand_for_whole_leaves(self):
        params = network()
        mask = jax.tree.map(lambda _: True, params)
        mask["head"] = {"kernel": False, "bias": True}
        result = by_magnitude(
            params, 0.5, mask=mask, select=lambda path, leaf: path == "dense/kernel"
        )
        assert result.num_other == size("first_conv") + size("second_conv") + 5

    def test_what_cannot_hold_the_structure_counts_as_kept(self):
        params = network()
        result = by_magnitude(params, None, structure=pruning.NM(2, 4))
        assert [leaf.path for leaf in result.skipped] == ["first_conv/kernel", "head/kernel"]
        assert result.num_other == size("first_conv") + size("head") + 5
        assert result.num_kept == result.num_other + (size("dense") + size("second_conv")) // 2

    def test_num_kept_is_the_number_of_nonzero_entries(self):
        result = by_magnitude(network(), 0.77)
        assert result.num_kept == sum(np.count_nonzero(x) for x in jax.tree.leaves(result.params))

    def test_the_table_has_a_line_for_each_leaf_and_the_totals(self):
        result = by_magnitude(network(), 0.5, structure=pruning.NM(2, 4))
        rows = [line.split() for line in result.table().splitlines()]
        assert rows[0] == ["weights", "kept", "sparsity"]
        assert rows[1] == ["dense/kernel", "1,920", "960", "50.00%"]
        assert rows[2] == ["second_conv/kernel", "1,152", "576", "50.00%"]
        assert rows[3] == ["total", "3,072", "1,536", "50.00%"]
        assert rows[4] == ["model", "3,443", "1,907", "44.61%"]
        assert [row[0] for row in rows[5:]] == ["first_conv/kernel", "head/kernel"]
        assert "axis 2 has 3 entries" in result.table()
