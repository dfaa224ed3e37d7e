r"""The empirical neural tangent kernel and its relation to the Gauss-Newton matrix.

With $J$ the Jacobian of all outputs of all examples in the parameters, the kernel's Gram matrix is
$J J^T$ and the Gauss-Newton matrix of half the mean squared error is $J^T J / N$: their non-zero
eigenvalues agree up to the factor $N$, and an eigenvector $u$ of the first gives $J^T u / \lVert
J^T u \rVert$ of the second.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_arrays, check_choice, check_count, warn_of_batch_stats
from curvax._settled import settled
from curvax._trees import Differentiable, PyTree, Tree, tree_norm, widen
from curvax.curvature._batches import num_examples, parts
from curvax.curvature._compiled import compiled_once
from curvax.curvature._jacobian import linearized
from curvax.curvature._modes import JacobianMode


class KernelEigenpairs(NamedTuple, Generic[Tree]):
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
    parameter_vectors: Tree


def ntk_gram(
    network: Callable[[Tree, Any], jax.Array],
    params: Tree,
    inputs: Any,
    *,
    micro_batch_size: int = 16,
    mode: JacobianMode = "forward_over_reverse",
) -> jax.Array:
    r"""The Gram matrix $J J^T$ of the empirical neural tangent kernel.

    Vector-Jacobian products give the rows of $J$ of a micro-batch; Jacobian-vector products of
    these rows with each micro-batch give their columns of the Gram matrix. So at most
    ``micro_batch_size * C`` gradients are in memory.

    Args:
      network: ``network(params, inputs) -> outputs`` of shape (N, C), in evaluation mode.
      params: a tree of real arrays; integer and bool leaves are held constant.
      inputs: an array, or a tree of them, with N examples along the first axis.
      micro_batch_size: the number of examples whose rows are in memory together.
      mode: how to compute Jacobian-vector products, as in `curvax.ggn_vp`.

    Returns:
      The matrix of shape (N C, N C), rows ordered by example, then output.

    Raises:
      ValueError: if outputs are not of shape (N, C), or the first axes of inputs disagree.

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
    check_choice("mode", mode, get_args(JacobianMode))
    warn_of_batch_stats(params)
    _output_shape(network, params, inputs)
    params = jax.tree.map(widen, params)
    pieces = [part for part, _ in parts(inputs, micro_batch_size)]
    jacobian = compiled_once(_Jacobian.of, network, mode=mode)
    blocks = []
    for piece in pieces:
        rows = jacobian.rows(params, piece)
        columns = [settled(jacobian.images(params, other, rows)) for other in pieces]
        blocks.append(jnp.concatenate(columns, axis=1))
    gram = jnp.concatenate(blocks, axis=0)
    return (gram + gram.T) / 2


def ntk_eigenpairs(
    network: Callable[[Tree, Any], jax.Array],
    params: Tree,
    inputs: Any,
    k: int,
    *,
    micro_batch_size: int = 16,
    mode: JacobianMode = "forward_over_reverse",
) -> KernelEigenpairs[Tree]:
    r"""The top eigenpairs of the neural tangent kernel, in outputs and in parameters.

    Args:
      network: as in `ntk_gram`.
      params: as in `ntk_gram`.
      inputs: as in `ntk_gram`.
      k: the number of pairs, at most N C.
      micro_batch_size: as in `ntk_gram`.
      mode: as in `ntk_gram`.

    Returns:
      The pairs.

    Raises:
      ValueError: as in `ntk_gram`, or if ``k`` is too large.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs = jnp.array([[3.0, 0.0], [0.0, 2.0]])
      >>> pairs = spectrum.ntk_eigenpairs(
      ...     lambda w, x: x @ w, jnp.zeros((2, 1)), inputs, 1
      ... )
      >>> print(pairs.values, abs(pairs.parameter_vectors.ravel()))
      [9.] [1. 0.]
    """
    check_count("k", k)
    gram = np.asarray(
        ntk_gram(network, params, inputs, micro_batch_size=micro_batch_size, mode=mode)
    )
    if k > len(gram):
        raise ValueError(f"k must be at most the {len(gram)} outputs of all examples, got {k}.")
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    order = np.argsort(-values)[:k]
    shape = _output_shape(network, params, inputs)
    params = jax.tree.map(widen, params)
    chosen = vectors.T[order].reshape(k, *shape)
    transposed = compiled_once(_Jacobian.of, network, mode=mode).transposed
    trees = [transposed(params, inputs, jnp.asarray(one, gram.dtype)) for one in chosen]
    return KernelEigenpairs(
        values[order], chosen, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    )


class _Jacobian(NamedTuple):
    """Compiled products with the Jacobian of a network.

    Attributes:
      rows: the rows of $J$ for all outputs of a micro-batch.
      images: $J t$ for a micro-batch and such rows $t$.
      transposed: $J^T u$, divided by its length.
    """

    rows: Callable[..., Any]
    images: Callable[..., jax.Array]
    transposed: Callable[..., PyTree]

    @classmethod
    def of(cls, network: Callable[[PyTree, Any], jax.Array], *, mode: JacobianMode) -> "_Jacobian":
        def at_point(params: PyTree, inputs: Any, mode: JacobianMode) -> tuple[Any, ...]:
            tree = Differentiable.of(params)
            leaves = tree.select(tree.leaves)
            return tree, *linearized(
                lambda p: (network(tree.params(p), inputs), None), leaves, mode
            )

        @jax.jit
        def rows(params: PyTree, part: Any) -> Any:
            _, outputs, _, _, pull = at_point(params, part, "reverse_over_reverse")
            basis = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
            return jax.vmap(pull)(basis)

        @jax.jit
        def images(params: PyTree, part: Any, tangents: Any) -> jax.Array:
            push = at_point(params, part, mode)[3]
            columns = jax.vmap(push)(tangents)
            return columns.reshape(len(columns), -1)

        @jax.jit
        def transposed(params: PyTree, inputs: Any, cotangent: jax.Array) -> PyTree:
            tree, outputs, _, _, pull = at_point(params, inputs, "reverse_over_reverse")
            pulled = pull(cotangent.astype(outputs.dtype))
            length = jnp.maximum(tree_norm(pulled), 1e-30)
            return tree.tangent([leaf / length for leaf in pulled])

        return cls(rows, images, transposed)


def _output_shape(network: Any, params: PyTree, inputs: Any) -> tuple[int, int]:
    number = num_examples(inputs, "close over what has no examples")
    if not number:
        raise ValueError("inputs are empty: the kernel needs at least one example.")
    check_arrays(params)
    outputs = jax.eval_shape(network, params, inputs)
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != number:
        raise ValueError(
            f"the network must return outputs of shape (N, C) with N={number} examples, got "
            f"{shape if shape is not None else type(outputs).__name__}."
        )
    return shape
