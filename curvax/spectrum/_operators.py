"""Operators of a loss over a data set: Hessian, Gauss-Newton matrix, empirical Fisher matrix."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from curvax._checks import checked_loss, path_name
from curvax.curvature import fisher_vp, ggn_vp, hvp
from curvax.spectrum._operator import Operator, tree_norm

PyTree = Any
Select = Callable[[str, Any], bool]
# (part of the params, all leaves, numbers of the part, tree, vector, arguments) -> product
Product = Callable[..., list[jax.Array]]


def hessian_operator(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The Hessian of a loss over one batch or a whole data set.

    $A = \sum_b w_b \nabla^2 L_b(\theta) / \sum_b w_b$, with $w_b$ the number of examples in batch
    $b$: an uneven last batch counts by its size. The product with one batch is compiled and called
    from the host for each, so that data may be streamed, and the gradients of convolutions
    stay out of loops, where XLA's CPU backend is slow.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch, in evaluation mode.
      params: the parameters.
      batches: an iterable of the further arguments of ``loss_fn``: a tuple of them, or a single one
        that is no tuple. It is gone through at each product; an iterator, which could not be, is
        read into a list.
      select: ``(path, leaf) -> bool``, the leaves that the operator is restricted to; vectors are
        then dictionaries of paths.
      batch_weight: ``batch_weight(*arguments)`` is $w_b$; by default the length of the first axis
        of the first array, one where there is none.
      check_deterministic: whether to compare two products of the same vector and warn if they
        differ, as where dropout was left on.

    Returns:
      The operator.

    Raises:
      ValueError: if there are no batches, the loss is not a real scalar, or ``select`` selects
        nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> def loss_fn(params, inputs, targets):
      ...     return jnp.mean((inputs @ params - targets) ** 2) / 2
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
      >>> batches = [(inputs[:2], jnp.zeros(2)), (inputs[2:], jnp.zeros(1))]  # uneven
      >>> operator = spectrum.hessian_operator(loss_fn, jnp.zeros(2), batches)
      >>> print(3 * operator(jnp.ones(2)))
      [1. 8.]
    """
    return _over_batches(
        _hessian_product(loss_fn), params, batches, select, batch_weight, check_deterministic
    )


def ggn_operator(
    network: Callable[..., jax.Array],
    loss: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The generalized Gauss-Newton matrix $J^T H_\ell J$ over one batch or a whole data set.

    Args:
      network: ``network(params, inputs) -> outputs``, as `curvax.ggn_vp` takes it.
      loss: as `curvax.ggn_vp` takes it, ``"softmax_cross_entropy"`` for example.
      params: the parameters.
      batches: an iterable of tuples ``(inputs, targets)``, as `hessian_operator` takes it.
      select: as `hessian_operator` takes it.
      batch_weight: see there.
      check_deterministic: see there.

    Returns:
      The operator.

    Raises:
      ValueError: as `hessian_operator` and `curvax.ggn_vp` do.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0]])
      >>> operator = spectrum.ggn_operator(
      ...     lambda params, x: x @ params, "squared_error", jnp.zeros((2, 1)), [(inputs, targets)])
      >>> print(operator(jnp.ones((2, 1))).ravel())
      [3. 6.]
    """
    product = _output_product(network, loss, "ggn")
    return _over_batches(product, params, batches, select, batch_weight, check_deterministic)


def empirical_fisher_operator(
    network: Callable[..., jax.Array],
    loss: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None = None,
    batch_weight: Callable[..., float] | None = None,
    check_deterministic: bool = True,
) -> Operator:
    r"""The empirical Fisher matrix $\frac1N \sum_n g_n g_n^T$ of the gradients of all examples.

    Args:
      network: as `ggn_operator` takes it.
      loss: see there.
      params: see there.
      batches: see there.
      select: see there.
      batch_weight: see there.
      check_deterministic: see there.

    Returns:
      The operator.

    Raises:
      ValueError: as `hessian_operator` and `curvax.fisher_vp` do.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> batch = jnp.eye(2), jnp.array([[1.0], [2.0]])
      >>> operator = spectrum.empirical_fisher_operator(
      ...     lambda params, x: x @ params, "squared_error", jnp.zeros((2, 1)), [batch])
      >>> print(operator(jnp.ones((2, 1))).ravel())  # gradients (-1, 0) and (0, -2)
      [0.5 2. ]
    """
    product = _output_product(network, loss, "empirical_fisher")
    return _over_batches(product, params, batches, select, batch_weight, check_deterministic)


# A loss or network is compiled once, however many operators are made of it.


@functools.lru_cache(maxsize=8)
def _hessian_product(loss_fn: Callable[..., Any]) -> Product:
    loss = checked_loss(loss_fn, has_aux=False)

    def product(merge: Any, part: list[Any], vector: list[Any], *arguments: Any) -> list[Any]:
        def of_part(part: list[Any], *arguments: Any) -> jax.Array:
            return loss(merge(part), *arguments)[0]

        return hvp(of_part, part, vector, *arguments)

    return _compiled(product)


@functools.lru_cache(maxsize=8)
def _output_product(network: Callable[..., Any], loss: Any, kind: str) -> Product:
    take = ggn_vp if kind == "ggn" else functools.partial(fisher_vp, empirical=True)

    def product(merge: Any, part: list[Any], vector: list[Any], *arguments: Any) -> list[Any]:
        return take(lambda part, x: network(merge(part), x), loss, part, vector, *arguments)

    return _compiled(product)


def _compiled(product: Callable[..., list[jax.Array]]) -> Product:
    """``total + weight * product``, compiled, for a selection of leaves; of stacked vectors too."""

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def add(
        numbers: tuple[int, ...],
        treedef: Any,
        stacked: bool,
        total: list[jax.Array],
        leaves: list[jax.Array],
        vector: list[jax.Array],
        weight: jax.Array,
        arguments: tuple[Any, ...],
    ) -> list[jax.Array]:
        def merge(part: list[jax.Array]) -> PyTree:
            merged = list(leaves)
            for number, leaf in zip(numbers, part, strict=True):
                merged[number] = leaf
            return jax.tree.unflatten(treedef, merged)

        part = [leaves[number] for number in numbers]

        def of_one(vector: list[jax.Array]) -> list[jax.Array]:
            return product(merge, part, vector, *arguments)

        images = (jax.vmap(of_one) if stacked else of_one)(vector)
        return [t + weight * image.astype(t.dtype) for t, image in zip(total, images, strict=True)]

    return add


def _over_batches(
    add: Product,
    params: PyTree,
    batches: Iterable[Any],
    select: Select | None,
    batch_weight: Callable[..., float] | None,
    check_deterministic: bool,
) -> Operator:
    """The weighted mean over batches of a compiled product."""
    repeatable = list(batches) if isinstance(batches, Iterator) else batches
    leaves, treedef = jax.tree.flatten(params)
    numbers, like = _selection(params, select)
    weight_of = batch_weight or _num_examples

    def mean_product(stacked: bool, vector: PyTree) -> PyTree:
        given = jax.tree.leaves(vector)
        zeros = [jnp.zeros_like(leaf) for leaf in given]
        total, weights = zeros, 0.0
        for batch in repeatable:
            arguments = batch if isinstance(batch, tuple) else (batch,)
            weight = float(weight_of(*arguments))
            total = add(numbers, treedef, stacked, total, leaves, given, weight, arguments)
            weights += weight
        if not weights > 0:
            raise ValueError("batches are empty: an operator needs at least one example.")
        mean = [leaf / weights for leaf in total]
        return jax.tree.unflatten(jax.tree.structure(vector), mean)

    operator = Operator(
        functools.partial(mean_product, False),
        like,
        stacked_product=functools.partial(mean_product, True),
    )
    first = next(iter(repeatable), None)
    if first is None:
        raise ValueError("batches are empty: an operator needs at least one batch.")
    if check_deterministic:
        _check_deterministic(operator)
    return operator


def _selection(params: PyTree, select: Select | None) -> tuple[tuple[int, ...], PyTree]:
    """The numbers of the leaves that take part, in the order of vectors, and what vectors are."""
    entries = jax.tree_util.tree_leaves_with_path(params)
    if select is None:
        return tuple(range(len(entries))), params
    chosen = {
        path_name(path): number
        for number, (path, leaf) in enumerate(entries)
        if select(path_name(path), leaf)
    }
    if not chosen:
        names = ", ".join(path_name(path) for path, _ in entries) or "none"
        raise ValueError(f"select selects no leaf of params; their paths are: {names}.")
    like = {path: jnp.asarray(entries[number][1]) for path, number in chosen.items()}
    return tuple(chosen[path] for path in sorted(chosen)), like


def _num_examples(*arguments: Any) -> float:
    for leaf in jax.tree.leaves(arguments):
        if jnp.ndim(leaf):
            return float(jnp.shape(leaf)[0])
    return 1.0


def _check_deterministic(operator: Operator) -> None:
    vector = operator.random_vector(jax.random.key(0))
    first, second = operator(vector), operator(vector)
    difference = jax.tree.map(jnp.subtract, first, second)
    error, scale = float(tree_norm(difference)), float(tree_norm(first))
    if error > 1e-3 * scale:
        warnings.warn(
            f"two products of the same vector differ by {error / scale:.1e} of their length: is "
            "dropout on, or are the batches in a new order with a loss that depends on it?",
            stacklevel=4,
        )
