"""Pruning ResNet-20 on Fashion-MNIST: one-shot, gradual, predicted losses, time of gradients.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --parts one-shot --seeds 1 --output build

Trains the networks (SGD with momentum), prunes them with magnitudes, the diagonal Fisher matrix
and M-FAC, and compares gradual schedules of equal budgets. Trained networks and finished
runs are kept in build/pruning/, so an interrupted run resumes: delete it after a change of code.
Writes JSON, a table and a plot to benchmarks/results/ under the hardware's name.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import timing
from finished_runs import FinishedRuns
from models_flax import ResNet20
from pruning_report import plot, table
from resnet_training import (
    FOLDER,
    HashableDataset,
    Variables,
    batches_of,
    evaluate,
    load,
    mean_loss,
    sgd_steps,
    trained,
)
from tqdm import tqdm

from curvax import pruning

PyTree = Any

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NUM_EXAMPLES = 2000  # behind a prediction
FISHER_BATCH = 16  # examples in a gradient of the Fisher matrix


def fisher_batches(data: HashableDataset, seed: int, size: int = FISHER_BATCH) -> Iterator[Any]:
    """An endless stream of random batches of images and labels."""
    while True:
        seed += 1000
        for chosen in batches_of(
            len(data.train_images), len(data.train_images) // size, seed, size
        ):
            yield data.train_images[chosen], data.train_labels[chosen]


@functools.cache
def loss_with(statistics: "Frozen") -> Callable[..., jax.Array]:
    return functools.partial(_loss_of, statistics)


def _loss_of(statistics: "Frozen", params: PyTree, images: Any, labels: Any) -> jax.Array:
    return mean_loss(params, statistics.tree, images, labels)


class Frozen:
    """A tree that is hashed by identity."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


M_FAC = {"method": "obs", "update": "joint"}
# name: options of prune_one_shot
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "diagonal Fisher, 1": {"method": "fisher", "recomputations": 1},
    "saliency alone, 1": {"method": "obs", "update": "none", "recomputations": 1},
    "M-FAC independent, 1": {"method": "obs", "update": "independent", "recomputations": 1},
    "M-FAC joint, 1": {**M_FAC, "recomputations": 1},
    "M-FAC joint, blocks 128, 1": {**M_FAC, "block_size": 128, "recomputations": 1},
    "M-FAC joint, blocks 2000, 1": {**M_FAC, "block_size": 2000, "recomputations": 1},
    "greedy, blocks 128, 1": {"method": "greedy", "block_size": 128, "recomputations": 1},
    "diagonal Fisher, 16": {"method": "fisher", "recomputations": 16},
    "M-FAC independent, 16": {"method": "obs", "update": "independent", "recomputations": 16},
    "M-FAC joint, 16": {**M_FAC, "recomputations": 16},
    "M-FAC joint, blocks 128, 16": {**M_FAC, "block_size": 128, "recomputations": 16},
    "M-FAC joint, blocks 2000, 16": {**M_FAC, "block_size": 2000, "recomputations": 16},
}


# Between two fine-tunings.
GRADUAL_METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "M-FAC joint, damping 1e-3": {
        **M_FAC,
        "block_size": 128,
        "recomputations": 4,
        "damping": 1e-3,
    },
}
RECOMPUTED = [name for name, options in METHODS.items() if options.get("recomputations") == 16]
WITH_MORE_GRADIENTS = ("saliency alone, 1", "M-FAC independent, 1", "M-FAC joint, 1")


class Cell(NamedTuple):
    """One network to prune, and how."""

    seed: int
    name: str
    sparsity: float
    num_grads: int


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid, most informative first: all methods on the first seed, then the other seeds.

    Sixteen recomputations cost sixteen times as much: they are taken where sparsity is high, and
    on further seeds in blocks of 128 only. Further seeds are pruned to those sparsities alone.
    """
    few, many = args.num_grads[0], args.num_grads[1:]
    grid = []
    for seed in range(args.seeds):
        for name in METHODS:
            if name in RECOMPUTED and seed and name not in args.repeated:
                continue
            few_sparsities = seed or name in RECOMPUTED
            chosen = args.recomputed_sparsities if few_sparsities else args.sparsities
            grid += [Cell(seed, name, sparsity, few) for sparsity in chosen]
    for num_grads in many:
        for name in WITH_MORE_GRADIENTS:
            grid += [Cell(0, name, sparsity, num_grads) for sparsity in args.sparsities]
    return grid


def one_shot(
    args: argparse.Namespace, data: HashableDataset, cache: FinishedRuns
) -> dict[str, Any]:
    """Test accuracy and loss of each method, sparsity and seed."""
    results: dict[str, Any] = {}
    with tqdm(cells(args), unit="run") as progress:
        for cell in progress:
            name, sparsity = cell.name, cell.sparsity
            progress.set_description(
                f"{name}, {sparsity:.0%}, {cell.num_grads} gradients, seed {cell.seed}"
            )
            key = f"one-shot; {METHODS[name]}; {cell[2:]}; {args.damping}; {args.epochs}; {cell[0]}"
            run = cache.get(key, lambda cell=cell: prune_and_evaluate(cell, args, data))
            row = results.setdefault(f"{name}; {cell.num_grads} gradients", {})
            row.setdefault(str(sparsity), []).append(run)
    return results


def prune_and_evaluate(
    cell: Cell, args: argparse.Namespace, data: HashableDataset
) -> dict[str, float]:
    variables = trained(cell.seed, data, args.epochs)
    options = {"damping": args.damping, **METHODS[cell.name]}
    if options.get("recomputations", 1) == 1:  # one set of gradients serves all of these
        options.pop("recomputations", None)
        grads = None
        if options["method"] != "magnitude":
            grads = dense_gradients(cell.seed, cell.num_grads, args.epochs, data)
        result = pruning.prune(variables.params, grads, cell.sparsity, **options)
    else:
        result = pruning.prune_one_shot(
            loss_with(frozen_statistics(cell.seed, data, args.epochs)),
            variables.params,
            fisher_batches(data, cell.seed),
            cell.sparsity,
            num_grads=cell.num_grads,
            **options,
        )
    pruned = variables._replace(params=result.params)
    return evaluate(pruned, data.test_images, data.test_labels)


@functools.lru_cache(maxsize=1)
def dense_gradients(seed: int, num_grads: int, epochs: float, data: HashableDataset) -> PyTree:
    return pruning.collect_gradients(
        loss_with(frozen_statistics(seed, data, epochs)),
        trained(seed, data, epochs).params,
        fisher_batches(data, seed),
        num_grads,
    )


@functools.cache
def frozen_statistics(seed: int, data: HashableDataset, epochs: float) -> Frozen:
    return Frozen(trained(seed, data, epochs).statistics)


def gradual(args: argparse.Namespace, data: HashableDataset, cache: FinishedRuns) -> dict[str, Any]:
    """Gradual pruning with fine-tuning between, of equal budgets."""
    results: dict[str, Any] = {}
    for name, options in GRADUAL_METHODS.items():
        for seed in range(args.gradual_seeds or args.seeds):
            for final in args.gradual_sparsities:
                key = (
                    f"gradual; {options}; {final}; {args.gradual_steps} x "
                    f"{args.fine_tuning_epochs}; {args.damping}; {args.epochs}; {seed}"
                )
                run = functools.partial(prune_gradually, name, final, seed, args, data)
                row = results.setdefault(name, {}).setdefault(str(final), [])
                row.append(cache.get(key, run))
    return results


def prune_gradually(
    name: str, final: float, seed: int, args: argparse.Namespace, data: HashableDataset
) -> dict[str, float]:
    """One network, pruned from a half to ``final``; batch statistics are tuned with the weights."""
    current = trained(seed, data, args.epochs)

    def fine_tune(params: PyTree, mask: PyTree) -> PyTree:
        nonlocal current
        current = sgd_steps(
            current._replace(params=params),
            data,
            args.fine_tuning_epochs,
            0.005,
            seed=7,
            mask=mask,
            description=f"{name}, {final:.0%}, seed {seed}: fine-tuning",
        )
        return current.params

    pruning.prune_gradually(
        mean_loss,
        current.params,
        ((current.statistics, *batch) for batch in fisher_batches(data, seed)),
        pruning.polynomial_sparsities(0.5, final, args.gradual_steps),
        fine_tune,
        **{"num_grads": args.num_grads[0], "damping": args.damping, **GRADUAL_METHODS[name]},
    )
    return evaluate(current, data.test_images, data.test_labels)


def prediction(
    args: argparse.Namespace, data: HashableDataset, cache: FinishedRuns
) -> dict[str, Any]:
    """Predicted and measured changes of the loss where single leaves are pruned a little.

    The loss is that of the examples whose gradients predict it: on others, the changes of Optimal
    Brain Surgeon are smaller than what a new sample changes.
    """
    summary: dict[str, Any] = {}
    for sparsity in args.predicted_sparsities:
        key = f"prediction; {sparsity}; {args.damping}; {args.epochs}"
        points = cache.get(key, lambda s=sparsity: predicted_and_measured(s, args, data))
        for method in ("magnitude", "obs"):
            pairs = np.array([point[2:] for point in points if point[0] == method])
            summary[f"{method}, {sparsity:.0%}"] = {
                "correlation": float(np.corrcoef(pairs.T)[0, 1]),
                "slope": float((pairs[:, 0] @ pairs[:, 1]) / (pairs[:, 0] @ pairs[:, 0])),
                "largest": float(np.abs(pairs[:, 1]).max()),
                "points": [point[1:] for point in points if point[0] == method],
            }
    return summary


def predicted_and_measured(
    sparsity: float, args: argparse.Namespace, data: HashableDataset
) -> list[list[Any]]:
    variables = trained(0, data, args.epochs)
    grads = example_gradients(args.epochs, data)
    images, labels = data.train_images[:NUM_EXAMPLES], data.train_labels[:NUM_EXAMPLES]
    dense = evaluate(variables, images, labels)["loss"]
    points = []
    paths = [layer.path for layer in pruning.prune(variables.params, grads, 0.0).layers]
    for path in tqdm(paths, desc=f"leaves, {sparsity:.0%}"):
        for method in ("magnitude", "obs"):
            result = pruning.prune(
                variables.params,
                grads,
                sparsity,
                method=method,
                block_size=128,
                damping=args.damping,
                select=lambda name, _, path=path: name == path,
            )
            pruned = variables._replace(params=result.params)
            measured = evaluate(pruned, images, labels)["loss"] - dense
            points.append([method, path, result.predicted_loss_change, measured])
    return points


@functools.lru_cache(maxsize=1)
def example_gradients(epochs: float, data: HashableDataset) -> PyTree:
    examples = [
        (data.train_images[k : k + 1], data.train_labels[k : k + 1]) for k in range(NUM_EXAMPLES)
    ]
    return pruning.collect_gradients(
        loss_with(frozen_statistics(0, data, epochs)),
        trained(0, data, epochs).params,
        examples,
        NUM_EXAMPLES,
    )


def gradients(
    args: argparse.Namespace, data: HashableDataset, cache: FinishedRuns
) -> dict[str, Any]:
    """Seconds for the gradient of a batch, and for those of its examples in two ways."""
    del args
    return cache.get("gradients", lambda: time_gradients(data))


def time_gradients(data: HashableDataset) -> dict[str, Any]:
    initial = ResNet20().init(jax.random.key(0), data.train_images[:1])
    variables = Variables(initial["params"], initial["batch_stats"])
    mean = jax.jit(jax.grad(mean_loss))

    def of_one(image: Any, label: Any) -> PyTree:
        return jax.grad(mean_loss)(*variables, image[np.newaxis], label[np.newaxis])

    one, several = jax.jit(of_one), jax.jit(jax.vmap(of_one))
    results = {}
    for size in (8, 16, 32):
        images, labels = data.train_images[:size], data.train_labels[:size]
        calls = {
            "mean": lambda images=images, labels=labels: mean(*variables, images, labels),
            "examples together": lambda images=images, labels=labels: several(images, labels),
            "one by one": lambda images=images, labels=labels: [
                one(*pair) for pair in zip(images, labels, strict=True)
            ],
        }
        loops = {name: timing.repeated(call) for name, call in calls.items()}
        times = timing.time_loops(loops, seconds=1.0, cycle=1, blocks=5)
        results[str(size)] = {name: times[name]["median_s"] for name in calls}
    return results


PARTS = {
    "one-shot": one_shot,
    "prediction": prediction,
    "gradual": gradual,
    "gradients": gradients,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--epochs", type=float, default=1, help="of training the dense networks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument(
        "--recomputed-sparsities",
        type=float,
        nargs="+",
        default=[0.8, 0.9, 0.95],
        help="of methods with sixteen recomputations",
    )
    parser.add_argument(
        "--repeated",
        nargs="*",
        default=["M-FAC joint, blocks 128, 16"],
        help="methods with sixteen recomputations for all seeds, not the first alone",
    )
    parser.add_argument("--num-grads", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--damping", type=float, default=1e-5)
    parser.add_argument("--predicted-sparsities", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--gradual-sparsities", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--gradual-steps", type=int, default=3)
    parser.add_argument("--gradual-seeds", type=int, help="by default those of the rest")
    parser.add_argument("--fine-tuning-epochs", type=float, default=0.25)
    parser.add_argument("--data-dir", type=Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data = load(args.data_dir, args.test_images)
    cache = FinishedRuns(FOLDER / "runs.jsonl")
    dense = [
        cache.get(
            f"dense; {args.epochs}; {seed}",
            lambda seed=seed: evaluate(
                trained(seed, data, args.epochs), data.test_images, data.test_labels
            ),
        )
        for seed in range(args.seeds)
    ]
    parts = {name: PARTS[name](args, data, cache) for name in args.parts}
    settings = {
        name: value for name, value in vars(args).items() if name not in ("data_dir", "output")
    }
    results = {
        **timing.environment(("curvax", "jax", "optax", "flax")),
        "settings": settings,
        "dense": dense,
        "parts": parts,
    }
    timing.write(results, table(results), "pruning", args.output)
    if "one-shot" in parts:
        plot(parts["one-shot"], args.output / "pruning_one_shot.png")


if __name__ == "__main__":
    main()
