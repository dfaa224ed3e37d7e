"""Trains a small Flax CNN with AdaHessian, Adam and SGD with momentum, for equal epochs.

    python examples/digits.py
    python examples/digits.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist

Prints a table and the path of a plot of the loss curves.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Dataset, DatasetError, digits, from_idx_files
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax

PyTree = Any
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
