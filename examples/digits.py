"""Trains a small Flax CNN with AdaHessian, M-FAC, Adam and SGD, for equal epochs.

    python examples/digits.py
    python examples/digits.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist

Prints a table of the results and the path of a plot of the loss curves.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from datasets import Dataset, DatasetError, digits, from_idx_files
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax

PyTree = Any
Step = Callable[..., tuple[PyTree, PyTree, jax.Array]]

EPOCHS = {"digits": 20, "fashion-mnist": 3}


class CNN(nn.Module):
    """Two convolutions and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = CNN()


def loss_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Contestant(NamedTuple):
    """What a chain scales the gradient by, its peak learning rate, and its training step."""

    scaling: optax.GradientTransformation
    peak_learning_rate: float
    make_step: Callable[[optax.GradientTransformation], Step]


def adahessian_step(tx: optax.GradientTransformationExtraArgs) -> Step:
    """One pass for loss, gradient and Hessian diagonal, then one update."""
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss_fn)

    # refresh=True: fresh curvature at every step without a conditional, in which a CPU computes
    # the gradients of convolutions slowly.
    def step(params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array) -> Any:
        loss, grads, diag = one_pass(params, images, labels, state=state, refresh=True)
        updates, state = tx.update(grads, state, params, hessian_diag=diag, refresh=True)
        return optax.apply_updates(params, updates), state, loss

    return step


def first_order_step(tx: optax.GradientTransformation) -> Step:
    def step(params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


# The best of five rates each, two apart in ratio, by mean test accuracy on the digits over
# seeds 0 to 2 and then by test loss: 0.15 to 2.4, 0.00025 to 0.004, 0.005 to 0.08, and 0.05 to 0.8.
# M-FAC has a quarter of its default window; the run has 880 steps.
CONTESTANTS = {
    "AdaHessian": Contestant(curvax.scale_by_adahessian(), 0.6, adahessian_step),
    "M-FAC": Contestant(curvax.scale_by_mfac(num_grads=256), 0.002, first_order_step),
    "Adam": Contestant(optax.scale_by_adam(), 0.04, first_order_step),
    "SGD, momentum": Contestant(optax.trace(decay=0.9), 0.4, first_order_step),
}


def make_chain(contestant: Contestant, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimizer, and a schedule that warms up and decays to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=contestant.peak_learning_rate,
        warmup_steps=num_steps // 10,
        decay_steps=num_steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        contestant.scaling,
        optax.scale_by_learning_rate(schedule),
    )


class Result(NamedTuple):
    """Losses before training and after each epoch, and the final metrics."""

    train_losses: list[float]
    test_losses: list[float]
    test_accuracy: float
    milliseconds_per_step: float


def train(
    name: str, contestant: Contestant, dataset: Dataset, epochs: int, batch_size: int, seed: int
) -> Result:
    """Trains one network; all contestants share initial parameters and the order of batches."""
    steps_per_epoch = len(dataset.train_images) // batch_size
    tx = make_chain(contestant, epochs * steps_per_epoch)
    params = model.init(jax.random.key(seed), dataset.train_images[:1])
    state = tx.init(params)
    first = dataset.train_images[:batch_size], dataset.train_labels[:batch_size]
    step = jax.jit(contestant.make_step(tx), donate_argnums=(0, 1))
    step = step.lower(params, state, *first).compile()  # so that no step's time includes it

    generator = np.random.default_rng(seed)
    evaluations = [evaluate(params, dataset)]
    seconds = 0.0
    progress = tqdm(range(epochs), desc=f"{name:13}", unit="epoch")
    for _ in progress:
        start = time.perf_counter()
        for images, labels in batches(dataset, batch_size, generator):
            params, state, _ = step(params, state, images, labels)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        evaluations.append(evaluate(params, dataset))
        progress.set_postfix(test_loss=f"{evaluations[-1][1]:.4f}")

    train_losses, test_losses, accuracies = map(list, zip(*evaluations, strict=True))
    milliseconds = 1000 * seconds / (epochs * steps_per_epoch)
    return Result(train_losses, test_losses, accuracies[-1], milliseconds)


def batches(
    dataset: Dataset, batch_size: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in random order; an incomplete last batch is dropped."""
    order = generator.permutation(len(dataset.train_images))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield dataset.train_images[chosen], dataset.train_labels[chosen]


def evaluate(params: PyTree, dataset: Dataset) -> tuple[float, float, float]:
    """Loss on the training set, and loss and accuracy on the test set."""
    train_loss, _ = mean_loss_and_accuracy(params, dataset.train_images, dataset.train_labels)
    return train_loss, *mean_loss_and_accuracy(params, dataset.test_images, dataset.test_labels)


def mean_loss_and_accuracy(
    params: PyTree, images: np.ndarray, labels: np.ndarray, size: int = 2000
) -> tuple[float, float]:
    """Both over all examples, ``size`` of them at a time."""
    totals = np.zeros(2)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        totals += np.array(loss_and_hits(params, images[part], labels[part]))
    loss, accuracy = totals / len(images)
    return float(loss), float(accuracy)


@jax.jit
def loss_and_hits(
    params: PyTree, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = model.apply(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(axis=-1) == labels).sum()


def table(results: dict[str, Result]) -> str:
    rows = [f"{'':13}  train loss  test loss  test accuracy  ms a step"]
    rows += [
        f"{name:13}  {result.train_losses[-1]:10.5f}  {result.test_losses[-1]:9.4f}"
        f"  {result.test_accuracy:13.2%}  {result.milliseconds_per_step:9.2f}"
        for name, result in results.items()
    ]
    return "\n".join(rows)


def plot(results: dict[str, Result], title: str, path: Path) -> None:
    """Loss curves; the figure is drawn without pyplot, so it needs no display."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#0072b2", "#cc79a7", "#d55e00", "#009e73")
    for (name, result), color in zip(results.items(), colors, strict=True):
        left.plot(result.train_losses, color=color, label=name)
        right.plot(result.test_losses, color=color, label=name)
    for axes, label in ((left, "training loss"), (right, "test loss")):
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_title(label, loc="left", fontsize="medium")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def load(dataset: str, data_dir: Path) -> Dataset:
    return digits() if dataset == "digits" else from_idx_files(data_dir)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N", type=positive)
    parser.add_argument("--dataset", choices=tuple(EPOCHS), default="digits")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four IDX files, compressed with gzip or not (default: %(default)s)",
    )
    option("--epochs", help="default: 20 on the digits, 3 on Fashion-MNIST")
    option("--batch-size", default=32, help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build"),
        help="folder for the plot (default: %(default)s)",
    )
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        dataset = load(args.dataset, args.data_dir)
    except DatasetError as error:
        parser.exit(2, f"{error}\n")
    if args.batch_size > len(dataset.train_images):
        parser.error(f"--batch-size is above the {len(dataset.train_images)} training images")
    epochs = args.epochs or EPOCHS[args.dataset]
    results = {
        name: train(name, contestant, dataset, epochs, args.batch_size, args.seed)
        for name, contestant in CONTESTANTS.items()
    }
    print(f"\n{table(results)}")
    path = args.output / f"{args.dataset}.png"
    plot(results, f"A small CNN on {args.dataset}, {epochs} epochs of {args.batch_size}", path)
    print(f"\nLoss curves: {path}")


if __name__ == "__main__":
    main()
