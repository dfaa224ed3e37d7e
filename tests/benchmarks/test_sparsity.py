"""The pruning benchmark: its contestants, what it keeps of a run, and its tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparsity import networks, published, report
from sparsity.experiment import Cell, run
from sparsity.methods import METHODS, Target
from training.tasks.task import Task, Variables, warmup_cosine

import curvax


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(16)(x)))


def tiny_task(_):
    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    labels = jnp.argmax(inputs[:, :4], axis=1)

    def evaluate(variables, split):
        logits = Net().apply({"params": variables.params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"loss": float(losses.mean()), "error": float((logits.argmax(1) != labels).mean())}

    return Task(
        name="tiny",
        words="a tiny network",
        metric="loss",
        data=(inputs, labels),
        num_examples=64,
        batch_size=16,
        steps=60,
        evaluations=1,
        init=lambda key: Variables(Net().init(key, inputs)["params"], {}),
        apply=lambda params, x, statistics, _: (Net().apply({"params": params}, x), statistics),
        loss=curvax.softmax_cross_entropy,
        sample=lambda data, indices, _: (data[0][indices], data[1][indices]),
        evaluate=evaluate,
        schedule=warmup_cosine,
        model=Net(),
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.RECIPES, "tiny", networks.Recipe(tiny_task, 0.02, 4, 64))
        patch.setattr(networks, "FOLDER", tmp_path_factory.mktemp("networks"))
        yield networks.Network("tiny", None)


@pytest.mark.parametrize("target", ["0.5", "2:4"])
@pytest.mark.parametrize(
    "method", ["magnitude", "OBS", "layer by layer", "gradual, magnitude", "on schedule, magnitude"]
)
def test_a_contestant_prunes_to_its_target(network, method, target):
    result = run(Cell("tiny", method, target, 0), network)
    assert result["zeros"] == pytest.approx(0.5, abs=0.01)
    assert np.isfinite(result["loss"])


@pytest.mark.parametrize("block_size", [4, 7, 10])
def test_the_published_recurrences_are_the_inverse_of_each_block(block_size):
    rng = np.random.default_rng(0)
    grads, vector = rng.normal(size=(6, 10)), rng.normal(size=10)
    inverse = published.Inverse.of(grads, 0.1, block_size)
    matrix = 0.1 * np.eye(10) + grads.T @ grads / 6
    same = np.arange(10) // block_size
    exact = np.linalg.inv(np.where(same[:, None] == same, matrix, 0))
    np.testing.assert_allclose(inverse.diagonal(10), np.diag(exact), rtol=1e-12)
    np.testing.assert_allclose(inverse.solve(vector), exact @ vector, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_published_pruner_is_that_of_curvax_with_its_options(num_steps):
    with jax.enable_x64(True):
        keys = {"a": jax.random.key(0), "b": jax.random.key(1)}
        params = {name: {"kernel": jax.random.normal(key, (9, 8))} for name, key in keys.items()}
        inputs = jax.random.normal(jax.random.key(2), (12, 5, 9))

        def loss(params, x):
            return jnp.mean(jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"].T)

        plain = published.prune(
            lambda params: [jax.grad(loss)(params, x) for x in inputs],
            params,
            0.7,
            num_steps=num_steps,
            block_size=20,
        )
        ours = curvax.pruning.prune_one_shot(
            loss,
            params,
            list(inputs),
            0.7,
            recomputations=num_steps,
            num_grads=12,
            update="independent",
            damping=1e-5,
            relative_damping=False,
            block_size=20,
        ).params
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(np.asarray(one) == 0, np.asarray(other) == 0)


def test_the_published_pruner_reads_kernels_in_the_order_of_pytorch():
    kernel = jnp.arange(24.0).reshape(3, 1, 2, 4)
    params = {"conv": {"kernel": kernel, "bias": jnp.ones(4)}}
    torch_order = np.asarray(kernel).transpose(3, 2, 0, 1).ravel()
    np.testing.assert_array_equal(published.flat(params), torch_order)
    back = published.with_flat(params, 2 * torch_order)
    np.testing.assert_array_equal(back["conv"]["kernel"], 2 * kernel)
    np.testing.assert_array_equal(back["conv"]["bias"], 1)


def test_a_network_is_trained_once(network):
    first, second = network.trained(0), network.trained(0)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_targets_are_shares_or_n_of_m():
    assert Target.of("0.9") == Target("90%", 0.9)
    assert Target.of("2:4").structure == curvax.pruning.NM(2, 4)


def test_a_table_has_the_mean_and_deviation_of_each_method_and_target():
    runs = {
        Cell("shakespeare", "dense", "0.5", seed): {"loss": 0.0, "seconds": 0.0, "bytes": 0}
        for seed in (0, 1)
    }
    for seed, loss in enumerate((np.log(2.0), np.log(4.0))):
        cell = Cell("shakespeare", "magnitude", "0.5", seed)
        runs[cell] = {"loss": loss, "seconds": 2.0, "bytes": 2**20}
    lines = list(report.page(runs))
    assert "| magnitude | 3.000 ± 1.414 |" in lines
    assert "| magnitude | 2 | 1 |" in lines


def test_a_method_with_fewer_seeds_is_compared_with_the_networks_of_these():
    losses = {"dense": (1.0, 2.0, 3.0), "magnitude": (1.5, 3.5, None)}
    runs = {
        Cell("shakespeare", method, "0.5", seed): {"loss": np.log(perplexity)}
        for method, perplexities in losses.items()
        for seed, perplexity in enumerate(perplexities)
        if perplexity
    }
    lines = list(report.metric_table(runs))
    assert "of the dense networks 2.000 ± 1.000, 3 seeds." in lines[0]
    assert lines[-1] == "| magnitude | 3.000 ± 0.707 (2 seeds) |"


def test_the_picture_has_a_panel_for_each_network_with_three_sparsities():
    numbers = {"loss": 1.0, "error": 0.5}
    targets = {"shakespeare": ("0.5", "2:4", "0.8"), "cifar-resnet": ("0.9", "0.5", "0.8")}
    runs = {
        Cell(network, "magnitude", target, seed): numbers
        for network, own in targets.items()
        for target in own
        for seed in (0, 1)
    }
    assert report.curves_of(runs, "cifar-resnet") == {
        "magnitude": {50.0: 50.0, 80.0: 50.0, 90.0: 50.0}
    }
    (panel,) = report.plot(runs).axes
    assert panel.get_title(loc="left") == report.METRICS["cifar-resnet"].title


def test_every_method_has_a_name_of_its_own_in_the_picture():
    assert set(report.SHOWN) <= set(METHODS)


def test_the_documentation_has_the_tables_of_the_committed_runs():
    text = (report.DOCS / "pruning.md").read_text()
    assert report.with_tables(text, report.read_runs()) == text
