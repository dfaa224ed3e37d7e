"""A product with one batch as an operator over a data set: the weighted mean over batches."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, path_name, tree_norm, widen
from curvax.spectrum._operator import Operator

Select = Callable[[str, Any], bool]


class CompiledProduct:
    """A product with one batch, for a selection of leaves, compiled once for a loss.

    Attributes:
      add: the weighted product added to a total.
      linearized: the product as a function of the vector alone, which `_add_linear` adds: what it
        needs from the network, computed once.
    """

    def __init__(self, product: Callable[..., list[jax.Array]]) -> None:
        """Takes ``product(merge, part, vector, *arguments)``.

        ``merge`` puts the part of the leaves that is selected back into the whole tree.
        """

        def of_batch(
            numbers: tuple[int, ...],
            treedef: Any,
            leaves: list[jax.Array],
            arguments: tuple[Any, ...],
            vector: list[jax.Array],
        ) -> list[jax.Array]:
            def merge(part: list[jax.Array]) -> PyTree:
                merged = list(leaves)
                for number, leaf in zip(numbers, part, strict=True):
                    merged[number] = leaf
                return jax.tree.unflatten(treedef, merged)

            part = [leaves[number] for number in numbers]
            return product(merge, part, vector, *arguments)

        @functools.partial(jax.jit, static_argnums=(0, 1, 2))
        def add(
            stacked: bool,
            numbers: tuple[int, ...],
            treedef: Any,
            leaves: list[jax.Array],
            arguments: tuple[Any, ...],
            total: list[jax.Array],
            weight: jax.Array,
            vector: list[jax.Array],
        ) -> list[jax.Array]:
            of_vector = functools.partial(of_batch, numbers, treedef, leaves, arguments)
            return _added(stacked, of_vector, total, weight, vector)

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def linearized(
            numbers: tuple[int, ...],
            treedef: Any,
            leaves: list[jax.Array],
            arguments: tuple[Any, ...],
            vector: list[jax.Array],
        ) -> Any:
            of_vector = functools.partial(of_batch, numbers, treedef, leaves, arguments)
            return jax.linearize(of_vector, vector)[1]

        self.add = add
        self.linearized = linearized


def _added(
    stacked: bool, of_vector: Any, total: list[jax.Array], weight: Any, vector: list[jax.Array]
) -> list[jax.Array]:
    """``total + weight * product``, of one vector or of several stacked ones."""
    images = (jax.vmap(of_vector) if stacked else of_vector)(vector)
    return [t + weight * image.astype(t.dtype) for t, image in zip(total, images, strict=True)]


_add_linear = jax.jit(_added, static_argnums=0)


def over_batches(
    compiled: CompiledProduct,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None,
    batch_weight: Callable[..., float] | None,
    linearize: bool | None,
    check_deterministic: bool,
) -> Operator:
    """The weighted mean over batches of a compiled product."""
    repeatable = list(batches) if isinstance(batches, Iterator) else batches
    params = jax.tree.map(widen, params)
    leaves, treedef = jax.tree.flatten(params)
    numbers, like = _selection(params, select)
    weight_of = batch_weight or _num_examples
    single = isinstance(repeatable, list | tuple) and len(repeatable) == 1
    keep = single if linearize is None else linearize

    def weighted() -> Iterator[tuple[float, tuple[Any, ...]]]:
        for batch in repeatable:
            arguments = batch if isinstance(batch, tuple) else (batch,)
            yield float(weight_of(*arguments)), arguments

    @functools.cache
    def linear_parts() -> list[tuple[float, Any]]:
        anywhere = jax.tree.leaves(operator.like)  # a linear function has one slope
        return [
            (weight, compiled.linearized(numbers, treedef, leaves, arguments, anywhere))
            for weight, arguments in weighted()
        ]

    def mean_product(vector: PyTree, stacked: bool = False) -> PyTree:
        given = jax.tree.leaves(vector)
        add: Callable[..., list[jax.Array]]
        parts: Iterable[tuple[float, Any]]
        total, weights = [jnp.zeros_like(leaf) for leaf in given], 0.0
        # In a caller's graph even zeros are traced; what is kept would be traced, or baked in.
        if keep and not any(isinstance(leaf, jax.core.Tracer) for leaf in [*given, *total]):
            add, parts = functools.partial(_add_linear, stacked), linear_parts()
        else:
            add = functools.partial(compiled.add, stacked, numbers, treedef, leaves)
            parts = weighted()
        for weight, part in parts:
            total = add(part, total, weight, given)
            weights += weight
        if not weights > 0:
            raise ValueError("batches are empty: an operator needs at least one example.")
        mean = [leaf / weights for leaf in total]
        return jax.tree.unflatten(jax.tree.structure(vector), mean)

    def mean_products(vectors: Sequence[PyTree]) -> list[PyTree]:
        images = mean_product(_stacked(*vectors), stacked=True)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], images) for i in range(len(vectors))]

    operator = Operator(mean_product, like, products=mean_products)
    if next(iter(repeatable), None) is None:
        raise ValueError("batches are empty: an operator needs at least one batch.")
    if check_deterministic:
        _check_deterministic(operator)
    return operator


@jax.jit
def _stacked(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _selection(params: PyTree, select: Select | None) -> tuple[tuple[int, ...], PyTree]:
    """The numbers of the leaves that take part, in the order of vectors, and what vectors are."""
    entries = jax.tree_util.tree_leaves_with_path(params)
    if select is None:
        return tuple(range(len(entries))), params
    selected = [(path_name(path), leaf) for path, leaf in entries]
    numbers = [number for number, entry in enumerate(selected) if select(*entry)]
    chosen = {selected[number][0]: number for number in numbers}
    if len(chosen) < len(numbers):
        raise ValueError(
            "select needs leaves of different paths, got some of the same: "
            f"{', '.join(selected[number][0] for number in numbers)}."
        )
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
    error = float(tree_norm(difference))
    scale = max(float(tree_norm(first)), float(tree_norm(second)))
    if error > 1e-3 * scale:
        warnings.warn(
            f"two products of the same vector differ by {error / scale:.1e} of their length: are "
            "the batches others at each pass, by augmentation or by dropout from a new key?",
            stacklevel=4,
        )
