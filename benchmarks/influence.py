"""Influence scores on digits: what they predict of retrained networks, and wrong labels they find.

    python benchmarks/influence.py
    python benchmarks/influence.py --subsets 20 --seeds 2 --models 1 --output build
    python benchmarks/influence.py --ekfac-python path/to/python  # that has kronfluence

Two parts. ``datamodel``: networks of scikit-learn's digits are retrained on random halves of the
training set, and the linear datamodeling score says how well the scores of networks trained on all
of it predict their outputs: gradient products, curvax, and EK-FAC by kronfluence on the same
weights, in a process of its own. ``labels``: a tenth of the labels is wrong, and the tenth of the
examples with the largest self-influence is checked. JSON and tables go to benchmarks/results/ under
the hardware's name; retrained outputs are kept in build/influence/.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
from influence_report import table
from sklearn.datasets import load_digits
from tqdm import tqdm

from curvax import influence

FOLDER = Path(__file__).parents[1] / "build" / "influence"
WIDTHS = (64, 32, 10)
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the mean diagonal
STEPS, RATE, MOMENTUM = 400, 0.3, 0.9


class Setting(NamedTuple):
    """A network and its weight decay."""

    activation: str
    weight_decay: float


SETTINGS = {"tanh": Setting("tanh", 1e-3), "relu": Setting("relu", 1e-4)}


class Data(NamedTuple):
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits(num_train: int, num_test: int) -> Data:
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))[: num_train + num_test]
    inputs, labels = (inputs[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return Data((inputs[:num_train], labels[:num_train]), (inputs[num_train:], labels[num_train:]))


# --- The network ---


def initial_params(key: jax.Array) -> Any:
    first, second = jax.random.split(key)
    return {
        "first": {"w": jax.random.normal(first, WIDTHS[:2]) / 8, "b": jnp.zeros(WIDTHS[1])},
        "second": {"w": jax.random.normal(second, WIDTHS[1:]) / 6, "b": jnp.zeros(WIDTHS[2])},
    }


def logits(params: Any, inputs: jax.Array, *, activation: str) -> jax.Array:
    act = {"tanh": jnp.tanh, "relu": jax.nn.relu}[activation]
    hidden = act(inputs @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]["w"] + params["second"]["b"]


NETWORKS = {name: functools.partial(logits, activation=name) for name in ("tanh", "relu")}


def losses(network: Any, params: Any, inputs: Any, labels: Any) -> jax.Array:
    log_probs = jax.nn.log_softmax(network(params, inputs))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def margins(network: Any, params: Any, inputs: Any, labels: Any) -> jax.Array:
    """The logit of the right class, minus the log-sum-exp of the others."""
    outputs = network(params, inputs)
    right = jax.nn.one_hot(labels, WIDTHS[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(right, -jnp.inf, outputs), axis=1)
    return jnp.sum(jnp.where(right, outputs, 0), axis=1) - others


def training(setting: Setting, data: Any) -> Callable[..., Any]:
    """``(key, weights of the examples) -> params``: full batches, so the key is all the noise."""
    network = NETWORKS[setting.activation]

    def objective(params: Any, weights: jax.Array) -> jax.Array:
        fit = jnp.sum(weights * losses(network, params, *data)) / jnp.sum(weights)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return fit + setting.weight_decay / 2 * squares

    def train(key: jax.Array, weights: jax.Array) -> Any:
        params = initial_params(key)

        def step(state: Any, _: Any) -> Any:
            params, velocity = state
            grads = jax.grad(objective)(params, weights)
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
            return (jax.tree.map(lambda p, v: p - RATE * v, params, velocity), velocity), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, (params, zeros), length=STEPS)[0][0]

    return jax.jit(train)


# --- The linear datamodeling score ---


def retrained(args: argparse.Namespace, name: str, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Subsets, and minus the losses and the margins of networks that were trained on them.

    The second is of shape (num_subsets, seeds, 2, num_test).
    """
    shape = f"{args.train}_{args.test}_{args.subsets}_{args.seeds}"
    path = FOLDER / f"retrained_{name}_{shape}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *_retrain(args, SETTINGS[name], data))
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def _retrain(args: argparse.Namespace, setting: Setting, data: Data) -> tuple[Any, Any]:
    generator = np.random.default_rng(1)
    halves = [generator.permutation(args.train) < args.train // 2 for _ in range(args.subsets)]
    train, network = training(setting, data.train), NETWORKS[setting.activation]

    @jax.jit
    def outputs(keys: jax.Array, weights: jax.Array) -> jax.Array:
        def of_one(key: jax.Array) -> jax.Array:
            params = train(key, weights)
            found = -losses(network, params, *data.test), margins(network, params, *data.test)
            return jnp.stack(found)

        return jax.vmap(of_one)(keys)

    keys = jax.random.split(jax.random.key(1), args.seeds)
    found = [outputs(keys, half.astype(np.float32)) for half in tqdm(halves, desc="retraining")]
    return np.stack(halves), np.stack(found)


def datamodel(args: argparse.Namespace) -> dict[str, Any]:
    data = digits(args.train, args.test)
    return {name: _datamodel(args, name, data) for name in args.settings}


def _datamodel(args: argparse.Namespace, name: str, data: Data) -> dict[str, Any]:
    subsets, outputs = retrained(args, name, data)
    setting = SETTINGS[name]
    train, network = training(setting, data.train), NETWORKS[setting.activation]
    keys = jax.random.split(jax.random.key(2), args.models)
    models = [train(key, jnp.ones(args.train)) for key in keys]
    correct = [np.argmax(network(params, data.test[0]), 1) == data.test[1] for params in models]
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for index, params in enumerate(tqdm(models, desc=f"scores, {name}")):
        for method, scores in _all_scores(args, setting, params, data, index).items():
            found.setdefault(method, []).append(scores)
    rows = {}
    for place, measure in enumerate(("loss", "margin")):
        measured = outputs[:, :, place].mean(axis=1)
        of_methods = {
            method: [scores[measure] for scores in of_models] for method, of_models in found.items()
        }
        rows[measure] = _scored(of_methods, subsets, measured)
        rows[measure]["seeds agree"] = _agreement(outputs[:, :, place])
    rows["accuracy"] = float(np.mean(correct))
    rows["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(models[0]))
    return rows


def _scored(
    methods: dict[str, list[np.ndarray]], subsets: np.ndarray, measured: np.ndarray
) -> dict[str, Any]:
    """Scores with standard errors by the bootstrap over subsets, the same draws for each method."""
    generator = np.random.default_rng(2)
    draws = [generator.integers(len(subsets), size=len(subsets)) for _ in range(100)]
    values, resampled = {}, {}
    for method, of_models in methods.items():
        values[method] = [_lds(scores, subsets, measured) for scores in of_models]
        first = of_models[0]
        resampled[method] = np.array([_lds(first, subsets[d], measured[d]) for d in draws])
    base = resampled["gradient products"]
    rows: dict[str, Any] = {
        method: {
            "value": float(np.mean(numbers)),
            "over_models": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
            "standard_error": float(np.std(resampled[method], ddof=1)),
            "margin": float(np.mean(numbers) - np.mean(values["gradient products"])),
            "margin_error": float(np.std(resampled[method] - base, ddof=1)),
        }
        for method, numbers in values.items()
    }
    peers = [method for method in methods if method.startswith("EK-FAC")]
    if peers:
        best = max(peers, key=lambda method: rows[method]["value"])
        rows["above EK-FAC"] = {
            "best": best,
            "value": rows["Gauss-Newton"]["value"] - rows[best]["value"],
            "standard_error": float(np.std(resampled["Gauss-Newton"] - resampled[best], ddof=1)),
        }
    return rows


def _lds(scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray) -> float:
    return influence.linear_datamodeling_score(scores, subsets, measured).value


def _agreement(outputs: np.ndarray) -> float | None:
    """The rank correlation of the means over either half of the seeds: what noise leaves."""
    half = outputs.shape[1] // 2
    if not half:
        return None
    first, second = outputs[:, :half].mean(axis=1), outputs[:, half : 2 * half].mean(axis=1)
    ranks = (np.argsort(np.argsort(x, axis=0), axis=0) for x in (first, second))
    pairs = zip(*(r.T for r in ranks), strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def _all_scores(
    args: argparse.Namespace, setting: Setting, params: Any, data: Data, index: int
) -> dict[str, dict[str, np.ndarray]]:
    """For each method the scores for both measures."""
    network = NETWORKS[setting.activation]
    measures = {
        "loss": lambda params, *batch: -jnp.mean(losses(network, params, *batch)),
        "margin": lambda params, *batch: jnp.mean(margins(network, params, *batch)),
    }
    results = {
        method: {
            name: function.scores(data.test, measure=measure).scores
            for name, measure in measures.items()
        }
        for method, function in _functions(network, setting, params, data).items()
    }
    products, cosines = {}, {}
    train = _flat_gradients(lambda p, *batch: jnp.mean(losses(network, p, *batch)), params, data[0])
    for name, measure in measures.items():
        test = _flat_gradients(measure, params, data.test)
        products[name] = -test @ train.T
        cosines[name] = products[name] / np.linalg.norm(train, axis=1)
    results |= {"gradient products": products, "gradient cosines": cosines}
    return results | (_ekfac(args, setting, params, data, index) if args.ekfac_python else {})


def _functions(
    network: Any, setting: Setting, params: Any, data: Data
) -> dict[str, influence.InfluenceFunction]:
    def loss_fn(params: Any, *batch: Any) -> jax.Array:
        return jnp.mean(losses(network, params, *batch))

    gauss_newton = functools.partial(
        influence.ggn_influence, network, "softmax_cross_entropy", params, data.train
    )
    fisher = functools.partial(influence.empirical_fisher_influence, loss_fn, params, data.train)
    default = gauss_newton()
    functions = {"Gauss-Newton": default, "empirical Fisher": fisher()}
    for factor in DAMPINGS:
        functions[f"Gauss-Newton, {factor:g} x"] = gauss_newton(damping=factor * default.damping)
    functions["Gauss-Newton, weight decay"] = gauss_newton(damping=setting.weight_decay)
    functions["Gauss-Newton, one direction"] = gauss_newton(num_directions=1)
    for size in (1024, 256):
        functions[f"Gauss-Newton, blocks of {size}"] = gauss_newton(
            damping=0.1 * default.damping, block_size=size
        )
    return functions


def _flat_gradients(loss_fn: Any, params: Any, batch: Any) -> np.ndarray:
    def of_one(*example: Any) -> Any:
        return jax.grad(loss_fn)(params, *(x[None] for x in example))

    leaves = jax.tree.leaves(jax.jit(jax.vmap(of_one))(*batch))
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in leaves], axis=1)


def _ekfac(
    args: argparse.Namespace, setting: Setting, params: Any, data: Data, index: int
) -> dict[str, dict[str, np.ndarray]]:
    """EK-FAC by kronfluence, on the same weights and examples."""
    source = FOLDER / f"ekfac_{setting.activation}_{index}.npz"
    target = source.with_name(f"{source.stem}_scores.npz")
    weights = {
        f"{layer}_{name}": np.asarray(leaf)
        for layer, leaves in params.items()
        for name, leaf in leaves.items()
    }
    arrays = zip(
        ("inputs", "labels", "test_inputs", "test_labels"), (*data[0], *data[1]), strict=True
    )
    source.parent.mkdir(parents=True, exist_ok=True)
    np.savez(source, activation=setting.activation, **weights, **dict(arrays))
    script = Path(__file__).with_name("influence_ekfac.py")
    command = [args.ekfac_python, str(script), str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(target) as found:
        names = sorted({key.partition("/")[2] for key in found.files})
        return {
            f"EK-FAC, {name}": {m: found[f"{m}/{name}"] for m in ("loss", "margin")}
            for name in names
        }


# --- Wrong labels ---


def labels(args: argparse.Namespace) -> dict[str, Any]:
    """The share of wrong labels among the examples that each method would check first."""
    data = digits(args.train, args.test)
    return {name: _wrong_labels(args, SETTINGS[name], data) for name in args.settings}


def _wrong_labels(args: argparse.Namespace, setting: Setting, data: Data) -> dict[str, Any]:
    inputs, right = data.train
    network, count = NETWORKS[setting.activation], args.train // 10
    found: dict[str, list[float]] = {}
    for seed in tqdm(range(args.seeds), desc="wrong labels"):
        generator = np.random.default_rng(100 + seed)
        wrong = generator.permutation(args.train) < count
        shift = generator.integers(1, WIDTHS[-1], size=args.train)
        batch = inputs, np.where(wrong, (right + shift) % WIDTHS[-1], right).astype(np.int32)
        params = training(setting, batch)(jax.random.key(seed), jnp.ones(args.train))
        gauss_newton = influence.ggn_influence(network, "softmax_cross_entropy", params, batch)

        def loss_fn(params: Any, *batch: Any) -> jax.Array:
            return jnp.mean(losses(network, params, *batch))

        fisher = influence.empirical_fisher_influence(loss_fn, params, batch)
        values = {
            "Gauss-Newton": gauss_newton.self_influence().values,
            "empirical Fisher": fisher.self_influence().values,
            "gradient norms": np.linalg.norm(_flat_gradients(loss_fn, params, batch), axis=1),
            "losses": np.asarray(losses(network, params, *batch)),
        }
        for method, numbers in values.items():
            share = influence.SelfInfluence(numbers).found(wrong, count)
            found.setdefault(method, []).append(share)
    return {
        method: {
            "found": float(np.mean(shares)),
            "standard_error": float(np.std(shares, ddof=1) / len(shares) ** 0.5)
            if len(shares) > 1
            else None,
        }
        for method, shares in found.items()
    }


PARTS = {"datamodel": datamodel, "labels": labels}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--train", type=int, default=1000, help="training examples")
    parser.add_argument("--test", type=int, default=100, help="test examples")
    parser.add_argument("--subsets", type=int, default=100, help="random halves")
    parser.add_argument("--seeds", type=int, default=5, help="networks retrained on each half")
    parser.add_argument("--models", type=int, default=3, help="networks that are attributed")
    parser.add_argument("--ekfac-python", help="an interpreter that has kronfluence and PyTorch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    parts = {name: PARTS[name](args) for name in args.parts}
    settings = {
        name: value for name, value in vars(args).items() if name not in ("output", "ekfac_python")
    }
    results = {
        **timing.environment(("curvax", "jax", "scikit-learn")),
        "settings": settings,
        "parts": parts,
    }
    timing.write(results, table(results), "influence", args.output)


if __name__ == "__main__":
    sys.exit(main())
