"""Batches of a network and a loss of its outputs, checked before any work is done."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.curvature._batch_loss import BatchLoss, WeightedTargets
from curvax.curvature._jacobian import Network
from curvax.curvature._losses import Loss, OutputLoss, output_loss, squared_error
from curvax.influence._examples import Part


def checked_outputs(network: Network, loss: Loss, params: Any, part: Part) -> tuple[int, ...]:
    """The shape of the network's outputs for some examples, if these and their targets fit."""
    if len(part.arguments) != 2:
        raise ValueError(
            f"a batch must be a pair (inputs, targets), got {len(part.arguments)} arguments: put "
            "several inputs into one tree, or use empirical_fisher_influence, which takes a loss "
            "of any arguments."
        )
    inputs, targets = part.arguments
    outputs = jax.eval_shape(network, params, inputs)
    _check_outputs(outputs, part.size)
    of_outputs = output_loss(loss)
    _check_targets(of_outputs, targets, outputs.shape)
    # An array of zeros that takes no memory: only its shape matters.
    zeros: Any = np.broadcast_to(np.float32(0), outputs.shape)
    BatchLoss.of(of_outputs, zeros, targets)
    return outputs.shape


def _check_outputs(outputs: Any, number: int) -> None:
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != number:
        found = type(outputs).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            f"the network must return an array of outputs of shape ({number}, ..., C) for {number} "
            f"examples, got {found}: keep the axis of examples, and drop anything beside outputs."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"the network's outputs must be real, got {outputs.dtype}.")


def _check_targets(loss: OutputLoss, targets: Any, shape: tuple[int, ...]) -> None:
    if isinstance(targets, WeightedTargets):
        if len(shape) == 2:
            raise ValueError(
                "WeightedTargets with one weight per example have no place here, where each "
                "example gets a score: pass the targets alone, and leave out examples of weight 0."
            )
        targets = targets.targets
    same = jnp.shape(targets) == shape
    if loss.value is squared_error.value and not same:
        raise ValueError(
            f"squared_error needs targets of the outputs' shape {shape}, got {jnp.shape(targets)}."
        )
    if loss.takes_labels and not same and not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integer labels of shape {shape[:-1]} or probabilities of shape "
            f"{shape}, got {targets.dtype} of shape {jnp.shape(targets)}: convert labels with "
            "labels.astype(int)."
        )
