"""What the scripts of the gallery share: data, a network, a training loop, and a figure."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

PyTree = Any
Batch = tuple[jax.Array, jax.Array]

BLUE, ORANGE, GREEN, PINK, GRAY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"
IMAGES = Path(__file__).parents[2] / "docs" / "gallery" / "images"


def digits(num_train: int = 1400) -> tuple[Batch, Batch]:
    """Scikit-learn's digits in a fixed random order, for training and for tests."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = jnp.array(images[order] / 16, jnp.float32)
    labels = jnp.array(labels[order], jnp.int32)
    return (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:])


def init_mlp(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Layers with kernels of variance one over the fan-in, and zero biases."""
    shapes = list(itertools.pairwise(widths))
    keys = jax.random.split(key, len(shapes))
    return [
        {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5, "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def features(
    params: PyTree, inputs: jax.Array, activation: Callable[..., jax.Array] = jnp.tanh
) -> jax.Array:
    """What the last layer is given."""
    for layer in params[:-1]:
        inputs = activation(inputs @ layer["kernel"] + layer["bias"])
    return inputs


def apply_mlp(
    params: PyTree, inputs: jax.Array, activation: Callable[..., jax.Array] = jnp.tanh
) -> jax.Array:
    hidden = features(params, inputs, activation)
    return hidden @ params[-1]["kernel"] + params[-1]["bias"]


def cross_entropy(params: PyTree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    logits = apply_mlp(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    tx: optax.GradientTransformation,
    data: Any,
    num_steps: int,
    *,
    batch_size: int | None = None,
    key: jax.Array | int = 0,
) -> tuple[PyTree, jax.Array]:
    """Parameters after so many steps, on random batches or on all data, and the losses."""
    key = jax.random.key(key) if isinstance(key, int) else key
    number = len(jax.tree.leaves(data)[0])

    def step(carry: Any, step_key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = data
        if batch_size is not None:
            chosen = jax.random.randint(step_key, (batch_size,), 0, number)
            batch = jax.tree.map(lambda leaf: leaf[chosen], data)
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def run(params: PyTree) -> tuple[PyTree, jax.Array]:
        keys = jax.random.split(key, num_steps)
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, losses

    return run(params)


def panels(number: int, *, width: float = 4.0, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width * number, height), layout="constrained")
    axes = figure.subplots(1, number, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def main(draw: Callable[[bool], Figure], script: str) -> None:
    """Draws the figure of a script, at the size of the page or, with --quick, of a test."""
    parser = argparse.ArgumentParser(description=f"Draws the figure of {Path(script).stem}.")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--output", metavar="DIR", type=Path, default=IMAGES)
    args = parser.parse_args()
    figure = draw(args.quick)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{Path(script).stem}.png"
    figure.savefig(path, dpi=110)
    print(path)
