"""Examples in batches that are read several times, a few at a time."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from curvax.curvature._batches import as_arguments, num_examples, parts

_Array = jax.Array | np.ndarray


class Part(NamedTuple):
    """Some examples of one batch.

    Attributes:
      arguments: the arguments of a loss for them.
      start: the number of the first one among all examples.
      size: how many they are.
    """

    arguments: tuple[Any, ...]
    start: int
    size: int


class Examples(NamedTuple):
    """Training or test examples.

    Attributes:
      batches: an iterable of batches.
      number: of examples in all of them.
      kind: what errors call them, such as "training".
    """

    batches: Iterable[Any]
    number: int
    kind: str

    @classmethod
    def of(cls, batches: Any, kind: str) -> "Examples":
        """Counts the examples, and keeps the batches of an iterator."""
        several = _several(batches, kind)
        number = sum(_size(as_arguments(batch), kind) for batch in several)
        if not number:
            raise ValueError(
                f"the {kind} batches are empty: pass at least one batch, such as "
                "[(inputs, targets)]; an iterator that was used before has no more of them."
            )
        return cls(several, number, kind)

    def parts(self, size: int) -> Iterator[Part]:
        """The examples of each batch, at most ``size`` together."""
        start = 0
        for batch in self.batches:
            for arguments, count in parts(as_arguments(batch), size):
                yield Part(arguments, start, count)
                start += count
        if start != self.number:
            raise ValueError(
                f"the {self.kind} batches gave {start} examples in one pass and {self.number} in "
                "another: they must hold the same examples in the same order each time."
            )

    def num_parts(self, size: int) -> int:
        """About how many parts there are, for a progress bar."""
        return -(-self.number // size)


def _several(batches: Any, kind: str) -> Iterable[Any]:
    """Batches that can be read again; an array, a mapping or a tuple of arrays is one batch."""
    one = isinstance(batches, _Array | Mapping)
    if one or (isinstance(batches, tuple) and any(isinstance(x, _Array) for x in batches)):
        return [batches]
    if isinstance(batches, Iterator):
        return list(batches)
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"the {kind} batches must be one batch, such as (inputs, targets), or an iterable of "
            f"batches, got a {type(batches).__name__}."
        )
    return batches


def _size(arguments: tuple[Any, ...], kind: str) -> int:
    number = num_examples(arguments, "pass what has no axis of examples through a closure")
    if number is None:
        raise ValueError(
            f"a {kind} batch must hold an array with an axis of examples, got only scalars: add "
            "the axis, or pass a list of batches."
        )
    return number
