"""The two networks of the benchmarks, as functions of parameters, in Flax."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization, and the shortcut without parameters."""

    filters: int
    stride: int
    conv: type[nn.Module] = nn.Conv
    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(inputs: jax.Array, stride: int) -> jax.Array:
            outputs = self.conv(self.filters, (3, 3), (stride, stride), padding=1, use_bias=False)
            norm = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)
            return norm(outputs(inputs))

        y = conv(nn.relu(conv(x, self.stride)), 1)
        if self.stride > 1:
            grow = self.filters - x.shape[-1]
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (grow // 2, grow - grow // 2)))
        return nn.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al., 2015, Section 4.2), or one of other sizes."""

    conv: type[nn.Module] = nn.Conv
    train: bool = True
    blocks: int = 3
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(self.width, (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResNetBlock(self.width * 2**stage, stride, self.conv, self.train)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class TransformerBlock(nn.Module):
    """Pre-norm causal attention and a feed-forward layer, computed in ``dtype``."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype)

        def norm(inputs: jax.Array) -> jax.Array:
            return nn.LayerNorm(dtype=self.dtype)(inputs)

        batch, length, width = x.shape
        q, k, v = jnp.split(dense(3 * width)(norm(x)), 3, axis=-1)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape) for part in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // self.heads)
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(width)(attended)
        return x + dense(width)(nn.gelu(dense(4 * width)(norm(x))))


class Transformer(nn.Module):
    """A decoder-only language model with learned positions."""

    vocabulary: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(tokens.shape[-1], self.width)(jnp.arange(tokens.shape[-1]))
        for _ in range(self.layers):
            x = TransformerBlock(self.heads)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Problem(NamedTuple):
    """A network with parameters, batch statistics and a batch."""

    params: PyTree
    statistics: PyTree
    inputs: jax.Array
    targets: jax.Array
    network: Callable[..., Any]  # (params, inputs, statistics=...) -> logits, statistics

    def loss(
        self, params: PyTree, inputs: jax.Array, targets: jax.Array, statistics: PyTree
    ) -> tuple[jax.Array, PyTree]:
        logits, statistics = self.network(params, inputs, statistics=statistics)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), statistics


def problem_of(model: nn.Module, inputs: jax.Array, targets: jax.Array) -> Problem:
    variables = model.init(jax.random.key(0), inputs)
    params, statistics = variables["params"], variables.get("batch_stats", {})

    def network(params: PyTree, inputs: jax.Array, statistics: PyTree) -> Any:
        logits, changed = model.apply(
            {"params": params, "batch_stats": statistics}, inputs, mutable=["batch_stats"]
        )
        return logits, changed.get("batch_stats", {})

    return Problem(params, statistics, inputs, targets, network)


def resnet20(batch_size: int = 32, conv: type[nn.Module] = nn.Conv) -> Problem:
    keys = jax.random.split(jax.random.key(1))
    images = jax.random.normal(keys[0], (batch_size, 32, 32, 3))
    return problem_of(ResNet20(conv), images, jax.random.randint(keys[1], (batch_size,), 0, 10))


def transformer(batch_size: int = 8, length: int = 128) -> Problem:
    tokens = jax.random.randint(jax.random.key(1), (batch_size, length + 1), 0, 256)
    return problem_of(Transformer(), tokens[:, :-1], tokens[:, 1:])


PROBLEMS: dict[str, Callable[[], Problem]] = {"resnet20": resnet20, "transformer": transformer}
