r"""The empirical neural tangent kernel and its relation to the Gauss-Newton matrix.

With $J$ the Jacobian of all outputs of all examples in the parameters, the kernel's Gram matrix is
$J J^T$ and the Gauss-Newton matrix of half the mean squared error is $J^T J / N$: their non-zero
eigenvalues agree up to the factor $N$, and an eigenvector $u$ of the first gives $J^T u / \lVert
J^T u \rVert$ of the second.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_count
from curvax._trees import PyTree, widen


class KernelEigenpairs(NamedTuple):
    r"""The top of a neural tangent kernel.

    Attributes:
      values: eigenvalues of $J J^T$ in descending order, of shape (k,).
      vectors: eigenvectors over outputs, of shape (k, N, C).
      parameter_vectors: $J^T u / \lVert J^T u \rVert$, a tree with leaves ``(k, *leaf.shape)``:
        those of the Gauss-Newton matrix of half the mean squared error, whose eigenvalues are
        ``values / N``.
    """

    values: np.ndarray
    vectors: np.ndarray
    parameter_vectors: PyTree


def ntk_gram(
    network: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    *,
    micro_batch_size: int = 16,
) -> jax.Array:
    r"""The Gram matrix $J J^T$ of the empirical neural tangent kernel.

    A micro-batch's rows of $J$ are taken by as many vector-Jacobian products, and their columns of
    the Gram matrix by Jacobian-vector products with each micro-batch, so that never more than
    ``micro_batch_size * C`` gradients are in memory.

    Args:
      network: ``network(params, inputs) -> outputs`` of shape (N, C), in evaluation mode.
      params: a tree of real arrays.
      inputs: an array, or a tree of them, with N examples along the first axis.
      micro_batch_size: the examples whose rows are in memory together.

    Returns:
      The matrix of shape (N C, N C), rows ordered by example, then output.

    Raises:
      ValueError: if outputs are not of shape (N, C).

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> spectrum.ntk_gram(lambda w, x: x @ w, jnp.zeros((2, 1)), inputs)
      Array([[1., 1.],
             [1., 5.]], dtype=float32)

    References:
      Jacot, Gabriel and Hongler, [Neural tangent kernel](https://arxiv.org/abs/1806.07572), 2018.
    """
    check_count("micro_batch_size", micro_batch_size)
    outputs = jax.eval_shape(network, params, inputs)
    number = _checked_examples(outputs, inputs)
    if not number:
        raise ValueError("inputs are empty: the kernel needs at least one example.")
    parts = [
        jax.tree.map(lambda x, a=start: x[a : a + micro_batch_size], inputs)
        for start in range(0, number, micro_batch_size)
    ]
    params = jax.tree.map(widen, params)
    rows, pushed = _compiled(network)
    blocks = []
    for part in parts:
        tangents = rows(params, part)
        blocks.append(jnp.concatenate([pushed(params, other, tangents) for other in parts], axis=1))
    gram = jnp.concatenate(blocks, axis=0)
    return (gram + gram.T) / 2


def ntk_eigenpairs(
    network: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    k: int,
    *,
    micro_batch_size: int = 16,
) -> KernelEigenpairs:
    r"""The top eigenpairs of the neural tangent kernel, in outputs and in parameters.

    Args:
      network: as `ntk_gram` takes it.
      params: see there.
      inputs: see there.
      k: the number of pairs, at most N C.
      micro_batch_size: see there.

    Returns:
      The pairs.

    Raises:
      ValueError: as `ntk_gram` does; if ``k`` is too large.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs = jnp.array([[3.0, 0.0], [0.0, 2.0]])
      >>> pairs = spectrum.ntk_eigenpairs(lambda w, x: x @ w, jnp.zeros((2, 1)), inputs, 1)
      >>> print(pairs.values, abs(pairs.parameter_vectors.ravel()))
      [9.] [1. 0.]
    """
    check_count("k", k)
    gram = np.asarray(ntk_gram(network, params, inputs, micro_batch_size=micro_batch_size))
    if k > len(gram):
        raise ValueError(f"k={k} pairs are more than the {len(gram)} outputs of all examples.")
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    order = np.argsort(-values)[:k]
    params = jax.tree.map(widen, params)
    outputs = jax.eval_shape(network, params, inputs)
    chosen = vectors.T[order].reshape(k, *outputs.shape)

    def transposed(cotangent: jax.Array) -> PyTree:
        (tree,) = jax.vjp(lambda p: network(p, inputs), params)[1](cotangent)
        length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(length, 1e-30), tree)

    compiled = jax.jit(transposed)
    trees = [compiled(jnp.asarray(one, outputs.dtype)) for one in chosen]
    return KernelEigenpairs(
        values[order], chosen, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    )


@functools.lru_cache(maxsize=8)
def _compiled(network: Callable[[PyTree, Any], jax.Array]) -> tuple[Any, Any]:
    """Rows of the Jacobian of a micro-batch, and products of it with rows."""

    def rows(params: PyTree, part: Any) -> PyTree:
        outputs, pull = jax.vjp(lambda p: network(p, part), params)
        basis = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
        return jax.vmap(lambda cotangent: pull(cotangent)[0])(basis)

    def pushed(params: PyTree, part: Any, tangents: PyTree) -> jax.Array:
        _, push = jax.linearize(lambda p: network(p, part), params)
        images = jax.vmap(push)(tangents)
        return images.reshape(len(images), -1)

    return jax.jit(rows), jax.jit(pushed)


def _checked_examples(outputs: Any, inputs: Any) -> int:
    number = jnp.shape(jax.tree.leaves(inputs)[0])[0]
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != number:
        raise ValueError(
            f"the network must return outputs of shape (N, C) with N={number} examples, got "
            f"{shape if shape is not None else type(outputs).__name__}."
        )
    return number
