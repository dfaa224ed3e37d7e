"""Statistics of batch normalization, estimated anew: plain means over batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curvax import pruning

every_seed = pytest.mark.parametrize("seed", range(3))
every_momentum = pytest.mark.parametrize("momentum", [0.99, 0.9, 0.0])


def batches_of(seed, number=5, shape=(16, 6), scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(shift + scale * rng.standard_normal(shape), jnp.float32) for _ in range(number)
    ]


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def assert_trees_close(actual, expected, rtol=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), actual, expected
    )


class Normalized(nn.Module):
    """A dense layer between two normalizations."""

    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="first")(x)
        x = nn.Dense(4, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="second")(x)


def linen(momentum=0.99, seed=0):
    """Weights, statistics that are wrong, and the pass in training mode."""
    model = Normalized(momentum)
    variables = model.init(jax.random.key(seed), jnp.ones((2, 6)), train=False)
    statistics = jax.tree.map(lambda leaf: leaf + 7, variables["batch_stats"])

    def update_statistics(params, statistics, x):
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return variables["params"], statistics, update_statistics


def means_and_variances(params, batches, epsilon=1e-5):
    """The mean over batches of what both normalizations see, in float64."""
    weights, rows = float64(params), []
    for x in float64(batches):
        first = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
        hidden = (x - first["mean"]) / np.sqrt(first["var"] + epsilon)
        hidden = hidden * weights["first"]["scale"] + weights["first"]["bias"]
        hidden = hidden @ weights["dense"]["kernel"] + weights["dense"]["bias"]
        second = {"mean": hidden.mean(axis=0), "var": hidden.var(axis=0)}
        rows.append({"first": first, "second": second})
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *rows)


class TestLinen:
    @every_seed
    @every_momentum
    def test_they_are_the_mean_over_batches_of_the_batches_own(self, momentum, seed):
        params, statistics, update = linen(momentum, seed)
        batches = batches_of(seed, scale=3.0, shift=0.5)
        found = pruning.reestimate_statistics(update, params, statistics, batches)
        assert_trees_close(found, means_and_variances(params, batches))

    @every_momentum
    def test_statistics_in_bfloat16_are_as_right_as_it_has_digits(self, momentum):
        params, statistics, update = linen(momentum)
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), statistics)
        batches = batches_of(0, scale=3.0, shift=20.0)
        found = pruning.reestimate_statistics(update, params, narrow, batches)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(np.asarray(a, float), b, rtol=1e-2, atol=1e-2),
            found,
            means_and_variances(params, batches),
        )

    def test_the_momentum_and_the_old_values_do_not_matter(self):
        batches = batches_of(0)
        found = []
        for momentum in (0.99, 0.9):
            params, statistics, update = linen(momentum)
            for shift in (0.0, 1e4):
                old = jax.tree.map(lambda leaf, s=shift: leaf + s, statistics)
                found.append(pruning.reestimate_statistics(update, params, old, batches))
        for other in found[1:]:
            assert_trees_close(other, found[0])

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0, 3e3, 1e5])
    @every_momentum
    def test_they_are_right_at_every_scale_of_the_inputs(self, momentum, scale):
        params, statistics, update = linen(momentum)
        batches = batches_of(1, scale=scale, shift=scale)
        found = pruning.reestimate_statistics(update, params, statistics, batches)
        expected = means_and_variances(params, batches)
        for name in ("mean", "var"):
            np.testing.assert_allclose(found["first"][name], expected["first"][name], rtol=1e-3)

    def test_they_are_those_of_the_weights_of_now(self):
        params, statistics, update = linen()
        batches = batches_of(0)
        pruned = pruning.prune(params, None, 0.5, method="magnitude").params
        found = pruning.reestimate_statistics(update, pruned, statistics, batches)
        assert_trees_close(found, means_and_variances(pruned, batches))

    def test_one_batch_and_an_iterator_are_enough(self):
        params, statistics, update = linen()
        batches = batches_of(0, number=1)
        found = pruning.reestimate_statistics(update, params, statistics, iter(batches))
        assert_trees_close(found, means_and_variances(params, batches))

    def test_dtypes_and_structure_stay(self):
        params, statistics, update = linen()
        found = pruning.reestimate_statistics(update, params, statistics, batches_of(0))
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, statistics)

    def test_the_pass_is_compiled_once(self):
        params, statistics, update = linen()
        traces = []

        def counted(params, statistics, x):
            traces.append(1)
            return update(params, statistics, x)

        for _ in range(2):
            pruning.reestimate_statistics(counted, params, statistics, batches_of(0))
        assert len(traces) == 3  # one program, in which the pass is called three times


class NormalizedNnx(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class TestNnx:
    @every_seed
    @every_momentum
    def test_a_state_of_batch_statistics_is_taken(self, momentum, seed):
        model = NormalizedNnx(momentum, nnx.Rngs(seed))
        graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

        def update(params, statistics, x):
            merged = nnx.merge(graphdef, params, statistics)
            merged.train()
            merged(x)
            return nnx.state(merged, nnx.BatchStat)

        batches = batches_of(seed, scale=2.0)
        found = pruning.reestimate_statistics(update, params, statistics, batches)
        kernel, bias = float64((model.dense.kernel[...], model.dense.bias[...]))
        hidden = [x @ kernel + bias for x in float64(batches)]
        merged = nnx.merge(graphdef, params, found)
        means = np.mean([rows.mean(axis=0) for rows in hidden], axis=0)
        variances = np.mean([rows.var(axis=0) for rows in hidden], axis=0)
        np.testing.assert_allclose(merged.norm.mean[...], means, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(merged.norm.var[...], variances, rtol=1e-4)


class TestWhatAPassDoesNotChange:
    @staticmethod
    def update(params, statistics, x):
        decayed = 0.9 * statistics["mean"] + 0.1 * jnp.mean(x)
        return {**statistics, "mean": decayed}

    @pytest.mark.parametrize("number", [1, 3, 7, 10])
    def test_it_is_returned_bit_for_bit(self, number):
        frozen = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
        statistics = {"mean": jnp.ones(()), "frozen": frozen}
        batches = batches_of(0, number)
        found = pruning.reestimate_statistics(self.update, None, statistics, batches)
        np.testing.assert_array_equal(found["frozen"], frozen)

    def test_a_frozen_layer_keeps_its_statistics(self):
        def update(params, statistics, x):
            return {"frozen": statistics["frozen"], "own": jnp.mean(x)}

        statistics = {"frozen": jnp.array([3e5, 1e-5]), "own": jnp.ones(())}
        batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
        found = pruning.reestimate_statistics(update, None, statistics, batches)
        np.testing.assert_array_equal(found["frozen"], statistics["frozen"])
        assert found["own"] == 4

    @pytest.mark.parametrize(
        "other", [jnp.array([3, 4]), jnp.array([True, False]), jax.random.key(3)]
    )
    def test_integers_flags_and_keys_stay(self, other):
        statistics = {"mean": jnp.ones(()), "other": other}
        batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
        found = pruning.reestimate_statistics(self.update, None, statistics, batches)
        assert found["other"].dtype == other.dtype
        assert jnp.all(found["other"] == other)
        np.testing.assert_allclose(found["mean"], 4, rtol=1e-5)

    def test_a_counter_stays_though_the_pass_counts(self):
        def update(params, statistics, x):
            return {"count": statistics["count"] + 1, "mean": jnp.mean(x)}

        statistics = {"count": jnp.array(5), "mean": jnp.zeros(())}
        found = pruning.reestimate_statistics(update, None, statistics, batches_of(0))
        assert found["count"] == 5


def test_no_batches_are_an_error():
    params, statistics, update = linen()
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        pruning.reestimate_statistics(update, params, statistics, [])


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


@pytest.fixture(scope="module")
def run():
    model = ConvNet()
    images = batches_of(0, number=16, shape=(8, 6, 6, 2))
    labels = batches_of(1, number=16, shape=(8, 3))
    variables = model.init(jax.random.key(0), images[0])
    calls = []

    def update(params, statistics, x):
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def loss(params, statistics, x, y):
        outputs = model.apply({"params": params, "batch_stats": statistics}, x)
        return jnp.mean((outputs - y) ** 2)

    def batches(params):
        statistics = pruning.reestimate_statistics(
            update, params, variables["batch_stats"], images[:4]
        )
        calls.append((params, statistics))
        return [(statistics, x, y) for x, y in zip(images, labels, strict=True)]

    result = pruning.prune_one_shot(loss, variables["params"], batches, 0.6, recomputations=3)
    return variables, loss, images, labels, calls, result


class TestInARun:
    """The batches of each step hold the statistics of its weights."""

    def test_they_are_asked_for_once_a_step(self, run):
        variables, *_, calls, _ = run
        assert len(calls) == 3
        jax.tree.map(np.testing.assert_array_equal, calls[0][0], variables["params"])

    def test_with_the_weights_of_that_step(self, run):
        *_, calls, result = run
        total = sum(layer.size for layer in result.layers)
        shares = pruning.geometric_sparsities(0.0, 0.6, 3)
        for (params, _), share in zip(calls, [0.0, *shares], strict=False):
            masks = jax.tree.leaves(pruning.mask_of_zeros(params))
            assert sum(int(np.sum(~mask)) for mask in masks) == int(share * total + 1e-6)

    def test_and_the_gradients_are_those_with_these_statistics(self, run):
        variables, loss, images, labels, calls, result = run
        params, mask = variables["params"], None
        shares = pruning.geometric_sparsities(0.0, 0.6, 3)
        for (seen, statistics), share in zip(calls, shares, strict=True):
            jax.tree.map(np.testing.assert_array_equal, seen, params)
            batches = [(statistics, x, y) for x, y in zip(images, labels, strict=True)]
            rows = pruning.collect_gradients(loss, params, batches, 16)
            step = pruning.prune(params, rows, share, mask=mask)
            params, mask = step.params, step.mask
        jax.tree.map(np.testing.assert_array_equal, result.mask, mask)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result.params, params
        )


class Spectral(nn.Module):
    """Statistics of two kinds: a spectral normalization's, and of what comes after it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(8, name="dense"), name="spectral")(x, update_stats=train)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)


class TestSpectralNormalization:
    """Its vector is no mean over batches: it goes on as in training."""

    @staticmethod
    def run(batches, number):
        model = Spectral()
        variables = model.init(jax.random.key(0), batches[0], train=False)
        params = jax.tree.map(lambda leaf: 10 * leaf, variables["params"])

        def update(params, statistics, x):
            variables = {"params": params, "batch_stats": statistics}
            return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        trained = variables["batch_stats"]
        for _ in range(number):
            for x in batches:
                trained = update(params, trained, x)
        found = pruning.reestimate_statistics(update, params, trained, batches)
        return params, trained, found

    def test_the_norm_stays_the_largest_singular_value(self):
        params, _, found = self.run(batches_of(0), 20)
        (kernel,) = (leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
        sigma = found["spectral"]["dense/kernel/sigma"]
        np.testing.assert_allclose(sigma, np.linalg.norm(kernel, 2), rtol=1e-4)

    def test_its_vector_goes_on_from_batch_to_batch(self):
        batches = batches_of(0)
        _, once, _ = self.run(batches, 1)
        _, twice, _ = self.run(batches, 2)
        _, _, found = self.run(batches, 1)
        vectors = [tree["spectral"]["dense/kernel/u"] for tree in (once, twice, found)]
        np.testing.assert_allclose(vectors[2], vectors[1], rtol=1e-4)
        assert not np.allclose(vectors[0], vectors[1])

    def test_the_statistics_after_it_are_those_of_the_normalized_layer(self):
        batches = batches_of(0, shift=1.0)
        params, _, found = self.run(batches, 20)
        (kernel,) = (leaf for leaf in jax.tree.leaves(float64(params)) if leaf.ndim == 2)
        hidden = [x @ (kernel / np.linalg.norm(kernel, 2)) for x in float64(batches)]
        expected = {
            "mean": np.mean([rows.mean(axis=0) for rows in hidden], axis=0),
            "var": np.mean([rows.var(axis=0) for rows in hidden], axis=0),
        }
        assert_trees_close(found["norm"], expected, rtol=1e-3)
