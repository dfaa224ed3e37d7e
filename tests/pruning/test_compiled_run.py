"""A run of several steps: compiled once, the same from every storage and on every mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems

loss_fn = problems.regression_loss

COMPILATIONS = [0]


def count_compilation(event, _, **__):
    COMPILATIONS[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_compilation)


def network(seed=0, num_batches=20):
    """A perceptron wide enough for several blocks, and batches for it."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tree = {
        "first": {"kernel": normal(16, 40), "bias": normal(40)},
        "second": {"kernel": normal(40, 8)},
    }
    return tree, [(normal(8, 16), normal(8, 8)) for _ in range(num_batches)]


def run(tree, batches, sparsity=0.8, loss=loss_fn, **options):
    options = {"recomputations": 3, "block_size": 32, **options}
    return pruning.prune_one_shot(loss, tree, batches, sparsity, **options)


def by_hand(tree, batches_of_steps, sparsity=0.8, block_size=32, **options):
    """The same, with gradients that are collected before each step."""
    mask = None
    shares = pruning.geometric_sparsities(0.0, sparsity, len(batches_of_steps))
    for batches, share in zip(batches_of_steps, shares, strict=True):
        number = options.get("num_grads", len(batches))
        how = {name: value for name, value in options.items() if name != "num_grads"}
        rows = pruning.collect_gradients(loss_fn, tree, batches, number, **how)
        result = pruning.prune(tree, rows, share, mask=mask, block_size=block_size)
        tree, mask = result.params, result.mask
    return result


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.mask, other.mask)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def assert_close(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.mask, other.mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        one.params,
        other.params,
    )


PLACING = {"jit(stage)"}  # the result's masks on their devices, at the end


@pytest.fixture
def compilations(caplog):
    """A function that returns the names of what was compiled since it was last called."""
    start = "Finished XLA compilation of "

    def names():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [text[len(start) :].split(" in ")[0] for text in messages if text.startswith(start)]

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        yield names


CASES = {
    "obs": {},
    "blocks of more weights than gradients": {"block_size": 128},
    "the whole matrix": {"block_size": None},
    "independent": {"update": "independent"},
    "greedy": {"method": "greedy"},
    "fisher": {"method": "fisher"},
    "random": {"method": "random", "update": "joint"},
    "n of m": {"structure": pruning.NM(2, 8), "sparsity": None},
    "examples": {"per_example": True},
    "parts of batches": {"micro_batch_size": 3},
    "host": {"storage": "host", "num_grads": 20},
}


class TestCompilation:
    @pytest.mark.parametrize("case", CASES)
    def test_the_second_half_of_the_steps_compiles_nothing(self, case, compilations):
        tree, data = network()
        steps = []

        def batches(params):
            steps.append(compilations())
            return data

        jax.clear_caches()
        run(tree, batches, recomputations=8, **CASES[case])
        steps.append(compilations())
        assert "jit(gradient)" in steps[1] or "jit(of_part)" in steps[1]
        assert [set(names) - PLACING for names in steps[5:]] == [set()] * 4

    @pytest.mark.parametrize("case", CASES)
    def test_a_second_run_compiles_nothing(self, case):
        tree, batches = network()
        first = run(tree, batches, **CASES[case])
        before = COMPILATIONS[0]
        second = run(tree, batches, **CASES[case])
        assert COMPILATIONS[0] == before
        assert_same(first, second)

    def test_nor_does_another_one_of_as_many_weights(self):
        run(*network(0))
        before = COMPILATIONS[0]
        run(*network(1), sparsity=0.7)
        assert COMPILATIONS[0] == before


class TestStorage:
    @pytest.mark.parametrize(
        "options",
        [{}, {"per_example": True}, {"micro_batch_size": 3}, {"block_size": 128}],
        ids=["means", "examples", "parts", "large blocks"],
    )
    @pytest.mark.parametrize("storage", ["host", "folder"])
    def test_results_do_not_depend_on_it(self, storage, options, tmp_path):
        tree, batches = network()
        where = tmp_path / "gradients" if storage == "folder" else storage
        on_device = run(tree, batches, num_grads=20, **options)
        assert_same(run(tree, batches, num_grads=20, storage=where, **options), on_device)

    @pytest.mark.parametrize("storage", ["device", "host", "folder"])
    def test_without_a_number_it_is_what_the_batches_give(self, storage, tmp_path):
        tree, batches = network()
        where = tmp_path / "gradients" if storage == "folder" else storage
        assert_same(run(tree, batches, storage=where), run(tree, batches, num_grads=20))

    def test_each_step_has_the_gradients_of_its_weights(self):
        tree, batches = network()
        assert_same(run(tree, batches), by_hand(tree, [batches] * 3))

    @pytest.mark.parametrize("micro_batch_size", [None, 3, 8])
    def test_gradients_of_examples(self, micro_batch_size):
        tree, batches = network()
        options = {"per_example": True, "micro_batch_size": micro_batch_size, "num_grads": 50}
        assert_same(run(tree, batches, **options), by_hand(tree, [batches] * 3, **options))

    def test_means_over_parts_of_batches_are_those_of_the_batches(self):
        tree, batches = network()
        parts = run(tree, batches, micro_batch_size=3)
        assert_close(parts, run(tree, batches))
        assert_same(parts, by_hand(tree, [batches] * 3, micro_batch_size=3))


class TestNumberOfGradients:
    def test_by_default_it_is_sixty_four(self):
        tree, batches = network(num_batches=70)
        stream = iter(batches)
        found = run(tree, stream, recomputations=1)
        assert next(stream) is batches[64]
        assert_same(found, run(tree, batches, recomputations=1, num_grads=64))

    def test_by_default_of_examples_too(self):
        tree, batches = network()
        found = run(tree, batches, per_example=True)
        assert_same(found, run(tree, batches, per_example=True, num_grads=64))

    @pytest.mark.parametrize("number", [16, 63])
    def test_fewer_batches_are_all_taken(self, number):
        tree, batches = network(num_batches=number)
        assert_same(run(tree, batches), run(tree, batches, num_grads=number))

    @pytest.mark.parametrize("number", [1, 15])
    def test_below_sixteen_there_is_a_warning_where_the_user_calls(self, number):
        tree, batches = network(num_batches=number)
        with pytest.warns(
            UserWarning, match=f"batches gave only {number} gradients, too few"
        ) as caught:
            found = run(tree, batches)
        assert {warning.filename for warning in caught} == {__file__}
        assert_same(found, run(tree, batches, num_grads=number))

    def test_a_number_that_is_asked_for_must_be_there(self):
        tree, batches = network()
        with pytest.raises(ValueError, match="batches gave 20 gradients, but num_grads=21"):
            run(tree, batches, num_grads=21)

    def test_none_at_all_is_an_error(self):
        tree, _ = network()
        with pytest.raises(ValueError, match="batches gave 0 gradients"):
            run(tree, [])


class TestIterator:
    def test_each_step_goes_on_where_the_last_one_stopped(self):
        tree, batches = network(num_batches=60)
        found = run(tree, iter(batches), num_grads=20)
        assert_same(found, by_hand(tree, [batches[:20], batches[20:40], batches[40:]]))

    def test_it_is_read_no_further_than_needed(self):
        tree, batches = network(num_batches=40)
        stream = iter(batches)
        run(tree, stream, num_grads=12)
        assert next(stream) is batches[36]

    def test_one_that_ends_in_a_later_step_is_an_error(self):
        tree, batches = network(num_batches=40)
        with pytest.raises(
            ValueError, match=r"batches gave 0 gradients.*an iterable that restarts"
        ):
            run(tree, iter(batches))
        with pytest.raises(ValueError, match="batches gave 8 gradients, but num_grads=16"):
            run(tree, iter(batches), num_grads=16)

    def test_a_later_step_may_have_fewer(self):
        tree, batches = network(num_batches=64 + 20)
        found = run(tree, iter(batches), recomputations=2)
        assert_same(found, by_hand(tree, [batches[:64], batches[64:]]))


SPECS = {
    "first": {"kernel": jax.P(None, "x"), "bias": jax.P("x")},
    "second": {"kernel": jax.P("x")},
}
NAMES = {"automatic": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}


def sharded(tree, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(NAMES[kind],))
    shardings = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, jax.P)
    )
    return jax.device_put(tree, shardings), mesh


def sharded_loss(mesh, kind):
    """The loss, where types tell how arrays are sharded."""
    if kind == "automatic":
        return loss_fn

    def loss(tree, inputs, targets):
        first, second = tree["first"], tree["second"]
        hidden = jnp.tanh(inputs @ first["kernel"] + first["bias"])
        outputs = jnp.dot(hidden, second["kernel"], out_sharding=jax.NamedSharding(mesh, jax.P()))
        return jnp.mean((outputs - targets) ** 2)

    return loss


@pytest.fixture
def fetched(monkeypatch):
    """The sizes of all arrays on several devices whose values the host has asked for."""
    kind, sizes = type(jnp.zeros(())), []
    value = kind._value.fget

    def spied(array):
        sizes.append(array.size)
        return value(array)

    monkeypatch.setattr(kind, "_value", property(spied))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    np.asarray(jax.device_put(jnp.ones(16), jax.NamedSharding(mesh, jax.P("x"))))
    assert sizes == [16]
    sizes.clear()
    return sizes


@pytest.mark.parametrize("kind", NAMES)
class TestDevices:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"block_size": 128},
            {"block_size": None},
            {"method": "greedy"},
            {"structure": pruning.NM(2, 4), "sparsity": None},
        ],
        ids=["blocks", "large blocks", "whole matrix", "greedy", "n of m"],
    )
    def test_sharded_params_are_pruned_as_on_one_device(self, kind, options):
        tree, batches = network()
        spread, mesh = sharded(tree, kind)
        found = run(spread, batches, loss=sharded_loss(mesh, kind), **options)
        assert_close(found, run(tree, batches, **options))
        for result in (found.params, found.mask["first"]["kernel"], found.mask["second"]):
            for leaf in jax.tree.leaves(result):
                assert isinstance(leaf.sharding, jax.NamedSharding)
                assert leaf.sharding.mesh.size == 8

    @pytest.mark.parametrize("options", [{}, {"block_size": None}, {"method": "greedy"}])
    def test_also_where_the_mesh_is_set(self, kind, options):
        tree, batches = network()
        spread, mesh = sharded(tree, kind)
        with jax.set_mesh(mesh):
            found = run(spread, batches, loss=sharded_loss(mesh, kind), **options)
        assert_close(found, run(tree, batches, **options))

    def test_gradients_stay_on_the_devices(self, kind, fetched):
        """The host sees vectors of the weights, however many gradients there are."""
        tree, batches = network(num_batches=64)
        spread, mesh = sharded(tree, kind)
        size = 16 * 40 + 40 * 8
        result = run(spread, batches, loss=sharded_loss(mesh, kind), recomputations=2)
        assert [layer.size for layer in result.layers] == [640, 320]
        assert max(fetched) <= size
        assert sum(fetched) < 64 * size / 2  # of 128 gradients

    def test_a_second_run_compiles_nothing(self, kind):
        tree, batches = network()
        spread, mesh = sharded(tree, kind)
        loss = sharded_loss(mesh, kind)
        run(spread, batches, loss=loss)
        before = COMPILATIONS[0]
        run(spread, batches, loss=loss)
        assert COMPILATIONS[0] == before

    @pytest.mark.parametrize("storage", ["host", "folder"])
    def test_results_do_not_depend_on_the_storage(self, kind, storage, tmp_path):
        tree, batches = network()
        spread, mesh = sharded(tree, kind)
        where = tmp_path / "gradients" if storage == "folder" else storage
        options = {"loss": sharded_loss(mesh, kind), "num_grads": 20}
        on_devices = run(spread, batches, **options)
        assert_close(run(spread, batches, storage=where, **options), on_devices)

    def test_collected_gradients_prune_alike(self, kind):
        tree, batches = network()
        spread, mesh = sharded(tree, kind)
        loss = sharded_loss(mesh, kind)
        rows = pruning.collect_gradients(loss, spread, batches, 20)
        found = pruning.prune(spread, rows, 0.8, block_size=32)
        assert_close(found, by_hand(tree, [batches]))


def test_a_mesh_may_be_given():
    tree, batches = network()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    assert_close(run(tree, batches, mesh=mesh), run(tree, batches))


@pytest.mark.parametrize("block_size", [128, 16, None])
def test_fewer_weights_than_a_block_are_pruned_on_a_mesh(block_size):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.random.normal(jax.random.key(0), (9, 8))
    inputs = jax.random.normal(jax.random.key(1), (80, 4, 9))

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["kernel"]) ** 2)

    options = {"recomputations": 2, "block_size": block_size}
    alone = pruning.prune_one_shot(loss, {"kernel": kernel}, list(inputs), 0.5, **options)
    everywhere = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P()))
    spread = pruning.prune_one_shot(loss, {"kernel": everywhere}, list(inputs), 0.5, **options)
    np.testing.assert_array_equal(spread.mask["kernel"], alone.mask["kernel"])
    np.testing.assert_allclose(
        spread.params["kernel"], alone.params["kernel"], rtol=1e-3, atol=1e-5
    )
