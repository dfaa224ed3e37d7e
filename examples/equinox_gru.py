"""Trains an Equinox model, a recurrent network that reads an image row by row, with AdaHessian.

    python examples/equinox_gru.py

The images are scikit-learn's digits. Prints the test accuracy after each epoch, and what the
largest eigenvalues of the Hessian are at the end; saves the model and the optimizer's state.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvax
from curvax import spectrum

PyTree = Any


class RowReader(eqx.Module):
    """A gated recurrent unit over the rows, and a linear layer on its last state."""

    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, width: int, key: jax.Array) -> None:
        cell_key, out_key = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(8, width, key=cell_key)
        self.out = eqx.nn.Linear(width, 10, key=out_key)

    def __call__(self, image: jax.Array) -> jax.Array:
        first = jnp.zeros(self.cell.hidden_size)
        last, _ = jax.lax.scan(lambda state, row: (self.cell(row, state), None), first, image)
        return self.out(last)


def loss_fn(params: PyTree, static: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Of the parameters alone: curvature is taken of them, and the rest of the model is static."""
    logits = jax.vmap(eqx.combine(params, static))(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(args: argparse.Namespace) -> float:
    """Trains, prints and saves; returns the last test accuracy."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    model = RowReader(args.width, jax.random.key(args.seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    steps_per_epoch = len(train_images) // args.batch_size
    steps = args.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.3, steps // 20, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        curvax.adahessian(schedule, nesterov=True, update_interval=5, refresh_warmup=50),
    )
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss_fn)

    @eqx.filter_jit
    def step(params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array) -> Any:
        loss, grads, diag = one_pass(params, static, images, labels, state=state)
        updates, state = tx.update(grads, state, params, hessian_diag=diag)
        return eqx.apply_updates(params, updates), state, loss

    @eqx.filter_jit
    def accuracy(params: PyTree) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(test_images)
        return (logits.argmax(axis=-1) == test_labels).mean()

    state = tx.init(params)
    generator = np.random.default_rng(args.seed)
    for epoch in range(args.epochs):
        order = generator.permutation(len(train_images))[: steps_per_epoch * args.batch_size]
        for chosen in order.reshape(steps_per_epoch, args.batch_size):
            params, state, loss = step(params, state, train_images[chosen], train_labels[chosen])
        print(f"epoch {epoch + 1:3}  loss {loss:.4f}  test accuracy {accuracy(params):.2%}")

    batch = static, train_images, train_labels
    hessian = spectrum.hessian_operator(loss_fn, params, [batch])
    pairs = spectrum.top_eigenpairs(hessian, 3, key=args.seed)
    print("largest eigenvalues of the Hessian: " + ", ".join(f"{v:.3g}" for v in pairs.values))

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "equinox_gru.eqx"
    # The optimizer's state holds a typed key, whose data alone can be written.
    state = optax.tree.unwrap_random_key_data(state)
    eqx.tree_serialise_leaves(path, (eqx.combine(params, static), state))
    print(f"model and optimizer: {path}")
    return float(accuracy(params))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = partial(parser.add_argument, metavar="N", type=int)
    option("--epochs", default=10, help="default: %(default)s")
    option("--batch-size", default=32, help="default: %(default)s")
    option("--width", default=64, help="of the state (default: %(default)s)")
    option("--seed", default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build"),
        help="folder for the model (default: %(default)s)",
    )
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
