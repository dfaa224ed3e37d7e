"""A language model of characters on Shakespeare's works."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models_flax import Transformer

import curvax
from training.tasks.task import DataError, Numbers, Task, Variables, mean_of_parts, warmup_cosine

PyTree = Any


def shakespeare(size: str, data_dir: Path) -> Task:
    """A decoder-only transformer; nine tenths of the text are for training."""
    path = data_dir / "tinyshakespeare.txt"
    if not path.is_file():
        raise DataError(f"Shakespeare: {path} does not exist; --data-dir names its folder.")
    characters, text = np.unique(list(path.read_text()), return_inverse=True)
    text = text.astype(np.int32)
    train, validation, test = np.split(text, [len(text) * 18 // 20, len(text) * 19 // 20])
    vocabulary = len(characters)
    sizes = {  # the model, the length of a window, the batch size and the steps
        "cpu": (Transformer(vocabulary, 64, 2, 4), 64, 16, 500),
        "pruning": (Transformer(vocabulary, 256, 3, 4), 128, 16, 1200),
        "accelerator": (Transformer(vocabulary, 384, 6, 6), 256, 64, 3000),
    }
    model, length, batch_size, steps = sizes[size]

    def windows(part: np.ndarray) -> jax.Array:
        """Consecutive windows of one token more than the model reads."""
        number = (len(part) - 1) // length
        number -= number % 100  # so that parts of an evaluation have equal sizes
        return jnp.stack([part[i * length : (i + 1) * length + 1] for i in range(number)])

    splits = {"validation": windows(validation), "test": windows(test)}

    def init(key: jax.Array) -> Variables:
        return Variables(model.init(key, splits["test"][:1, :-1])["params"], {})

    def apply(params: PyTree, tokens: jax.Array, statistics: PyTree, _: Any) -> Any:
        return model.apply({"params": params}, tokens), statistics

    @jax.jit
    def numbers(variables: Variables, tokens: jax.Array) -> dict[str, jax.Array]:
        logits = model.apply({"params": variables.params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return {"loss": losses.mean()}

    def evaluate(variables: Variables, split: str) -> Numbers:
        return mean_of_parts(numbers, variables, splits[split], 100)

    def sample(text: jax.Array, _: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.randint(key, (batch_size, 1), 0, len(text) - length)
        tokens = text[starts + jnp.arange(length + 1)]
        return tokens[:, :-1], tokens[:, 1:]

    return Task(
        name="shakespeare",
        words=f"characters of Shakespeare, {model.layers} transformer layers of {model.width}",
        metric="loss",
        data=jax.device_put(train),
        num_examples=None,
        batch_size=batch_size,
        steps=steps,
        evaluations=10,
        init=init,
        apply=apply,
        loss=curvax.softmax_cross_entropy,
        sample=sample,
        evaluate=evaluate,
        model=model,
        schedule=warmup_cosine,
    )
