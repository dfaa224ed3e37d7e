"""Click prediction, with a network like DLRM, on data of a stated process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from training.tasks.task import Batch, Numbers, PyTree, Task, Variables, warmup_cosine

SEED = 2024
NUM_CATEGORICAL = 8
ZIPF_EXPONENT = 1.2
SCALES = np.geomspace(1e-2, 1e3, 6)  # the medians of the numerical features
IS_LOGGED = np.isin(np.arange(6), [1, 4, 5])  # those of which the network is given log(1 + x)
CLICK_RATE = 0.2
HIDDEN_WIDTH = 4
DEVIATIONS = (1.0, 0.6, 0.8)  # of the terms of the log-odds
EVALUATION_BATCH = 10_000


class Size(NamedTuple):
    """What depends on the machine."""

    largest_vocabulary: int
    num_train: int
    num_validation: int  # as num_test, a multiple of EVALUATION_BATCH
    num_test: int
    batch_size: int
    epochs: int
    width: int


SIZES = {
    "cpu": Size(5_000, 60_000, 10_000, 20_000, 128, 2, 8),
    "accelerator": Size(100_000, 4_000_000, 200_000, 400_000, 2048, 1, 16),
}


class Examples(NamedTuple):
    """Examples, and the true probability of a click."""

    ids: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    def part(self, start: int, size: int) -> "Examples":
        return Examples(*(array[start : start + size] for array in self))


def vocabularies(largest: int) -> tuple[int, ...]:
    """The number of ids of each categorical feature, from 10 on."""
    return tuple(int(size) for size in np.geomspace(10, largest, NUM_CATEGORICAL).round())


def generate(size: Size) -> Examples:
    """Draws all examples.

    Ids follow Zipf laws and numbers log-normal ones. The log-odds of a click are the sum of three
    terms with set deviations over the examples - effects of single ids; products, over all pairs
    of features, of hidden vectors of the ids; smooth functions of the numbers' logarithms - and of
    a constant.
    """
    rng = np.random.default_rng(SEED)
    count = size.num_train + size.num_validation + size.num_test
    sizes = vocabularies(size.largest_vocabulary)
    ids = np.stack([zipf(rng, vocabulary, count) for vocabulary in sizes], axis=1)
    normal = rng.standard_normal((count, len(SCALES)), dtype=np.float32)
    terms = (
        id_effects(rng, ids, sizes),
        pair_products(rng, ids, sizes),
        functions_of_numbers(normal),
    )
    scaled = [scale * standardized(term) for scale, term in zip(DEVIATIONS, terms, strict=True)]
    log_odds = np.sum(scaled, axis=0)
    probabilities = sigmoid(log_odds + intercept(log_odds))
    labels = (rng.random(count) < probabilities).astype(np.int32)
    numbers = np.exp(normal) * SCALES
    numbers = np.where(IS_LOGGED, np.log1p(numbers), numbers).astype(np.float32)
    return Examples(ids, numbers, labels, probabilities)


def zipf(rng: np.random.Generator, vocabulary: int, count: int) -> np.ndarray:
    """Ids of which the one of rank r has a probability in proportion to a power of 1/r."""
    cumulative = np.cumsum(np.arange(1, vocabulary + 1) ** -ZIPF_EXPONENT)
    uniform = rng.random(count) * cumulative[-1]
    return np.searchsorted(cumulative[:-1], uniform, side="right").astype(np.int32)


def id_effects(rng: np.random.Generator, ids: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """A normal effect of each id."""
    effects = (rng.standard_normal(size) for size in sizes)
    return sum(effect[column] for effect, column in zip(effects, ids.T, strict=True))


def pair_products(rng: np.random.Generator, ids: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The dot products of hidden vectors, over all pairs: (|sum u|^2 - sum |u|^2) / 2."""
    total, squares = np.zeros((len(ids), HIDDEN_WIDTH)), np.zeros(len(ids))
    for size, column in zip(sizes, ids.T, strict=True):
        vectors = rng.standard_normal((size, HIDDEN_WIDTH))
        total += vectors[column]
        squares += np.sum(vectors**2, axis=1)[column]
    return (np.sum(total**2, axis=1) - squares) / 2


def functions_of_numbers(normal: np.ndarray) -> np.ndarray:
    """Smooth functions of the logarithms, before they are scaled, and a product of two."""
    a, b, c, d, e, f = normal.T.astype(np.float64)
    return np.sin(2 * a) + np.tanh(2 * b) + 0.7 * c - 0.5 * d**2 + np.cos(e) + 0.5 * e * f


def intercept(log_odds: np.ndarray) -> float:
    """The constant at which the mean probability is the click rate, by bisection."""
    log_odds = log_odds[:100_000]
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        too_many = np.mean(sigmoid(log_odds + middle)) > CLICK_RATE
        low, high = (low, middle) if too_many else (middle, high)
    return middle


def standardized(values: np.ndarray) -> np.ndarray:
    return (values - np.mean(values)) / np.std(values)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def entropy(probabilities: np.ndarray) -> float:
    """The mean entropy of the true probabilities, in nats: the best loss to expect."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-np.mean(p * np.log(p) + (1 - p) * np.log1p(-p)))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a click has the higher score, ties counted half; for NaN, a tie."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = int(np.sum(labels))
    above = np.sum(ranks[labels == 1]) - positive * (positive + 1) / 2
    return float(above / (positive * (len(labels) - positive)))


class ClickModel(nn.Module):
    """Embeddings, an MLP for the numbers, all dot products of two vectors, an MLP on top."""

    vocabularies: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array, numbers: jax.Array) -> jax.Array:
        dense = nn.Dense(self.width)(nn.relu(nn.Dense(32)(numbers)))
        vectors = [
            nn.Embed(size, self.width)(ids[:, feature])
            for feature, size in enumerate(self.vocabularies)
        ]
        stacked = jnp.stack([dense, *vectors], axis=1)
        products = jnp.einsum("bid,bjd->bij", stacked, stacked)
        pairs = products[:, *np.triu_indices(stacked.shape[1], 1)]
        x = jnp.concatenate([dense, pairs], axis=1)
        for features in (64, 32):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(2)(x)


def evaluation(
    model: ClickModel, splits: dict[str, Examples]
) -> Callable[[Variables, str], Numbers]:
    """The function ``evaluate`` of the task."""

    @jax.jit
    def judge(params: PyTree, examples: Examples) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, examples.ids, examples.numbers)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
        return losses, logits[:, 1] - logits[:, 0]

    def evaluate(variables: Variables, split: str) -> Numbers:
        examples = splits[split]
        starts = range(0, len(examples.labels), EVALUATION_BATCH)
        parts = [judge(variables.params, examples.part(s, EVALUATION_BATCH)) for s in starts]
        losses, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return {
            "loss": float(np.mean(losses, dtype=np.float64)),
            "auc": area_under_curve(scores, examples.labels),
        }

    return evaluate


def clicks(size: str, data_dir: Path) -> Task:  # noqa: ARG001
    """Click prediction on generated data."""
    sizes = SIZES[size]
    examples = generate(sizes)
    train = examples.part(0, sizes.num_train)
    splits = {
        "validation": examples.part(sizes.num_train, sizes.num_validation),
        "test": examples.part(sizes.num_train + sizes.num_validation, sizes.num_test),
    }
    model = ClickModel(vocabularies(sizes.largest_vocabulary), sizes.width)

    def init(key: jax.Array) -> Variables:
        ids = jnp.zeros((1, NUM_CATEGORICAL), jnp.int32)
        return Variables(model.init(key, ids, jnp.zeros((1, len(SCALES))))["params"], {})

    def apply(
        params: PyTree,
        inputs: Batch,
        statistics: PyTree,
        key: jax.Array,  # noqa: ARG001
    ) -> tuple[jax.Array, PyTree]:
        return model.apply({"params": params}, *inputs), statistics

    def sample(data: PyTree, indices: jax.Array, key: jax.Array) -> Batch:  # noqa: ARG001
        ids, numbers, labels = (array[indices] for array in data)
        return (ids, numbers), labels

    return Task(
        name="clicks",
        words=(
            f"click prediction on {sizes.num_train:,} generated examples with "
            f"{NUM_CATEGORICAL} categorical and {len(SCALES)} badly scaled numerical features, "
            f"by embeddings of width {sizes.width} and their dot products; the best possible test "
            f"loss is {entropy(splits['test'].probabilities):.4f}"
        ),
        metric="loss",
        data=tuple(jnp.asarray(array) for array in (train.ids, train.numbers, train.labels)),
        num_examples=sizes.num_train,
        batch_size=sizes.batch_size,
        steps=sizes.epochs * (sizes.num_train // sizes.batch_size),
        evaluations=8,
        init=init,
        apply=apply,
        loss=curvax.softmax_cross_entropy,
        sample=sample,
        evaluate=evaluation(model, splits),
        schedule=warmup_cosine,
    )
