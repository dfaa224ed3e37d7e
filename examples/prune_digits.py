"""Trains a small Flax CNN on scikit-learn's digits and prunes it, with magnitudes and with M-FAC.

    python examples/prune_digits.py
    python examples/prune_digits.py --num-grads 256 --recomputations 4

Prints a table of test accuracies over sparsities and the path of a plot of them.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from datasets import Dataset, digits
from digits import batches, evaluate, loss_fn, model, positive
from matplotlib.figure import Figure
from tqdm import tqdm

from curvax import pruning

PyTree = Any

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "M-FAC, 1 step": {"recomputations": 1},
    "M-FAC, in steps": {},
}


def train(dataset: Dataset, epochs: int, batch_size: int, seed: int) -> PyTree:
    """A network trained with Adam."""
    generator = np.random.default_rng(seed)
    steps = epochs * (len(dataset.train_images) // batch_size)
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: PyTree, images: Any, labels: Any) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss_fn)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    params = model.init(jax.random.key(seed), dataset.train_images[:1])
    state = tx.init(params)
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for images, labels in batches(dataset, batch_size, generator):
            params, state = step(params, state, images, labels)
    return params


def prune_everything(
    params: PyTree,
    dataset: Dataset,
    num_grads: int,
    recomputations: int,
    damping: float,
    seed: int,
) -> dict[str, list[float]]:
    """For each method the test accuracy at each sparsity."""
    accuracies: dict[str, list[float]] = {name: [] for name in METHODS}
    generator = np.random.default_rng(seed)
    data = list(batches(dataset, 1, generator))  # gradients of single examples
    with tqdm(total=len(METHODS) * len(SPARSITIES), unit="pruning") as progress:
        for name, options in METHODS.items():
            for sparsity in SPARSITIES:
                progress.set_description(f"{name}, {sparsity:.0%}")
                result = pruning.prune_one_shot(
                    loss_fn,
                    params,
                    data,
                    sparsity,
                    num_grads=num_grads,
                    damping=damping,
                    **{"recomputations": recomputations, **options},
                )
                accuracies[name].append(evaluate(result.params, dataset)[2])
                progress.update()
    return accuracies


def table(accuracies: dict[str, list[float]]) -> str:
    rows = ["sparsity" + " " * 10 + "".join(f"{sparsity:>9.0%}" for sparsity in SPARSITIES)]
    rows += [
        f"{name:18}" + "".join(f"{accuracy:>9.2%}" for accuracy in values)
        for name, values in accuracies.items()
    ]
    return "\n".join(rows)


def plot(accuracies: dict[str, list[float]], dense: float, path: Path) -> None:
    """Accuracy over sparsity."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    colors = ("#d55e00", "#56b4e9", "#0072b2")
    for (name, values), color in zip(accuracies.items(), colors, strict=True):
        axes.plot([100 * s for s in SPARSITIES], values, "o-", color=color, label=name)
    axes.axhline(dense, color="0.5", linestyle=":", label="dense")
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("One-shot pruning of a small CNN on the digits", loc="left", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N", type=positive)
    option("--epochs", default=20, help="of training (default: %(default)s)")
    option("--batch-size", default=32, help="default: %(default)s")
    option("--num-grads", default=512, help="gradients of examples (default: %(default)s)")
    option("--recomputations", default=16, help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    # Steadier at 95 % than the library's 1e-5, where few weights must compensate for many.
    parser.add_argument("--damping", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build"),
        help="folder for the plot (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    dataset = digits()
    if args.num_grads > len(dataset.train_images):
        parser.error(f"--num-grads is above the {len(dataset.train_images)} training images")
    params = train(dataset, args.epochs, args.batch_size, args.seed)
    dense = evaluate(params, dataset)[2]
    accuracies = prune_everything(
        params, dataset, args.num_grads, args.recomputations, args.damping, args.seed
    )
    print(f"\ntest accuracy of the dense network: {dense:.2%}\n\n{table(accuracies)}")
    path = args.output / "pruning.png"
    plot(accuracies, dense, path)
    print(f"\nAccuracy over sparsity: {path}")


if __name__ == "__main__":
    main()
