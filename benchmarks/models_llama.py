"""A language model of Llama's shape (Touvron et al., 2023), as shapes: nothing is allocated.

Weights are float32 and computed with in bfloat16; the layers are one scan, recomputed in the
backward pass. Weights are split over two axes of a mesh, ``data`` and ``tensor``, the batch over
``data``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
BFLOAT16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of the model with seven billion parameters."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    length: int = 2048

    def params(self, mesh: Mesh) -> PyTree:
        """Shapes and shardings of the weights."""
        layers, width, hidden, vocabulary = self.layers, self.width, self.hidden, self.vocabulary
        into_heads = (layers, width, self.heads, width // self.heads)
        out_of_heads = (layers, self.heads, width // self.heads, width)
        by_head = P(None, "data", "tensor", None)
        leaves = {
            "embedding": ((vocabulary, width), P("tensor", "data")),
            "layers": {
                "query": (into_heads, by_head),
                "key": (into_heads, by_head),
                "value": (into_heads, by_head),
                "out": (out_of_heads, P(None, "tensor", None, "data")),
                "gate": ((layers, width, hidden), P(None, "data", "tensor")),
                "up": ((layers, width, hidden), P(None, "data", "tensor")),
                "down": ((layers, hidden, width), P(None, "tensor", "data")),
                "attention_norm": ((layers, width), P()),
                "mlp_norm": ((layers, width), P()),
            },
            "norm": ((width,), P()),
            "head": ((width, vocabulary), P("data", "tensor")),
        }

        def leaf(shape_and_spec: tuple[tuple[int, ...], P]) -> jax.ShapeDtypeStruct:
            shape, spec = shape_and_spec
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(leaf, leaves, is_leaf=lambda node: isinstance(node, tuple))

    def tokens(self, mesh: Mesh, sequences: int) -> jax.ShapeDtypeStruct:
        """A batch with so many sequences for each part of ``data``, and a token more in each."""
        shape = (sequences * mesh.shape["data"], self.length + 1)
        sharding = NamedSharding(mesh, P("data"))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def network(self, mesh: Mesh) -> Callable[[PyTree, jax.Array], jax.Array]:
        """A function of weights and tokens that returns logits."""
        by_batch = NamedSharding(mesh, P("data", None, None))

        def layer(x: jax.Array, weights: PyTree) -> tuple[jax.Array, None]:
            weights = jax.tree.map(lambda w: w.astype(BFLOAT16), weights)
            x = x + _attention(_normalized(x, weights["attention_norm"]), weights)
            x = x + _mlp(_normalized(x, weights["mlp_norm"]), weights)
            return jax.lax.with_sharding_constraint(x, by_batch), None

        def logits(params: PyTree, tokens: jax.Array) -> jax.Array:
            x = params["embedding"].astype(BFLOAT16)[tokens]
            x = jax.lax.with_sharding_constraint(x, by_batch)
            x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
            x = _normalized(x, params["norm"].astype(BFLOAT16))
            return (x @ params["head"].astype(BFLOAT16)).astype(jnp.float32)

        return logits

    def loss(self, mesh: Mesh) -> Callable[[PyTree, jax.Array], jax.Array]:
        """The mean cross-entropy of the next token."""
        network = self.network(mesh)

        def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
            logits = network(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return loss


def num_params(params: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root mean square normalization, in float32."""
    wide = x.astype(jnp.float32)
    length = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)
    return (wide * length).astype(BFLOAT16) * scale


def _attention(x: jax.Array, weights: PyTree) -> jax.Array:
    query, key, value = (
        jnp.einsum("btd,dhk->bthk", x, weights[name]) for name in ("query", "key", "value")
    )
    query, key = _rotated(query), _rotated(key)
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / math.sqrt(query.shape[-1])
    size = x.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    scores = jnp.where(causal, scores.astype(jnp.float32), -1e9)
    attended = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores).astype(BFLOAT16), value)
    return jnp.einsum("bthk,hkd->btd", attended, weights["out"])


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al., 2021)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, jnp.newaxis] * frequencies
    cos, sin = (f(angles)[:, jnp.newaxis].astype(BFLOAT16) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _mlp(x: jax.Array, weights: PyTree) -> jax.Array:
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]
