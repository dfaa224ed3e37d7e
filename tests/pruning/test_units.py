"""Units of pruning on kernels of any rank, and units that several leaves share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems

every_seed = pytest.mark.parametrize("seed", range(3))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_magnitude(params, sparsity, structure, **options):
    return problems.prune(
        params, None, sparsity, method="magnitude", structure=structure, **options
    )


def best_of_groups(kernel, axis, n, m):
    """The mask of the n largest of each m along an axis."""
    moved = np.moveaxis(np.abs(np.asarray(kernel)), axis, -1)
    groups = moved.reshape(-1, m)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return np.moveaxis(mask.reshape(moved.shape), -1, axis)


def per_group(mask, axis, m):
    return np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m).sum(axis=1)


class TestNOfMAlongAnAxis:
    @every_seed
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
    def test_an_attention_kernel_that_is_read_as_unknown(self, axis, n, m, seed):
        kernel = normal(seed, 8, 4, 12)
        params = {"query": {"kernel": kernel}}
        result = by_magnitude(params, None, pruning.NM(n, m, axis=axis))
        np.testing.assert_array_equal(
            result.mask["query"]["kernel"], best_of_groups(kernel, axis, n, m)
        )

    @pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
    def test_leaves_of_every_rank(self, rank):
        kernel = normal(rank, *(4,) * rank)
        for axis in range(rank):
            result = by_magnitude(
                {"w": kernel}, None, pruning.NM(1, 4, axis=axis), select=lambda *_: True
            )
            np.testing.assert_array_equal(result.mask["w"], best_of_groups(kernel, axis, 1, 4))

    def test_a_leaf_without_the_axis_or_of_another_length_is_skipped(self):
        params = {
            "a": {"kernel": normal(0, 4, 6)},
            "b": {"kernel": normal(1, 4, 4, 8)},
            "c": {"kernel": normal(2, 4, 4, 7)},
        }
        result = by_magnitude(params, None, pruning.NM(2, 4, axis=2))
        assert result.skipped == (
            pruning.Skipped("a/kernel", "it has no axis 2"),
            pruning.Skipped("c/kernel", "axis 2 has 7 entries, not divisible by 4"),
        )
        for name in ("a", "c"):
            np.testing.assert_array_equal(result.params[name]["kernel"], params[name]["kernel"])
            assert result.mask[name]["kernel"].shape == ()
            assert result.mask[name]["kernel"]
        assert [layer.path for layer in result.layers] == ["b/kernel"]

    def test_with_an_axis_along_the_fan_in_it_is_the_default(self):
        params, rows = problems.params(), problems.grads()
        named = problems.prune(params, rows, None, structure=pruning.NM(2, 4, axis=-2))
        default = problems.prune(params, rows, None, structure=pruning.NM(2, 4))
        jax.tree.map(np.testing.assert_array_equal, named, default)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_obs_updates_a_kernel_of_any_rank(self, axis):
        """The best of a group by w^2 / [F^-1]_ii, and the joint update of the others."""
        with jax.enable_x64(True):
            rng = np.random.default_rng(axis)
            kernel, rows = rng.standard_normal((4, 4, 4)), rng.standard_normal((80, 4, 4, 4))
            result = problems.prune(
                {"kernel": jnp.asarray(kernel)},
                {"kernel": jnp.asarray(rows)},
                None,
                structure=pruning.NM(2, 4, axis=axis),
                damping=1e-3,
                layout={"": "???"},
            )
        fisher = problems.dense_fisher(rows.reshape(80, -1), 1e-3)
        scores = kernel**2 / np.diag(np.linalg.inv(fisher)).reshape(kernel.shape)
        mask = best_of_groups(scores, axis, 2, 4)
        np.testing.assert_array_equal(result.mask["kernel"], mask)
        kept, gone = mask.ravel(), ~mask.ravel()
        expected = np.where(kept, kernel.ravel(), 0)
        expected[kept] += np.linalg.solve(
            fisher[np.ix_(kept, kept)], fisher[np.ix_(kept, gone)] @ kernel.ravel()[gone]
        )
        np.testing.assert_allclose(np.ravel(result.params["kernel"]), expected, atol=1e-8)


class Encoder(nn.Module):
    """Attention as Linen has it, and a dense layer that N of M does not fit."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)(x, x)
        hidden = nn.Dense(10)(nn.LayerNorm()(x))
        return nn.Dense(6)(hidden)


class TestLinenAttention:
    params = Encoder().init(jax.random.key(0), jnp.ones((2, 3, 8)))["params"]

    def test_projections_have_n_of_m_along_their_inputs(self):
        result = by_magnitude(self.params, None, pruning.NM(2, 4))
        attention = result.mask["MultiHeadDotProductAttention_0"]
        for name in ("query", "key", "value"):  # (in, heads, head_dim)
            assert set(per_group(attention[name]["kernel"], 0, 4)) == {2}
        # (heads, head_dim, out): the sizes of a head are its inputs
        assert set(per_group(attention["out"]["kernel"], 1, 4)) == {2}

    def test_the_largest_of_a_group_stay(self):
        result = by_magnitude(self.params, None, pruning.NM(1, 4))
        for name, axis in (("query", 0), ("out", 1)):
            path = "MultiHeadDotProductAttention_0", name, "kernel"
            kernel, mask = self.params, result.mask
            for key in path:
                kernel, mask = kernel[key], mask[key]
            np.testing.assert_array_equal(mask, best_of_groups(kernel, axis, 1, 4))

    def test_what_does_not_fit_is_listed_and_unchanged(self):
        result = by_magnitude(self.params, None, pruning.NM(2, 4))
        assert [leaf.path for leaf in result.skipped] == ["Dense_1/kernel"]
        np.testing.assert_array_equal(
            result.params["Dense_1"]["kernel"], self.params["Dense_1"]["kernel"]
        )

    @pytest.mark.parametrize("structure", [pruning.NM(2, 4), pruning.NM(1, 2)])
    def test_several_steps_end_at_n_of_m(self, structure):
        def loss(params, x, y):
            return jnp.mean((Encoder().apply({"params": params}, x) - y) ** 2)

        batches = [(normal(k, 4, 3, 8), normal(k + 100, 4, 3, 6)) for k in range(16)]
        result = pruning.prune_one_shot(
            loss, self.params, batches, None, structure=structure, recomputations=3
        )
        attention = result.mask["MultiHeadDotProductAttention_0"]
        for name, axis in (("query", 0), ("key", 0), ("value", 0), ("out", 1)):
            groups = per_group(attention[name]["kernel"], axis, structure.m)
            assert set(groups) == {structure.n}


class TestStepsToNOfM:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 3), (3, 8), (1, 7)])
    @pytest.mark.parametrize("recomputations", [1, 4])
    def test_one_minus_n_over_m_is_all_of_it(self, recomputations, n, m):
        params = {"kernel": normal(0, 3 * m, 5)}
        batches = [normal(k + 1, 4, 3 * m) for k in range(16)]
        result = pruning.prune_one_shot(
            lambda p, x: jnp.mean(jnp.tanh(x @ p["kernel"]) ** 2),
            params,
            batches,
            1 - n / m,
            structure=pruning.NM(n, m),
            recomputations=recomputations,
        )
        assert set(per_group(result.mask["kernel"], 0, m)) == {n}

    def test_a_step_takes_the_lowest_that_groups_can_lose(self):
        kernel = jnp.array([[1.0], [2.0], [3.0], [4.0], [1.5], [9.0], [9.0], [9.0]])
        result = by_magnitude({"kernel": kernel}, 3 / 8, pruning.NM(2, 4))
        np.testing.assert_array_equal(np.ravel(result.mask["kernel"]), [0, 0, 1, 1, 0, 1, 1, 1])


def blocks_kept(kernel, sides, number):
    """The mask without the ``number`` blocks of lowest mean square."""
    rows, columns = kernel.shape[0] // sides[0], kernel.shape[1] // sides[1]
    blocks = np.square(np.asarray(kernel, np.float64)).reshape(rows, sides[0], columns, sides[1])
    means = blocks.mean(axis=(1, 3))
    kept = np.ones(means.size, bool)
    kept[np.argsort(means.ravel(), kind="stable")[:number]] = False
    return np.repeat(np.repeat(kept.reshape(means.shape), sides[0], 0), sides[1], 1)


class TestWeightBlocks:
    @every_seed
    @pytest.mark.parametrize("sides", [(2, 2), (4, 1), (1, 4), (2, 8), (8, 12)])
    def test_blocks_of_lowest_mean_score_go(self, sides, seed):
        kernel = normal(seed, 16, 24)
        result = by_magnitude({"kernel": kernel}, 0.5, pruning.WeightBlocks(sides))
        number = 16 * 24 // 2 // (sides[0] * sides[1])
        np.testing.assert_array_equal(result.mask["kernel"], blocks_kept(kernel, sides, number))

    def test_a_kernel_of_a_convolution_has_blocks_at_each_place(self):
        kernel = normal(0, 3, 3, 4, 6)
        result = by_magnitude({"conv": {"kernel": kernel}}, 0.5, pruning.WeightBlocks((2, 3)))
        stacked = np.asarray(result.mask["conv"]["kernel"]).reshape(9, 2, 2, 2, 3)
        counts = stacked.sum(axis=(2, 4))
        assert set(np.unique(counts)) == {0, 6}
        scores = np.square(kernel).reshape(9, 2, 2, 2, 3).mean(axis=(2, 4))
        lowest = np.sort(np.argsort(scores.ravel())[: scores.size // 2])
        np.testing.assert_array_equal(np.flatnonzero(counts.ravel() == 0), lowest)

    def test_what_the_sides_do_not_divide_is_skipped(self):
        params = {"a": {"kernel": normal(0, 4, 6)}, "b": {"kernel": normal(1, 4, 7)}}
        result = by_magnitude(params, 0.5, pruning.WeightBlocks((4, 3)))
        assert result.skipped == (
            pruning.Skipped("b/kernel", "axis 1 has 7 entries, not divisible by 3"),
        )
        np.testing.assert_array_equal(result.params["b"]["kernel"], params["b"]["kernel"])

    def test_one_number_is_that_along_the_fan_in(self):
        kernel = normal(0, 8, 6)
        one, two = (
            by_magnitude({"kernel": kernel}, 0.5, pruning.WeightBlocks(size))
            for size in (4, (4, 1))
        )
        np.testing.assert_array_equal(one.mask["kernel"], two.mask["kernel"])

    @pytest.mark.parametrize("size", [0, (2, 0), (), (2, 2, 2), 1.5])
    def test_a_block_has_one_side_or_two(self, size):
        with pytest.raises(ValueError, match="WeightBlocks"):
            by_magnitude({"kernel": normal(0, 8, 8)}, 0.5, pruning.WeightBlocks(size))


CONV_NET = {
    "conv": {"kernel": (3, 3, 2, 6), "bias": (6,)},
    "norm": {"scale": (6,), "bias": (6,)},
    "next_conv": {"kernel": (3, 3, 6, 4), "bias": (4,)},
    "dense": {"kernel": (2 * 2 * 4, 5), "bias": (5,)},
}
CONV_GROUPS = (
    ("conv/kernel", "conv/bias", "norm/scale", "norm/bias", "next_conv/kernel:in"),
    ("next_conv/kernel", "next_conv/bias", "dense/kernel:in"),
)


def conv_net(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        CONV_NET,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def whole(mask):
    """The mask with scalars written out."""
    return jax.tree.map(lambda kept, leaf: np.broadcast_to(kept, leaf.shape), mask, conv_net())


def conv_units(tree):
    """For each group the entries of each of its units, as plain indexing gives them."""
    first = [
        [
            tree["conv"]["kernel"][..., unit],
            tree["conv"]["bias"][unit],
            tree["norm"]["scale"][unit],
            tree["norm"]["bias"][unit],
            tree["next_conv"]["kernel"][:, :, unit],
        ]
        for unit in range(6)
    ]
    second = [
        [
            tree["next_conv"]["kernel"][..., unit],
            tree["next_conv"]["bias"][unit],
            tree["dense"]["kernel"].reshape(2, 2, 4, 5)[:, :, unit],
        ]
        for unit in range(4)
    ]
    return [[np.concatenate([np.ravel(x) for x in unit]) for unit in g] for g in (first, second)]


def parts(units):
    """Of each unit whether all, and whether any of its weights are kept."""
    return [(bool(unit.all()), bool(unit.any())) for unit in units]


class TestCoupledUnits:
    @every_seed
    def test_a_unit_goes_from_all_leaves_of_its_group(self, seed):
        params = conv_net(seed)
        result = by_magnitude(params, 0.5, pruning.OutputUnits(coupled=CONV_GROUPS[:1]))
        flags = parts(conv_units(whole(result.mask))[0])
        assert set(flags) == {(True, True), (False, False)}
        means = [np.mean(unit.astype(np.float64) ** 2) for unit in conv_units(params)[0]]
        gone = [unit for unit, (_, kept) in enumerate(flags) if not kept]
        assert gone == sorted(np.argsort(means)[:3])

    def test_a_dense_layer_behind_a_flattening_loses_every_place_of_a_channel(self):
        result = by_magnitude(conv_net(), 0.5, pruning.OutputUnits(coupled=CONV_GROUPS[1:]))
        assert set(parts(conv_units(whole(result.mask))[1])) == {(True, True), (False, False)}
        inputs = np.asarray(result.mask["dense"]["kernel"]).reshape(4, 4, 5)
        assert np.array_equal(inputs[0], inputs[3])
        assert 0 < inputs[0].sum() < inputs[0].size

    def test_leaves_outside_of_groups_are_not_pruned(self):
        params = conv_net()
        result = by_magnitude(params, 0.5, pruning.OutputUnits(coupled=CONV_GROUPS[:1]))
        for path in (("dense", "kernel"), ("dense", "bias"), ("next_conv", "bias")):
            np.testing.assert_array_equal(result.params[path[0]][path[1]], params[path[0]][path[1]])
        assert {layer.path for layer in result.layers} == {
            name.removesuffix(":in") for name in CONV_GROUPS[0]
        }

    @every_seed
    @pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
    def test_a_kernel_may_make_one_groups_units_and_read_anothers(self, sparsity, seed):
        structure = pruning.OutputUnits(coupled=CONV_GROUPS)
        result = by_magnitude(conv_net(seed), sparsity, structure)
        first, second = (
            [not np.any(entries) for entries in group] for group in conv_units(result.mask)
        )
        # What is left is the product of what is left of its inputs and of its outputs.
        expected = np.ones((3, 3, 6, 4), bool)
        expected[:, :, first] = False
        expected[..., second] = False
        np.testing.assert_array_equal(result.mask["next_conv"]["kernel"], expected)
        np.testing.assert_array_equal(result.mask["conv"]["bias"], ~np.array(first))
        np.testing.assert_array_equal(result.mask["next_conv"]["bias"], ~np.array(second))
        assert any(first) or any(second)
        assert sparsity - 0.2 < result.sparsity <= sparsity

    def test_steps_remove_whole_units_too(self):
        structure = pruning.OutputUnits(coupled=CONV_GROUPS)
        params, mask, before = conv_net(), None, 0.0
        for sparsity in (0.2, 0.4, 0.6):
            result = by_magnitude(params, sparsity, structure, mask=mask)
            params, mask = result.params, result.mask
            assert before < result.sparsity <= sparsity
            before = result.sparsity
        first, second = conv_units(result.mask)
        left = sum(unit.any() for unit in first), sum(unit.any() for unit in second)
        assert int(np.sum(result.mask["next_conv"]["kernel"])) == 9 * left[0] * left[1]

    def test_a_kernel_that_reads_and_makes_the_same_units_counts_each_weight_once(self):
        """As in a residual block of one layer: of six units half go, with their inputs."""
        params = {"block": {"kernel": normal(0, 6, 6)}, "embed": {"kernel": normal(1, 5, 6)}}
        group = ("embed/kernel", "block/kernel", "block/kernel:in")
        result = by_magnitude(
            params, 42 / 66, pruning.OutputUnits(coupled=(group,))
        )  # what stays is 3 x 3 and 5 x 3 of 36 and 30 weights
        assert result.num_kept == 24
        left = np.any(result.mask["embed"]["kernel"], axis=0)
        np.testing.assert_array_equal(result.mask["block"]["kernel"], np.outer(left, left))

    def test_what_overlapping_units_still_hold_may_fill_the_target(self):
        """Once others are gone, the last unit holds fewer weights than any unit did at first."""
        params = {
            "a": {"kernel": jnp.full((1, 4), 1.0)},
            "b": {"kernel": jnp.array([[1.0, 3.0]] * 4)},
        }
        groups = (("a/kernel", "b/kernel:in"), ("b/kernel",))
        # Three units of a take 9 of 12 weights; of the first unit of b one is left.
        params["a"]["kernel"] = jnp.array([[0.1, 0.1, 0.1, 9.0]])
        params["b"]["kernel"] = jnp.array([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2], [2.0, 9.0]])
        result = by_magnitude(params, 10 / 12, pruning.OutputUnits(coupled=groups))
        np.testing.assert_array_equal(result.mask["a"]["kernel"], [[0, 0, 0, 1]])
        np.testing.assert_array_equal(result.mask["b"]["kernel"], [[0, 0], [0, 0], [0, 0], [0, 1]])

    def test_obs_moves_what_is_left(self):
        params, batches = problems.regression()
        group = ("first/kernel", "first/bias", "second/kernel:in")
        result = pruning.prune_one_shot(
            problems.regression_loss,
            params,
            batches,
            0.5,
            structure=pruning.OutputUnits(coupled=(group,)),
            recomputations=2,
        )
        units = np.asarray(result.mask["first"]["bias"])
        assert units.sum() == 5
        np.testing.assert_array_equal(
            result.mask["first"]["kernel"], np.broadcast_to(units, (6, 10))
        )
        np.testing.assert_array_equal(
            result.mask["second"]["kernel"], np.broadcast_to(units[:, np.newaxis], (10, 2))
        )
        moved = result.params["second"]["kernel"][units] - params["second"]["kernel"][units]
        assert np.all(moved != 0)


class TestBadGroups:
    @pytest.mark.parametrize(
        ("group", "message"),
        [
            (("conv/kernel", "next_conv/bias"), r"outputs, got \{'conv/kernel': 6"),
            (("conv/kernel", "next_conv/kernel"), "the same number of outputs"),
            (("next_conv/kernel:in",), "outputs, got {}"),
            (
                ("conv/kernel", "dense/kernel:in"),
                "reads 16 inputs, which is not a multiple of the 6",
            ),
            (
                ("conv/kernel", "next_conv/bias:in"),
                "reads 1 inputs, which is not a multiple of the 6",
            ),
            (("conv/kernel", "norm/gamma"), r"do not have: \['norm/gamma'\]"),
            (("conv/kernel", "conv/kernel:out"), r"do not have: \['conv/kernel:out'\]"),
        ],
    )
    def test_a_group_that_does_not_hold_together(self, group, message):
        with pytest.raises(ValueError, match=message):
            by_magnitude(conv_net(), 0.5, pruning.OutputUnits(coupled=(group,)))

    def test_a_leaf_whose_axes_are_unknown_is_named(self):
        params = {"query": {"kernel": normal(0, 8, 4, 2)}, "dense": {"kernel": normal(1, 8, 8)}}
        group = ("query/kernel", "dense/kernel:in")
        with pytest.raises(ValueError, match=r"query/kernel.*unknown"):
            by_magnitude(params, 0.5, pruning.OutputUnits(coupled=(group,)))

    @pytest.mark.parametrize(
        "options",
        [{"distribution": "uniform"}, {"distribution": "erk"}, {"sparsity": {"conv": 0.5}}],
    )
    def test_leaves_that_lose_units_together_have_one_sparsity(self, options):
        options = {"sparsity": 0.5, **options}
        structure = pruning.OutputUnits(coupled=CONV_GROUPS)
        with pytest.raises(ValueError, match="coupled"):
            by_magnitude(conv_net(), structure=structure, **options)


class TestTheSmallerNetwork:
    @staticmethod
    def network(params, x):
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
        return hidden @ params["second"]["kernel"] + params["second"]["bias"]

    @every_seed
    @pytest.mark.parametrize("method", ["magnitude", "obs"])
    def test_a_perceptron_with_its_units_cut_out(self, method, seed):
        params = {
            "first": {"kernel": normal(seed, 6, 12), "bias": jnp.zeros(12)},
            "second": {"kernel": normal(seed + 10, 12, 3), "bias": jnp.zeros(3)},
        }

        def loss(params, x, y):
            return jnp.mean((self.network(params, x) - y) ** 2)

        batches = [(normal(20 + k, 8, 6), normal(40 + k, 8, 3)) for k in range(20)]
        result = pruning.prune_one_shot(
            loss,
            params,
            batches,
            0.5,
            method=method,
            structure=pruning.OutputUnits(coupled=(("first/kernel", "second/kernel:in"),)),
            recomputations=2,
        )
        units = np.any(result.mask["first"]["kernel"], axis=0)
        assert units.sum() == 6
        np.testing.assert_array_equal(np.any(result.mask["second"]["kernel"], axis=1), units)
        small = {
            "first": {name: leaf[..., units] for name, leaf in result.params["first"].items()},
            "second": {**result.params["second"]},
        }
        small["second"]["kernel"] = result.params["second"]["kernel"][units]
        inputs = batches[0][0]
        np.testing.assert_allclose(
            self.network(small, inputs), self.network(result.params, inputs), rtol=1e-5, atol=1e-5
        )
