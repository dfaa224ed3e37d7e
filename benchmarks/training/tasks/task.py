"""What a training task is: data, a network, a loss on its outputs, and how it is judged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import OutputLoss, WeightedTargets

PyTree = Any
Batch = tuple[Any, Any]  # inputs and targets
Numbers = dict[str, float]


class DataError(Exception):
    """Data that is not there; the message is a sentence for the user."""


class Variables(NamedTuple):
    """What training changes."""

    params: PyTree
    statistics: PyTree  # running means and variances of batch normalization; {} without


class Task(NamedTuple):
    """A training task.

    Attributes:
      name: its key in tables.
      words: what it is, in a sentence.
      metric: the number of ``evaluate`` by which trials are chosen and runs compared; lower is
        better.
      data: the training data on the device, a tree of arrays.
      num_examples: the number of training examples, which are shuffled once an epoch; None where
        ``sample`` draws from its key alone.
      batch_size: the number of examples in a batch.
      steps: the number of steps of a run.
      evaluations: how often a run is judged on validation data, at equal distances.
      init: ``key -> Variables``.
      apply: ``(params, inputs, statistics, noise_key) -> (outputs, statistics)``, in training mode;
        outputs of shape (batch, ..., C).
      loss: the loss of one example's outputs, of which the mean is minimized.
      sample: ``(data, indices, key) -> (inputs, targets)``: a batch, augmented.
      evaluate: ``(variables, split) -> numbers`` on ``"validation"`` or ``"test"`` data.
      schedule: the learning rate's factor at a step, over the run's length: ``(count, steps)``.
      model: the Flax module in evaluation mode, where pruning needs it.
      scannable: whether an epoch may be one compiled scan on a CPU, whose convolutions are slow
        inside loops.
    """

    name: str
    words: str
    metric: str
    data: PyTree
    num_examples: int | None
    batch_size: int
    steps: int
    evaluations: int
    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[jax.Array, PyTree]]
    loss: OutputLoss
    sample: Callable[[PyTree, jax.Array, jax.Array], Batch]
    evaluate: Callable[[Variables, str], Numbers]
    schedule: Callable[[jax.Array, int], jax.Array]
    model: Any = None
    scannable: bool = True

    def mean_loss(
        self, params: PyTree, inputs: Any, targets: Any, statistics: PyTree, noise_key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """The mean loss of a batch, weighted where the targets are, and the new statistics."""
        outputs, statistics = self.apply(params, inputs, statistics, noise_key)
        return mean_loss(self.loss, outputs, targets), statistics


def mean_loss(loss: OutputLoss, outputs: jax.Array, targets: Any) -> jax.Array:
    """The mean of an output loss over all axes but the last."""
    weights = None
    if isinstance(targets, WeightedTargets):
        targets, weights = targets
    outputs = outputs.reshape(-1, outputs.shape[-1])
    targets = targets.reshape(-1) if loss.takes_labels else targets.reshape(outputs.shape)
    losses = jax.vmap(loss.value)(outputs, targets)
    if weights is None:
        return jnp.mean(losses)
    weights = weights.reshape(-1)
    return jnp.sum(weights * losses) / jnp.sum(weights)


def warmup_cosine(count: jax.Array, steps: int) -> jax.Array:
    """A linear warm-up over a twentieth of the run, then a cosine to zero."""
    progress = (count + 1) / steps
    decay = 0.5 * (1 + jnp.cos(jnp.pi * (progress - 0.05) / 0.95))
    return jnp.where(progress < 0.05, progress / 0.05, decay)


def mean_of_parts(
    numbers: Callable[..., Numbers], variables: Variables, arrays: PyTree, size: int
) -> Numbers:
    """Means of numbers over parts of ``size`` examples, which must divide their number."""
    count = len(jax.tree.leaves(arrays)[0])
    parts = [
        numbers(variables, jax.tree.map(lambda leaf: leaf[start : start + size], arrays))  # noqa: B023
        for start in range(0, count, size)
    ]
    return {key: float(np.mean([part[key] for part in parts])) for key in parts[0]}
