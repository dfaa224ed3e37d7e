"""The weighted mean over batches of a product that is compiled once and called from the host."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._checks import is_traced, warn_of_batch_stats
from curvax._settled import settled
from curvax._trees import Differentiable, Leaves, PyTree, Select, path_name, tree_norm, widen
from curvax.curvature._batch_loss import WeightedTargets
from curvax.curvature._batches import as_arguments, num_examples
from curvax.curvature._operator import ById, Operator

BatchWeight = Callable[..., float]
# (params with the part that is differentiated, vector, *a batch's arguments) -> product
BatchProduct = Callable[..., Leaves]


class CompiledProduct(NamedTuple):
    """A product with one batch, compiled.

    Attributes:
      add: the weighted product added to a total.
      linearized: the product as a function of the vector alone, for `add_linear`; what it needs
        from the network is computed once.
    """

    add: Callable[..., Leaves]
    linearized: Callable[..., Any]

    @classmethod
    def of(cls, product: BatchProduct) -> "CompiledProduct":
        @functools.partial(jax.jit, static_argnums=0)
        def add(
            stacked: bool,
            part: Differentiable,
            arguments: tuple[Any, ...],
            total: Leaves,
            weight: jax.Array,
            vector: Leaves,
        ) -> Leaves:
            return _added(stacked, lambda v: product(part, v, *arguments), total, weight, vector)

        @jax.jit
        def linearized(part: Differentiable, arguments: tuple[Any, ...], vector: Leaves) -> Any:
            return jax.linearize(lambda v: product(part, v, *arguments), vector)[1]

        return cls(add, linearized)


def _added(
    stacked: bool, of_vector: Any, total: Leaves, weight: jax.Array, vector: Leaves
) -> Leaves:
    """``total + weight * product``, of one vector or of several stacked ones."""
    images = (jax.vmap(of_vector) if stacked else of_vector)(vector)
    return [t + weight * image.astype(t.dtype) for t, image in zip(total, images, strict=True)]


add_linear = jax.jit(_added, static_argnums=0)


@jax.tree_util.register_pytree_node_class
class BatchMean:
    """``vector -> sum of w_b A_b vector / sum of w_b``; a tree of the arrays that it needs.

    Attributes:
      compiled: the product with one batch.
      functions: what it was compiled for, kept alive as long as this is.
      part: the parameters, and which of their leaves vectors match.
      weighted: a list of weights and batches, or a function that starts a pass over them.
      keep: whether to compute the linearization of the network once and keep it.
    """

    def __init__(
        self, compiled: CompiledProduct, functions: Any, part: Any, weighted: Any, keep: bool
    ) -> None:
        """Takes the attributes."""
        self.compiled, self.functions = compiled, functions
        self.part, self.weighted, self.keep = part, weighted, keep
        self._linear: list[tuple[float, Any]] | None = None

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Parameters and listed batches are arrays; a stream is a constant."""
        functions = ById(self.compiled), _Ignored(self.functions), self.keep
        if callable(self.weighted):
            return (self.part, None), (*functions, ById(self.weighted))
        return (self.part, self.weighted), (*functions, None)

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any, ...]) -> "BatchMean":
        """The mean again."""
        compiled, functions, keep, stream = static
        part, weighted = children
        weighted = weighted if stream is None else stream.value
        return cls(compiled.value, functions.value, part, weighted, keep)

    def __call__(self, vector: PyTree) -> PyTree:
        """The mean of the products with one vector."""
        return self._mean(vector, stacked=False)

    def products(self, vectors: Sequence[PyTree]) -> list[PyTree]:
        """The means of the products with several vectors, in one pass over the batches."""
        images = self._mean(_stacked(*vectors), stacked=True)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], images) for i in range(len(vectors))]

    def _mean(self, vector: PyTree, *, stacked: bool) -> PyTree:
        given = jax.tree.leaves(vector)
        total: Leaves = [jnp.zeros_like(leaf) for leaf in given]
        weights: Any = 0.0
        for weight, add in self._terms(traced=any(map(is_traced, [*given, *total]))):
            total = settled(add(stacked, total, weight, given))
            weights += weight
        if not is_traced(weights) and not weights > 0:
            raise ValueError("batches are empty: an operator needs at least one example.")
        mean = [leaf / weights for leaf in total]
        return jax.tree.unflatten(jax.tree.structure(vector), mean)

    def _terms(self, *, traced: bool) -> Iterator[tuple[Any, Callable[..., Leaves]]]:
        """For each batch its weight, and a function that adds its weighted product to a total."""
        # Under a caller's jit even zeros are traced: what is kept would be too, or become a
        # constant.
        if self.keep and not traced:
            for weight, linear in self._linear_parts():
                yield weight, lambda stacked, *rest, f=linear: add_linear(stacked, f, *rest)
            return
        for weight, arguments in self._pass():
            yield (
                weight,
                lambda stacked, *rest, a=arguments: self.compiled.add(stacked, self.part, a, *rest),
            )

    def _linear_parts(self) -> list[tuple[float, Any]]:
        if self._linear is None:
            zeros = [jnp.zeros_like(leaf) for leaf in self.part.select(self.part.leaves)]
            self._linear = []
            for weight, arguments in self._pass():
                linear = self.compiled.linearized(self.part, arguments, zeros)
                self._linear.append((weight, settled(linear)))
        return self._linear

    def _pass(self) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        return self.weighted() if callable(self.weighted) else self.weighted


class _Ignored(ById):
    """A part of a tree's structure that is equal to any other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ignored)

    def __hash__(self) -> int:
        return 0


def over_batches(
    compiled: CompiledProduct,
    functions: Any,
    params: PyTree,
    batches: Iterable[Any],
    *,
    select: Select | None,
    batch_weight: BatchWeight | None,
    linearize: bool | None,
    check_deterministic: bool,
) -> Operator:
    """The weighted mean over batches of a compiled product, as an operator."""
    part, like = _part(jax.tree.map(widen, params), select)
    if isinstance(batches, list | tuple | Iterator):
        weighted: Any = list(weighted_batches(batches, batch_weight))
    else:
        weighted = functools.partial(weighted_batches, batches, batch_weight)
    if next(iter(weighted() if callable(weighted) else weighted), None) is None:
        raise ValueError("batches are empty: an operator needs at least one batch.")
    single = isinstance(weighted, list) and len(weighted) == 1
    keep = single if linearize is None else linearize
    operator = Operator(BatchMean(compiled, functions, part, weighted, keep), like)
    if check_deterministic and not any(map(is_traced, jax.tree.leaves(operator))):
        _check_deterministic(operator)
    return operator


def weighted_batches(
    batches: Iterable[Any], batch_weight: BatchWeight | None
) -> Iterator[tuple[float, tuple[Any, ...]]]:
    """The weight and the arguments of each batch."""
    for batch in batches:
        arguments = as_arguments(batch)
        if batch_weight is not None:
            yield float(batch_weight(*arguments)), arguments
            continue
        yield _weight(arguments), arguments


def _weight(arguments: tuple[Any, ...]) -> float:
    """A batch's default weight: the sum of its weights, or the number of its examples."""
    for argument in arguments:
        if isinstance(argument, WeightedTargets):
            return float(jnp.sum(argument.weights))
    number = num_examples(arguments, "pass batch_weight=, a function of the batch's arguments")
    return 1.0 if number is None else float(number)


def _part(params: PyTree, select: Select | None) -> tuple[Differentiable, PyTree]:
    """The leaves that take part, in the order of vectors, and a tree like the vectors."""
    part = Differentiable.of(params, select)
    leaves = part.select(part.leaves)
    if select is None:
        warn_of_batch_stats(params)
        return part, part.part(leaves) if len(leaves) < len(part.leaves) else params
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = sorted((paths[position], position) for position in part.chosen)
    like = {path: part.leaves[position] for path, position in chosen}
    if len(like) < len(chosen):
        raise ValueError(
            "select needs leaves with distinct paths, got duplicates: "
            f"{', '.join(path for path, _ in chosen)}."
        )
    if not chosen:
        raise ValueError(
            f"select chooses no leaf of params; the paths are: {', '.join(paths) or 'none'}."
        )
    positions = tuple(position for _, position in chosen)
    part = Differentiable(part.treedef, part.leaves, positions)
    warn_of_batch_stats(part.part(part.select(part.leaves)))
    return part, like


@jax.jit
def _stacked(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _check_deterministic(operator: Operator) -> None:
    vector = operator.random_vector(jax.random.key(0))
    first, second = operator(vector), operator(vector)
    difference = jax.tree.map(jnp.subtract, first, second)
    error = float(tree_norm(difference))
    scale = max(float(tree_norm(first)), float(tree_norm(second)))
    if error > 1e-3 * scale:
        warnings.warn(
            f"two products with the same vector differ by {error / scale:.1e} of their length: do "
            "the batches change between passes, through augmentation or a new dropout key?",
            stacklevel=4,
        )
