"""Quality of pruning: ResNet-20 on Fashion-MNIST, one-shot and gradual, and the predicted loss.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --parts one-shot --seeds 1 --output build

Trains the networks (SGD with momentum), prunes them with magnitudes, the diagonal Fisher matrix
and M-FAC, and compares gradual schedules of equal budgets. Trained networks and finished
runs are kept in build/pruning/, so an interrupted run goes on: delete it after a change of code.
Writes JSON, a table and a plot to benchmarks/results/ under the hardware's name.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import timing
from finished_runs import FinishedRuns
from matplotlib.figure import Figure
from models_flax import ResNet20
from tqdm import tqdm

from curvax import pruning

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from datasets import Dataset, from_idx_files  # noqa: E402

PyTree = Any

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BATCH_SIZE = 16  # on a CPU an example costs a third less than in batches of 128
FISHER_BATCH = 16  # examples in a gradient of the Fisher matrix
FOLDER = ROOT / "build" / "pruning"


class Variables(NamedTuple):
    """Parameters, and the running statistics of batch normalization."""

    params: PyTree
    statistics: PyTree


def mean_loss(params: PyTree, statistics: PyTree, images: Any, labels: Any) -> jax.Array:
    """The loss in evaluation mode."""
    variables = {"params": params, "batch_stats": statistics}
    logits = ResNet20(train=False).apply(variables, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def loss_and_accuracy(variables: Variables, images: Any, labels: Any) -> tuple[Any, Any]:
    logits = ResNet20(train=False).apply(
        {"params": variables.params, "batch_stats": variables.statistics}, images
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(axis=-1) == labels).mean()


def evaluate(variables: Variables, images: Any, labels: Any, size: int = 1000) -> dict[str, float]:
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    numbers = [loss_and_accuracy(variables, images[part], labels[part]) for part in parts]
    loss, accuracy = np.mean(numbers, axis=0).tolist()
    return {"loss": loss, "accuracy": accuracy}


# --- Training ---


def sgd_steps(
    variables: Variables,
    data: Dataset,
    epochs: float,
    rate: float,
    seed: int,
    mask: PyTree | None = None,
    description: str = "training",
) -> Variables:
    """SGD with momentum on a cosine; pruned weights stay at zero."""
    steps = round(epochs * (len(data.train_images) // BATCH_SIZE))
    inner = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.sgd(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps), momentum=0.9),
    )
    everything = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables.params)
    tx = pruning.keep_pruned(everything if mask is None else mask, inner)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Variables, state: PyTree, images: Any, labels: Any) -> Any:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            logits, updated = ResNet20().apply(
                {"params": params, "batch_stats": variables.statistics},
                images,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, statistics = jax.grad(loss, has_aux=True)(variables.params)
        updates, state = tx.update(grads, state, variables.params)
        return Variables(optax.apply_updates(variables.params, updates), statistics), state

    variables = jax.tree.map(np.array, variables)
    state = tx.init(variables.params)
    for chosen in tqdm(
        batches_of(len(data.train_images), steps, seed), description, steps, leave=False
    ):
        images, labels = data.train_images[chosen], data.train_labels[chosen]
        variables, state = step(variables, state, images, labels)
    return variables


def batches_of(number: int, steps: int, seed: int, size: int = BATCH_SIZE) -> Iterator[np.ndarray]:
    """Indices of random batches, epoch after epoch."""
    generator = np.random.default_rng(seed)
    left = np.empty(0, int)
    for _ in range(steps):
        if len(left) < size:
            left = generator.permutation(number)
        chosen, left = left[:size], left[size:]
        yield chosen


def trained(seed: int, data: Dataset, epochs: float) -> Variables:
    """The dense network of a seed, trained once."""
    initial = ResNet20().init(jax.random.key(seed), data.train_images[:1])
    variables = Variables(initial["params"], initial["batch_stats"])
    leaves, treedef = jax.tree.flatten(variables)
    path = FOLDER / f"resnet20_{epochs:g}_epochs_seed_{seed}.npz"
    if not path.exists():
        final = sgd_steps(variables, data, epochs, 0.02, seed, description=f"training, seed {seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *jax.tree.leaves(final))
    with np.load(path) as arrays:
        return jax.tree.unflatten(treedef, [arrays[f"arr_{k}"] for k in range(len(leaves))])


# --- Runs, each kept under what it depends on ---


def fisher_batches(data: Dataset, seed: int, size: int = FISHER_BATCH) -> Iterator[Any]:
    """Images and labels of random batches without end."""
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


RECOMPUTED = [name for name, options in METHODS.items() if options.get("recomputations") == 16]
WITH_MORE_GRADIENTS = ("M-FAC independent, 1", "M-FAC joint, 1", "M-FAC joint, 16")


class Cell(NamedTuple):
    """One network to prune, and how."""

    seed: int
    name: str
    sparsity: float
    num_grads: int


def cells(args: argparse.Namespace) -> list[Cell]:
    """The grid, most telling first: all methods on the first seed, then the seeds, then more.

    Sixteen recomputations cost sixteen times as much: they are taken where sparsity is high, and
    on further seeds with the full matrix and blocks of 128 only. Further seeds are pruned to those
    sparsities alone.
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
            chosen = [0.9] if name in RECOMPUTED else args.sparsities
            grid += [Cell(0, name, sparsity, num_grads) for sparsity in chosen]
    return grid


def one_shot(args: argparse.Namespace, data: Dataset, cache: FinishedRuns) -> dict[str, Any]:
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


def prune_and_evaluate(cell: Cell, args: argparse.Namespace, data: Dataset) -> dict[str, float]:
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
            progress=False,
            **options,
        )
    pruned = variables._replace(params=result.params)
    return evaluate(pruned, data.test_images, data.test_labels)


@functools.lru_cache(maxsize=1)
def dense_gradients(seed: int, num_grads: int, epochs: float, data: Dataset) -> PyTree:
    return pruning.collect_gradients(
        loss_with(frozen_statistics(seed, data, epochs)),
        trained(seed, data, epochs).params,
        fisher_batches(data, seed),
        num_grads,
        progress=False,
    )


@functools.cache
def frozen_statistics(seed: int, data: "Dataset", epochs: float) -> Frozen:
    return Frozen(trained(seed, data, epochs).statistics)


def gradual(args: argparse.Namespace, data: Dataset, cache: FinishedRuns) -> dict[str, Any]:
    """Gradual pruning with fine-tuning between, of equal budgets."""
    results: dict[str, Any] = {}
    for final in args.gradual_sparsities:
        for name in ("magnitude", "M-FAC joint, blocks 128, 16"):

            def run(final=final, name=name):
                variables = trained(0, data, args.epochs)
                frozen = Frozen(variables.statistics)
                current = [variables]

                def fine_tune(params: PyTree, mask: PyTree) -> PyTree:
                    current[0] = sgd_steps(
                        current[0]._replace(params=params),
                        data,
                        args.fine_tuning_epochs,
                        0.005,
                        seed=7,
                        mask=mask,
                        description=f"{name}, {final:.0%}: fine-tuning",
                    )
                    frozen.tree = current[0].statistics
                    return current[0].params

                def loss(params: PyTree, statistics: PyTree, images: Any, labels: Any) -> Any:
                    return mean_loss(params, statistics, images, labels)

                batches = (
                    (frozen.tree, images, labels) for images, labels in fisher_batches(data, 0)
                )
                options = {**METHODS[name]}
                if "recomputations" in options:
                    options["recomputations"] = args.gradual_recomputations
                pruning.prune_gradually(
                    loss,
                    variables.params,
                    batches,
                    pruning.polynomial_sparsities(0.5, final, args.gradual_steps),
                    fine_tune,
                    num_grads=args.num_grads[0],
                    damping=args.damping,
                    progress=False,
                    **options,
                )
                return evaluate(current[0], data.test_images, data.test_labels)

            key = (
                f"gradual; {METHODS[name]}; {final}; {args.gradual_steps} x "
                f"{args.fine_tuning_epochs}; {args.gradual_recomputations}; {args.damping}"
            )
            results.setdefault(name.split(",")[0], {})[str(final)] = cache.get(key, run)
    return results


def prediction(args: argparse.Namespace, data: Dataset, cache: FinishedRuns) -> dict[str, Any]:
    """Predicted and measured changes of the loss where single leaves are pruned a little."""

    def run() -> Any:
        variables = trained(0, data, args.epochs)
        images, labels = data.train_images[:4000], data.train_labels[:4000]
        loss_fn = loss_with(Frozen(variables.statistics))
        examples = fisher_batches(data, 0, size=1)
        grads = pruning.collect_gradients(loss_fn, variables.params, examples, 2000)
        dense = evaluate(variables, images, labels)["loss"]
        points = []
        paths = [layer.path for layer in pruning.prune(variables.params, grads, 0.0).layers]
        for path in tqdm(paths, desc="leaves"):
            for method in ("magnitude", "obs"):
                result = pruning.prune(
                    variables.params,
                    grads,
                    0.1,
                    method=method,
                    block_size=128,
                    damping=args.damping,
                    predicate=lambda name, _, path=path: name == path,
                )
                pruned = variables._replace(params=result.params)
                measured = evaluate(pruned, images, labels)["loss"] - dense
                points.append([method, path, result.predicted_loss_change, measured])
        return points

    points = cache.get(f"prediction; {args.damping}; {args.epochs}", run)
    summary = {}
    for method in ("magnitude", "obs"):
        pairs = np.array([point[2:] for point in points if point[0] == method])
        summary[method] = {
            "correlation": float(np.corrcoef(pairs.T)[0, 1]),
            "slope": float((pairs[:, 0] @ pairs[:, 1]) / (pairs[:, 0] @ pairs[:, 0])),
        }
    return {"points": points, **summary}


# --- Output ---


def table(results: dict[str, Any]) -> str:
    parts = results["parts"]
    lines = [f"Measured on {results['name']} by `python benchmarks/pruning.py`.", ""]
    if dense := results.get("dense"):
        mean = np.mean([run["accuracy"] for run in dense])
        lines += [
            f"ResNet-20 on Fashion-MNIST, {results['settings']['epochs']:g} epochs; the dense "
            f"networks have a test accuracy of {mean:.2%} ({len(dense)} seeds).",
            "",
        ]
    if rows := parts.get("one-shot"):
        sparsities = sorted({s for row in rows.values() for s in row}, key=float)
        lines += [
            "Test accuracy in % after one-shot pruning, mean ± deviation over seeds; the number "
            "behind a method is that of recomputations.",
            "",
            "| method | " + " | ".join(f"{float(s):.0%}" for s in sparsities) + " |",
            "| --- |" + " ---: |" * len(sparsities),
        ]
        for name, row in rows.items():
            cells = [_cell(row.get(s)) for s in sparsities]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if rows := parts.get("gradual"):
        finals = sorted({s for row in rows.values() for s in row}, key=float)
        settings = results["settings"]
        lines += [
            "",
            f"Test accuracy after gradual pruning from 50 % in {settings['gradual_steps']} steps "
            f"with {settings['fine_tuning_epochs']:g} epochs of fine-tuning after each, one seed.",
            "",
            "| method | " + " | ".join(f"{float(s):.0%}" for s in finals) + " |",
            "| --- |" + " ---: |" * len(finals),
        ]
        for name, row in rows.items():
            cells = [f"{row[s]['accuracy']:.2%}" if s in row else "" for s in finals]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if rows := parts.get("prediction"):
        lines += [
            "",
            "Predicted against measured change of the training loss, 10 % of one leaf pruned at a "
            "time, 2000 gradients of examples:",
            "",
            "| method | correlation | measured over predicted (least squares) |",
            "| --- | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {rows[name]['correlation']:.3f} | {rows[name]['slope']:.2f} |"
            for name in ("magnitude", "obs")
        ]
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict[str, float]] | None) -> str:
    if not runs:
        return ""
    values = 100 * np.array([run["accuracy"] for run in runs])
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def plot(rows: dict[str, Any], path: Path) -> None:
    """Accuracy over sparsity of a few methods."""
    shown = {
        "magnitude": "#d55e00",
        "diagonal Fisher, 16": "#e69f00",
        "saliency alone, 1": "#999999",
        "M-FAC independent, 16": "#56b4e9",
        "M-FAC joint, 1": "#009e73",
        "M-FAC joint, 16": "#0072b2",
        "M-FAC joint, blocks 128, 16": "#cc79a7",
    }
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        label = name.split(";")[0]
        if label in shown and row is not None and name.endswith(next(iter(rows)).split(";")[1]):
            means = [np.mean([run["accuracy"] for run in runs]) for runs in row.values()]
            places = [100 * float(s) for s in row]
            axes.plot(places, means, "o-", color=shown[label], label=label)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("test accuracy")
    axes.set_title("ResNet-20 on Fashion-MNIST, one-shot", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


PARTS = {"one-shot": one_shot, "gradual": gradual, "prediction": prediction}


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
        default=["M-FAC joint, 16", "M-FAC joint, blocks 128, 16"],
        help="methods with sixteen recomputations for all seeds, not the first alone",
    )
    parser.add_argument("--num-grads", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--damping", type=float, default=1e-5)
    parser.add_argument("--gradual-sparsities", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--gradual-steps", type=int, default=3)
    parser.add_argument("--gradual-recomputations", type=int, default=4)
    parser.add_argument("--fine-tuning-epochs", type=float, default=0.25)
    parser.add_argument("--data-dir", type=Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


class HashableDataset(Dataset):
    """Hashed by identity, so that functions of it can be cached."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def main() -> None:
    args = parse_args()
    everything = from_idx_files(args.data_dir)
    data = HashableDataset(*everything[:2], *(part[: args.test_images] for part in everything[2:]))
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
