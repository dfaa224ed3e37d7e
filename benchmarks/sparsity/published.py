"""M-FAC's static algorithm and its pruner, written plainly after the paper and the published code.

    cd benchmarks; python -m sparsity.agreement --data-dir DIR  # curvax on the same gradients

What `curvax` does with matrix products and a factorization is done here one gradient at a time, in
NumPy: the inverse Fisher matrix of each block by rank-one recurrences, one score for all weights,
and the sum of the updates that would be right for each pruned weight by itself (Frantar et al.,
[M-FAC](https://arxiv.org/abs/2107.03356), 2021, Section 3).

    v_i = g_i / damping - sum over k < i of (v_k . g_i / delta_k) v_k,    delta_i = m + g_i . v_i
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from curvax import pruning

PyTree = Any


class Inverse(NamedTuple):
    """The inverse of ``damping I + G^T G / m``, of each block of consecutive weights.

    Attributes:
      vectors: (m, blocks, size), in the place of the gradients.
      deltas: (m, blocks).
      damping: the damping.
    """

    vectors: np.ndarray
    deltas: np.ndarray
    damping: float

    @classmethod
    def of(cls, grads: np.ndarray, damping: float, block_size: int) -> "Inverse":
        """From m gradients (m, d); a last block that is not full is filled with zeros."""
        vectors = in_blocks(grads, block_size).astype(grads.dtype)
        deltas = np.empty(vectors.shape[:2], grads.dtype)
        for i in range(len(vectors)):
            gradient = vectors[i].copy()
            along = np.einsum("kbs,bs->kb", vectors[:i], gradient) / deltas[:i]
            vectors[i] = gradient / damping - np.einsum("kb,kbs->bs", along, vectors[:i])
            deltas[i] = len(vectors) + np.einsum("bs,bs->b", gradient, vectors[i])
        return cls(vectors, deltas, damping)

    def diagonal(self, number: int) -> np.ndarray:
        """The first ``number`` entries of the diagonal."""
        terms = np.einsum("kbs,kb->bs", self.vectors**2, 1 / self.deltas)
        return (1 / self.damping - terms).ravel()[:number]

    def solve(self, vector: np.ndarray) -> np.ndarray:
        """The product with a vector (d,)."""
        blocks = in_blocks(vector, self.vectors.shape[2])
        along = np.einsum("kbs,bs->kb", self.vectors, blocks) / self.deltas
        product = blocks / self.damping - np.einsum("kb,kbs->bs", along, self.vectors)
        return product.ravel()[: len(vector)]


def in_blocks(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Rows (..., d) as blocks (..., ceil(d / size), size), with zeros at the end."""
    missing = -rows.shape[-1] % block_size
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
    return padded.reshape(*rows.shape[:-1], -1, block_size)


def without_the_lowest(
    weights: np.ndarray, grads: np.ndarray, number: int, damping: float, block_size: int
) -> np.ndarray:
    """The weights after ``number`` of them are pruned at once, zeros in their places."""
    inverse = Inverse.of(grads, damping, block_size)
    diagonal = inverse.diagonal(len(weights))
    lowest = np.argsort(weights**2 / (2 * diagonal), kind="stable")[:number]
    targets = np.zeros_like(weights)
    targets[lowest] = weights[lowest] / diagonal[lowest]
    changed = weights - inverse.solve(targets)
    changed[lowest] = 0
    return changed


def prune(
    gradients_at: Callable[[PyTree], list[PyTree]],
    params: PyTree,
    sparsity: float,
    *,
    num_steps: int,
    damping: float = 1e-5,
    block_size: int = 128,
) -> PyTree:
    """The published order of work: gradients at the weights of now, of those that are left only.

    Args:
      gradients_at: from params to gradients, trees like the params.
      params: the parameters; kernels are pruned.
      sparsity: the share of pruned weights in the end.
      num_steps: the number of recomputations, between which the density falls by a constant factor.
      damping: the damping.
      block_size: the size of the blocks.

    Returns:
      The pruned parameters.
    """
    weights = flat(params)
    alive = np.ones(len(weights), bool)
    for reached in pruning.geometric_sparsities(0.0, sparsity, num_steps):
        number = math.floor(reached * len(weights)) - int(np.count_nonzero(~alive))
        grads = np.stack([flat(grads)[alive] for grads in gradients_at(with_flat(params, weights))])
        weights[alive] = without_the_lowest(weights[alive], grads, number, damping, block_size)
        alive = weights != 0
    return with_flat(params, weights)


def flat(tree: PyTree) -> np.ndarray:
    """The kernels as one vector, each in the order of PyTorch: outputs, inputs, spatial axes."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_pruned(path, leaf):
            parts.append(np.asarray(leaf).transpose(_order(leaf.ndim)).ravel())
    return np.concatenate(parts)


def with_flat(params: PyTree, vector: np.ndarray) -> PyTree:
    """The params with kernels from a vector, of `flat`'s order."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    new, start = [], 0
    for path, leaf in leaves:
        if _is_pruned(path, leaf):
            order = _order(leaf.ndim)
            shape = [leaf.shape[axis] for axis in order]
            part = vector[start : start + leaf.size].reshape(shape)
            leaf, start = jax.numpy.asarray(part.transpose(np.argsort(order))), start + leaf.size
        new.append(leaf)
    return jax.tree.unflatten(treedef, new)


def _is_pruned(path: Any, leaf: Any) -> bool:
    return pruning.is_kernel(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)


def _order(rank: int) -> tuple[int, ...]:
    return (rank - 1, rank - 2, *range(rank - 2))
