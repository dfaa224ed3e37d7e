"""Masks: of earlier zeros, of scalars, of other models; tied weights; saved and read again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvax import pruning

from . import problems

loss_fn = problems.regression_loss


def by_magnitude(params, sparsity, **options):
    return problems.prune(params, None, sparsity, method="magnitude", **options)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def with_zeros(share, seed=0):
    """Parameters of the regression, of whose kernels a share was pruned elsewhere."""
    params, batches = problems.regression(seed)
    return by_magnitude(params, share).params, batches


def fine_tuned(tx, params, state, batches):
    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


class TestMaskOfZeros:
    def test_zeros_of_kernels_are_pruned_and_other_leaves_have_a_scalar(self):
        params, _ = with_zeros(0.6)
        params["first"]["bias"] = params["first"]["bias"].at[3].set(0)
        mask = pruning.mask_of_zeros(params)
        for layer in ("first", "second"):
            np.testing.assert_array_equal(mask[layer]["kernel"], params[layer]["kernel"] != 0)
        assert mask["first"]["bias"].shape == ()
        assert mask["first"]["bias"]

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("method", ["magnitude", "obs", "greedy", "fisher"])
    def test_the_mask_of_a_result_is_that_of_its_zeros(self, method, seed):
        params, rows = problems.params(seed), problems.grads(seed)
        result = problems.prune(params, rows, 0.6, method=method, block_size=16)
        assert_trees_equal(pruning.mask_of_zeros(result.params), result.mask)

    @pytest.mark.parametrize("method", ["magnitude", "obs"])
    def test_seventy_percent_from_sixty_are_seventy(self, method):
        params, batches = with_zeros(0.6)
        mask = pruning.mask_of_zeros(params)
        result = pruning.prune_one_shot(
            loss_fn, params, batches, 0.7, mask=mask, method=method, recomputations=2
        )
        assert sum(layer.kept for layer in result.layers) == 24  # of 80
        for layer in ("first", "second"):
            assert not np.any(result.mask[layer]["kernel"] & (params[layer]["kernel"] == 0))

    def test_minus_zero_narrow_types_and_numpy_are_taken(self):
        params = {
            "a": {"kernel": np.array([[-0.0, 1.0]], np.float32)},
            "b": {"kernel": jnp.array([[0.0, 1e-30]], jnp.bfloat16)},
        }
        mask = pruning.mask_of_zeros(params)
        np.testing.assert_array_equal(mask["a"]["kernel"], [[False, True]])
        np.testing.assert_array_equal(mask["b"]["kernel"], [[False, True]])

    def test_what_is_selected_counts_and_nothing_is_an_error(self):
        params, _ = with_zeros(0.5)
        mask = pruning.mask_of_zeros(params, lambda path, leaf: path.startswith("first"))
        assert mask["second"]["kernel"].shape == ()
        with pytest.raises(ValueError, match="select chooses no leaf"):
            pruning.mask_of_zeros(params, lambda path, leaf: False)

    def test_a_sharded_leafs_mask_is_sharded_alike(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("x"))
        mask = pruning.mask_of_zeros({"kernel": jax.device_put(jnp.eye(8), sharding)})
        assert mask["kernel"].sharding == sharding


class TestWithoutAMask:
    def test_many_zeros_are_warned_of_where_the_user_calls(self):
        params, batches = with_zeros(0.6)
        calls = (
            lambda: pruning.prune(params, None, 0.7, method="magnitude"),
            lambda: pruning.prune_one_shot(loss_fn, params, batches, 0.7, recomputations=1),
        )
        for call in calls:
            with pytest.warns(
                UserWarning, match="60% of the selected weights.*mask_of_zeros"
            ) as caught:
                call()
            assert [warning.filename for warning in caught] == [__file__]

    def test_a_few_zeros_or_zeros_of_other_leaves_are_none(self):
        params, _ = with_zeros(0.04)
        params["first"]["bias"] = jnp.zeros(10)
        by_magnitude(params, 0.5)

    def test_a_mask_that_keeps_zeros_is_none(self):
        params, _ = with_zeros(0.6)
        kept = jax.tree.map(lambda _: True, params)
        assert by_magnitude(params, 0.7, mask=kept).sparsity == pytest.approx(0.7)


SCALARS = {"first": {"kernel": True, "bias": True}, "second": {"kernel": False}}


def written_out(mask, params):
    return jax.tree.map(lambda kept, leaf: jnp.full(leaf.shape, kept), mask, params)


@pytest.mark.parametrize("scalar", [bool, np.bool_, jnp.asarray], ids=["bool", "numpy", "jax"])
class TestScalars:
    """A scalar of a mask is that mask for the whole leaf."""

    @pytest.fixture
    def mask(self, scalar):
        return jax.tree.map(scalar, SCALARS)

    def test_in_a_step(self, mask):
        params, _ = problems.regression()
        results = []
        for one in (mask, written_out(SCALARS, params)):
            with pytest.warns(UserWarning, match="no weights in second/kernel"):
                results.append(by_magnitude(params, 0.6, mask=one))
        assert results[0].layers == results[1].layers
        assert_trees_equal(results[0].params, results[1].params)
        assert not np.any(results[0].params["second"]["kernel"])

    def test_in_a_run(self, mask):
        params, batches = problems.regression()
        results = []
        for one in (mask, written_out(SCALARS, params)):
            with pytest.warns(UserWarning, match="no weights in second/kernel"):
                results.append(
                    pruning.prune_one_shot(
                        loss_fn, params, batches, 0.6, mask=one, recomputations=2
                    )
                )
        assert_trees_equal(results[0].params, results[1].params)

    @pytest.mark.parametrize("storage", ["device", "host", "folder"])
    def test_in_gradients(self, mask, storage, tmp_path):
        params, batches = problems.regression()
        where = tmp_path / "rows" if storage == "folder" else storage
        rows = pruning.collect_gradients(loss_fn, params, batches, 4, mask=mask, storage=where)
        whole = pruning.collect_gradients(loss_fn, params, batches, 4)
        assert_trees_equal(rows["first"], whole["first"])
        assert not np.any(rows["second"]["kernel"])

    def test_in_fine_tuning(self, mask):
        params, batches = problems.regression()
        tx = pruning.keep_pruned(mask, optax.adam(0.01))
        trained, state = fine_tuned(tx, params, tx.init(params), batches[:3])
        assert not np.any(trained["second"]["kernel"])
        assert not np.any(optax.tree.get(state, "mu")["second"]["kernel"])
        assert np.all(trained["first"]["bias"] != params["first"]["bias"])

    def test_in_fine_tuning_under_a_masked_transformation(self, mask):
        params, batches = problems.regression()
        kernels = {"first": {"kernel": True, "bias": False}, "second": {"kernel": True}}
        tx = optax.masked(pruning.keep_pruned(mask, optax.adam(0.01)), kernels)
        trained, _ = fine_tuned(tx, params, tx.init(params), batches[:3])
        assert not np.any(trained["second"]["kernel"])

    def test_in_gradual_pruning(self, mask):
        params, batches = problems.regression()
        seen = []

        def fine_tune(params, mask):
            seen.append(mask)
            tx = pruning.keep_pruned(mask, optax.sgd(0.01))
            return fine_tuned(tx, params, tx.init(params), batches[:2])[0]

        with pytest.warns(UserWarning, match="no weights in second/kernel"):
            result = pruning.prune_gradually(
                loss_fn, params, batches, [0.5, 0.6], fine_tune, mask=mask, recomputations=1
            )
        assert len(seen) == 2
        assert not np.any(result.params["second"]["kernel"])
        assert np.mean(result.params["first"]["kernel"] == 0) == pytest.approx(28 / 60)


class TestScalarsOfResults:
    def test_leaves_that_are_not_pruned_have_a_scalar(self):
        result = by_magnitude(problems.regression()[0], 0.5)
        assert result.mask["first"]["bias"].shape == ()
        assert result.mask["first"]["bias"]

    def test_the_mask_of_another_leaf_is_handed_on(self):
        params, _ = problems.regression()
        mask = {"first": {"kernel": True, "bias": jnp.arange(10) < 5}, "second": {"kernel": True}}
        result = by_magnitude(params, 0.5, mask=mask)
        np.testing.assert_array_equal(result.mask["first"]["bias"], jnp.arange(10) < 5)

    def test_a_whole_leaf_that_is_pruned_stays_so_with_a_new_mask_in_the_state(self):
        params, batches = problems.regression()
        params["second"]["kernel"] = jnp.zeros((10, 2))
        tx = pruning.keep_pruned(SCALARS, optax.sgd(0.1))
        state = tx.init(params)
        more = by_magnitude(
            params, 0.5, mask=SCALARS, select=lambda path, leaf: path == "first/kernel"
        )
        state = optax.tree.set(state, mask=more.mask)
        trained, _ = fine_tuned(tx, more.params, state, batches[:2])
        assert not np.any(trained["second"]["kernel"])

    def test_a_new_mask_in_the_state_compiles_nothing(self):
        params, batches = problems.regression()
        first = by_magnitude(params, 0.5)
        tx = pruning.keep_pruned(first.mask, optax.adam(0.01))
        traces = []

        @jax.jit
        def step(params, state, batch):
            traces.append(1)
            updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
            return optax.apply_updates(params, updates), state

        params, state = step(first.params, tx.init(first.params), batches[0])
        second = by_magnitude(params, 0.8, mask=optax.tree.get(state, "mask"))
        assert jax.tree.map(jax.typeof, state.mask) == jax.tree.map(jax.typeof, second.mask)
        state = optax.tree.set(state, mask=second.mask)
        params, state = step(second.params, state, batches[1])
        assert len(traces) == 1
        assert_trees_equal(pruning.mask_of_zeros(params), second.mask)


OTHERS = (
    {"first": {"kernel": True, "bias": True}},
    {"first": {"kernel": True, "bias": True}, "third": {"kernel": True}},
    {"first": {"kernel": jnp.ones((10, 6), bool), "bias": True}, "second": {"kernel": True}},
    {"first": {"kernel": jnp.ones((6, 1), bool), "bias": True}, "second": {"kernel": True}},
    True,
)
USES = {
    "a step": lambda p, b, mask: by_magnitude(p, 0.5, mask=mask),
    "a run": lambda p, b, mask: pruning.prune_one_shot(loss_fn, p, b, 0.5, mask=mask),
    "gradients": lambda p, b, mask: pruning.collect_gradients(loss_fn, p, b, 1, mask=mask),
    "fine-tuning": lambda p, b, mask: pruning.keep_pruned(mask).init(p),
}


class TestAnotherModel:
    @pytest.mark.parametrize("other", range(len(OTHERS)))
    @pytest.mark.parametrize("use", USES)
    def test_its_mask_is_an_error(self, use, other):
        with pytest.raises(ValueError, match="mask must match params leaf for leaf"):
            USES[use](*problems.regression(), OTHERS[other])

    @pytest.mark.parametrize("use", USES)
    def test_a_mask_of_numbers_is_an_error(self, use):
        mask = {"first": {"kernel": True, "bias": 1.0}, "second": {"kernel": True}}
        with pytest.raises(ValueError, match=r"mask must be of bool.*first/bias"):
            USES[use](*problems.regression(), mask)


class TestNotFinite:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("method", ["magnitude", "random", "obs"])
    def test_weights_that_are_not_finite_are_named(self, method, bad):
        params, rows = problems.params(), problems.grads()
        params["dense"]["kernel"] = params["dense"]["kernel"].at[2, 3].set(bad)
        with pytest.raises(ValueError, match="finite: NaN or infinity at dense/kernel"):
            problems.prune(params, rows, 0.5, method=method)

    def test_of_leaves_that_are_not_pruned_they_are_not_looked_at(self):
        params = problems.params()
        params["conv"]["bias"] = params["conv"]["bias"].at[0].set(jnp.nan)
        assert by_magnitude(params, 0.5).sparsity == 0.5


class TestTiedWeights:
    def test_one_array_that_is_two_leaves_is_an_error(self):
        kernel = jnp.ones((4, 4))
        params = {
            "a": {"kernel": kernel},
            "b": {"kernel": kernel},
            "c": {"kernel": jnp.ones((4, 4))},
        }
        for call in (
            lambda **options: by_magnitude(params, 0.5, **options),
            lambda **options: pruning.prune_one_shot(
                None, params, [], 0.5, method="magnitude", **options
            ),
        ):
            with pytest.raises(ValueError, match="a/kernel and b/kernel are the same array"):
                call()
            left_out = call(select=lambda path, leaf: path == "c/kernel")
            assert left_out.params["a"]["kernel"] is left_out.params["b"]["kernel"]

    def test_one_that_is_also_an_embedding_is_an_error_too(self):
        table = jnp.ones((6, 4))
        params = {"wte": {"embedding": table}, "head": {"kernel": table}}
        with pytest.raises(ValueError, match="head/kernel and wte/embedding are the same array"):
            by_magnitude(params, 0.5)

    def test_equal_arrays_that_are_not_one_are_pruned_apart(self):
        params = {name: {"kernel": jnp.ones((4, 4))} for name in "ab"}
        assert by_magnitude(params, 0.25).layers[0].kept == 8

    def test_of_nnx_a_shared_parameter_is_one_leaf(self):
        class Tied(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(6, 6, rngs=rngs)
                self.second = nnx.Linear(6, 6, rngs=rngs)
                self.second.kernel = self.first.kernel

            def __call__(self, x):
                return self.second(jnp.tanh(self.first(x)))

        model = Tied(nnx.Rngs(0))
        graphdef, params = nnx.split(model, nnx.Param)

        def loss(params, x):
            return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

        batches = [np.random.default_rng(k).standard_normal((4, 6)) for k in range(16)]
        result = pruning.prune_one_shot(loss, params, batches, 0.5, recomputations=2)
        assert [(layer.path, layer.kept) for layer in result.layers] == [("first/kernel", 18)]
        pruned = nnx.merge(graphdef, result.params)
        assert pruned.second.kernel is pruned.first.kernel
        assert np.mean(pruned.first.kernel[...] == 0) == 0.5

    def test_of_linen_a_shared_embedding_is_one_leaf(self):
        class Tied(nn.Module):
            @nn.compact
            def __call__(self, tokens):
                embed = nn.Embed(8, 6)
                return embed.attend(jnp.tanh(nn.Dense(6)(embed(tokens))))

        tokens = jnp.arange(8)
        params = Tied().init(jax.random.key(0), tokens)["params"]

        def loss(params, tokens):
            outputs = Tied().apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, tokens).mean()

        batches = [np.random.default_rng(k).integers(0, 8, 8) for k in range(16)]
        result = pruning.prune_one_shot(
            loss, params, batches, 0.5, recomputations=2, select=lambda path, leaf: leaf.ndim == 2
        )
        paths = [layer.path for layer in result.layers]
        assert paths == ["Dense_0/kernel", "Embed_0/embedding"]
        assert result.sparsity == 0.5


class TestSavedAndReadAgain:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_training_and_pruning_go_on_bit_for_bit(self, optimizer, tmp_path):
        ocp = pytest.importorskip("orbax.checkpoint")
        params, batches = problems.regression()
        first = by_magnitude(params, 0.5)
        make = {"sgd": lambda: optax.sgd(0.05, momentum=0.9), "adamw": lambda: optax.adamw(0.01)}
        tx = pruning.keep_pruned(first.mask, make[optimizer]())
        params, state = fine_tuned(tx, first.params, tx.init(first.params), batches[:4])
        run = {"params": params, "mask": first.mask, "state": state}

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run", run)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: run))
        assert_trees_equal(restored, run)

        def go_on(run):
            again = pruning.keep_pruned(run["mask"], make[optimizer]())
            params, state = fine_tuned(again, run["params"], run["state"], batches[4:8])
            more = pruning.prune_one_shot(
                loss_fn, params, batches, 0.8, mask=run["mask"], recomputations=2
            )
            state = optax.tree.set(state, mask=more.mask)
            return more.mask, fine_tuned(again, more.params, state, batches[8:])

        assert_trees_equal(go_on(restored), go_on(run))
