"""Prunes a small Flax CNN with batch normalization, trained on scikit-learn's digits.

    python examples/prune_digits.py
    python examples/prune_digits.py --num-grads 256 --recomputations 4

Prints a table of test accuracies over sparsities and the path of a plot of them.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from datasets import Dataset, digits
from digits import batches, positive
from matplotlib.figure import Figure
from tqdm import tqdm

from curvax import pruning

PyTree = Any

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class CNN(nn.Module):
    """Two convolutions with batch normalization, and a dense layer."""

    train: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for filters in (16, 32):
            x = nn.Conv(filters, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def loss_fn(params: PyTree, statistics: PyTree, images: Any, labels: Any) -> jax.Array:
    """In evaluation mode."""
    logits = CNN().apply({"params": params, "batch_stats": statistics}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training_loss(
    params: PyTree, statistics: PyTree, images: Any, labels: Any
) -> tuple[jax.Array, PyTree]:
    variables = {"params": params, "batch_stats": statistics}
    logits, changed = CNN(train=True).apply(variables, images, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), changed["batch_stats"]


def new_statistics(params: PyTree, statistics: PyTree, images: Any) -> PyTree:
    """The running statistics after a batch."""
    variables = {"params": params, "batch_stats": statistics}
    return CNN(train=True).apply(variables, images, mutable=["batch_stats"])[1]["batch_stats"]


@jax.jit
def accuracy(params: PyTree, statistics: PyTree, images: Any, labels: Any) -> jax.Array:
    logits = CNN().apply({"params": params, "batch_stats": statistics}, images)
    return (logits.argmax(axis=-1) == labels).mean()


def train(dataset: Dataset, epochs: int, batch_size: int, seed: int) -> tuple[PyTree, PyTree]:
    """Parameters and statistics of a network trained with Adam."""
    generator = np.random.default_rng(seed)
    steps = epochs * (len(dataset.train_images) // batch_size)
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: PyTree, statistics: PyTree, state: PyTree, images: Any, labels: Any) -> Any:
        grads, statistics = jax.grad(training_loss, has_aux=True)(
            params, statistics, images, labels
        )
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), statistics, state

    variables = CNN().init(jax.random.key(seed), dataset.train_images[:1])
    params, statistics = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for images, labels in batches(dataset, batch_size, generator):
            params, statistics, state = step(params, statistics, state, images, labels)
    return params, statistics


def methods(
    params: PyTree, statistics: PyTree, dataset: Dataset, num_grads: int, recomputations: int
) -> tuple[dict[str, Callable[[float], PyTree]], Callable[[PyTree], PyTree]]:
    """From a sparsity to pruned parameters, by name; and from these to their statistics."""
    images = dataset.train_images[:1280].reshape(10, 128, *dataset.train_images.shape[1:])
    examples = list(zip(dataset.train_images[:num_grads], dataset.train_labels, strict=False))

    def reestimated(params: PyTree) -> PyTree:
        return pruning.reestimate_statistics(new_statistics, params, statistics, images)

    def gradient_batches(params: PyTree) -> list[Any]:
        own = reestimated(params)
        return [(own, image[np.newaxis], np.array([label])) for image, label in examples]

    def by_loss(sparsity: float, steps: int) -> pruning.PruneResult[PyTree]:
        return pruning.prune_one_shot(
            loss_fn,
            params,
            gradient_batches,
            sparsity,
            num_grads=num_grads,
            recomputations=steps,
        )

    def by_layers(sparsity: float | None, mask: PyTree | None = None) -> PyTree:
        variables = {"batch_stats": statistics}
        return pruning.prune_layers(
            CNN(), params, images, sparsity, variables=variables, mask=mask
        ).params

    def by_magnitude(sparsity: float) -> PyTree:
        return pruning.prune(params, None, sparsity, method="magnitude").params

    return {
        "magnitude": by_magnitude,
        "OBS, one step": lambda sparsity: by_loss(sparsity, 1).params,
        "OBS, in steps": lambda sparsity: by_loss(sparsity, recomputations).params,
        "layer by layer": by_layers,
        "OBS, then layers": lambda s: by_layers(None, by_loss(s, recomputations).mask),
    }, reestimated


def prune_everything(
    params: PyTree, statistics: PyTree, dataset: Dataset, num_grads: int, recomputations: int
) -> dict[str, list[float]]:
    """For each method the test accuracy at each sparsity."""
    contestants, reestimated = methods(params, statistics, dataset, num_grads, recomputations)
    accuracies: dict[str, list[float]] = {name: [] for name in contestants}
    with tqdm(total=len(contestants) * len(SPARSITIES), unit="pruning") as progress:
        for name, method in contestants.items():
            for sparsity in SPARSITIES:
                progress.set_description(f"{name}, {sparsity:.0%}")
                pruned = method(sparsity)
                test = dataset.test_images, dataset.test_labels
                accuracies[name].append(float(accuracy(pruned, reestimated(pruned), *test)))
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
    colors = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7")
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
    params, statistics = train(dataset, args.epochs, args.batch_size, args.seed)
    dense = float(accuracy(params, statistics, dataset.test_images, dataset.test_labels))
    accuracies = prune_everything(params, statistics, dataset, args.num_grads, args.recomputations)
    print(f"\ntest accuracy of the dense network: {dense:.2%}\n\n{table(accuracies)}")
    path = args.output / "pruning.png"
    plot(accuracies, dense, path)
    print(f"\nAccuracy over sparsity: {path}")


if __name__ == "__main__":
    main()
