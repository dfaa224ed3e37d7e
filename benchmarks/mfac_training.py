"""M-FAC against Adam and SGD with momentum: a small CNN on Fashion-MNIST."""

import argparse
import datetime
import importlib.metadata
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from flax import linen as nn
from tqdm import tqdm

import curvax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from datasets import Dataset, from_idx_files  # noqa: E402

PyTree = Any
Run = dict[str, Any]

HELD_OUT = 5000  # training images on which the rates are chosen


class CNN(nn.Module):
    """Two strided convolutions and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), strides=(2, 2))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Contestant(NamedTuple):
    """What rescales the gradient, with which options, and the peak rates to try."""

    scaling: Callable[..., optax.GradientTransformation]
    options: dict[str, Any]
    clip: float | None
    rates: tuple[float, ...]


CONTESTANTS = {
    "M-FAC": Contestant(
        curvax.scale_by_mfac, {"num_grads": 256, "damping": 1e-4}, None, (1e-4, 2e-4, 4e-4)
    ),
    "Adam": Contestant(optax.scale_by_adam, {"b2": 0.999}, None, (1e-3,)),
    "SGD, momentum 0.9": Contestant(optax.trace, {"decay": 0.9}, None, (1e-1,)),
}

model = CNN()


def loss_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_chain(contestant: Contestant, rate: float, num_steps: int) -> Any:
    """The optimizer under a schedule that warms up over a twentieth and decays to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 20, num_steps)
    clip = (
        optax.identity() if contestant.clip is None else optax.clip_by_global_norm(contestant.clip)
    )
    return optax.chain(
        clip, contestant.scaling(**contestant.options), optax.scale_by_learning_rate(schedule)
    )


def make_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params, state, images, labels, chosen):
        loss, grads = jax.value_and_grad(loss_fn)(params, images[chosen], labels[chosen])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batches(count: int, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch in random order; what does not fill a batch is left out."""
    order = generator.permutation(count)
    yield from order[: count // size * size].reshape(-1, size)


def train(data, contestant: Contestant, rate: float, seed: int, epochs: int, batch_size: int):
    images, labels = data["train"]
    steps = len(images) // batch_size
    tx = make_chain(contestant, rate, epochs * steps)
    params = model.init(jax.random.key(seed), images[:1])
    state, step = tx.init(params), make_step(tx)
    generator = np.random.default_rng(seed)
    held_out = []
    test = [evaluate(params, *data["test"])[0]]
    for _ in range(epochs):
        for chosen in batches(len(images), batch_size, generator):
            params, state, _ = step(params, state, images, labels, chosen)
        held_out.append(evaluate(params, *data["held_out"])[0])
    loss, acc = evaluate(params, *data["test"])
    f = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "failures"))
        if hasattr(s, "failures")
    ]
    return dict(
        train=evaluate(params, *data["train"])[0],
        held=held_out,
        test=loss,
        acc=acc,
        failures=int(f[0].failures) if f else None,
    )


def evaluate(params: PyTree, images, labels, size: int = 5000) -> tuple[float, float]:
    totals = np.zeros(2)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        totals += np.array(loss_and_hits(params, images[part], labels[part]))
    loss, accuracy = totals / len(images)
    return float(loss), float(accuracy)


@jax.jit
def loss_and_hits(params, images, labels):
    logits = model.apply(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(axis=-1) == labels).sum()


def load(folder):
    d = from_idx_files(folder)
    d = Dataset(*map(jnp.asarray, d))
    return {
        "train": (d.train_images[:-HELD_OUT], d.train_labels[:-HELD_OUT]),
        "held_out": (d.train_images[-HELD_OUT:], d.train_labels[-HELD_OUT:]),
        "test": (d.test_images, d.test_labels),
    }
