"""Trains ResNet-20 on Fashion-MNIST, once for each seed, and evaluates it."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from models_flax import ResNet20
from tqdm import tqdm

from curvax import pruning

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from datasets import Dataset, from_idx_files  # noqa: E402

PyTree = Any

BATCH_SIZE = 16  # on a CPU an example costs a third less than in batches of 128
FOLDER = ROOT / "build" / "pruning"


class HashableDataset(Dataset):
    """Hashed by identity, so that functions of it can be cached."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def load(folder: Path, test_images: int) -> HashableDataset:
    everything = from_idx_files(folder)
    return HashableDataset(*everything[:2], *(part[:test_images] for part in everything[2:]))


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
