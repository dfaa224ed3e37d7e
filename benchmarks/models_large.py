"""Two networks of an accelerator's size, computing in bfloat16, in Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from models_flax import Problem, TransformerBlock, problem_of

BFLOAT16 = jnp.bfloat16


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch normalization around a projected shortcut."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(inputs: jax.Array, filters: int, size: int, stride: int = 1) -> jax.Array:
            layer = nn.Conv(filters, (size, size), (stride, stride), use_bias=False, dtype=BFLOAT16)
            norm = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=BFLOAT16)
            return norm(layer(inputs))

        y = nn.relu(conv(x, self.filters, 1))
        y = nn.relu(conv(y, self.filters, 3, self.stride))
        y = conv(y, 4 * self.filters, 1)
        if x.shape != y.shape:
            x = conv(x, 4 * self.filters, 1, self.stride)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 (He et al., 2015, Table 1)."""

    stages: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=BFLOAT16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=BFLOAT16)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, stride)(x)
        return nn.Dense(1000)(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


class GPT(nn.Module):
    """A decoder-only language model of GPT-2's shape; the layers are one scan."""

    vocabulary: int
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[-1]
        x = nn.Embed(self.vocabulary, self.width, dtype=BFLOAT16)(tokens)
        x = x + nn.Embed(length, self.width, dtype=BFLOAT16)(jnp.arange(length))
        scanned = nn.scan(
            _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scanned(self.heads)(x)
        x = nn.LayerNorm(dtype=BFLOAT16)(x)
        logits = nn.Dense(self.vocabulary, use_bias=False, dtype=BFLOAT16)(x)
        return logits.astype(jnp.float32)


class _Layer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return TransformerBlock(self.heads, BFLOAT16)(x), None


def gpt(tiny: bool = False) -> Problem:
    """GPT-2 small without tied embeddings, 163 million parameters, on 8 x 1024 tokens."""
    vocabulary, width, layers, heads = (64, 16, 2, 2) if tiny else (50257, 768, 12, 12)
    shape = (2, 9) if tiny else (8, 1025)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary)
    return problem_of(GPT(vocabulary, width, layers, heads), tokens[:, :-1], tokens[:, 1:])


def resnet50(tiny: bool = False) -> Problem:
    """ResNet-50 on 64 images of 224 x 224."""
    batch, side = (2, 32) if tiny else (64, 224)
    image_key, target_key = jax.random.split(jax.random.key(1))
    images = jax.random.normal(image_key, (batch, side, side, 3))
    model = ResNet50((1, 1)) if tiny else ResNet50()
    return problem_of(model, images, jax.random.randint(target_key, (batch,), 0, 1000))
