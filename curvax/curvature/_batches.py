"""Batches: the loss arguments they hold, their number of examples, and splitting them."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from curvax._trees import named_leaves

Result = TypeVar("Result")

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """The further arguments of a loss: the items of a tuple or list, anything else by itself."""
    arguments = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    for name, leaf in named_leaves(arguments):
        if not isinstance(leaf, _ARRAYS) and not hasattr(leaf, "__jax_array__"):
            kind = type(leaf)
            raise ValueError(
                f"a batch holds a {kind.__module__}.{kind.__qualname__} at {name}, but JAX needs "
                "arrays: convert it (jax.tree.map(np.asarray, batch) for tensors on the CPU) or "
                "remove it from the batch."
            )
    return arguments


def num_examples(arguments: Any, advice: str) -> int | None:
    """The length of the first axis, on which all arrays must agree; None where there is none.

    Scalars, such as a typed PRNG key, belong to all examples.
    """
    sizes = {name: jnp.shape(leaf)[0] for name, leaf in named_leaves(arguments) if jnp.ndim(leaf)}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} at {name}" for name, size in sizes.items())
        raise ValueError(
            f"all arrays of a batch must have the same number of examples along their first axis, "
            f"got {found}: {advice}."
        )
    return next(iter(sizes.values()), None)


def parts(arguments: Any, size: int) -> Iterator[tuple[Any, int]]:
    """Parts of a batch, of ``size`` examples or, the last one, fewer, and their sizes."""
    number = num_examples(
        arguments, "close over arrays without an axis of examples, or split the batches yourself"
    )
    if number is None:
        raise ValueError("a batch can be split only if it holds an array with an axis of examples.")
    for start in range(0, number, size):
        stop = min(start + size, number)
        yield (
            jax.tree.map(lambda x, a=start, b=stop: x[a:b] if jnp.ndim(x) else x, arguments),
            (stop - start),
        )


def over_examples(fun: Callable[[Any], Result], arguments: Any) -> Result:
    """``fun`` on each example, a batch of one, vectorized; scalars belong to all examples."""
    flat, treedef = jax.tree.flatten(arguments)
    axes = [0 if jnp.ndim(leaf) else None for leaf in flat]

    def of_one(leaves: list[jax.Array]) -> Result:
        pairs = zip(leaves, axes, strict=True)
        single = [leaf if axis is None else leaf[jnp.newaxis] for leaf, axis in pairs]
        return fun(jax.tree.unflatten(treedef, single))

    result: Result = jax.vmap(of_one, in_axes=(axes,))(flat)
    return result
