"""What a walk over the layers of a model needs to know about it."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, named_leaves
from curvax.curvature._compiled import Static
from curvax.pruning.layerwise._calls import Reader, reader_of
from curvax.pruning.layerwise._gram import gram_of, on_automatic_axes

Arguments = tuple[Any, ...]
Shapes = dict[str, tuple[int, ...]]  # of the kernels to prune, by their paths


class Sums(NamedTuple):
    """Sums over the rows of inputs of a layer.

    Attributes:
      gram: $X^T X$.
      num_rows: the number of rows.
      mismatch: how far the kernel in use is from the parameter, as a share of its largest entry.
    """

    gram: jax.Array
    num_rows: jax.Array
    mismatch: jax.Array

    def plus(self, other: "Sums") -> "Sums":
        """The sums over both, and the larger mismatch."""
        return Sums(
            self.gram + other.gram,
            self.num_rows + other.num_rows,
            jnp.maximum(self.mismatch, other.mismatch),
        )


class Call(NamedTuple):
    """A call of a layer while the model is traced.

    Attributes:
      path: the path of its kernel.
      reader: how it reads its inputs.
      inputs: its inputs, by whose identity layers with the same inputs are found.
    """

    path: str
    reader: Reader
    inputs: Any


class Calls(NamedTuple):
    """The calls of the layers that are seen, in order, and why others are not, by path."""

    seen: list[Call]
    reasons: dict[str, str]


class Recorder:
    """Notes the calls of layers while a model is traced.

    Attributes:
      calls: the calls of the layers whose way of reading is known.
      reasons: why that of others is not.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self.calls: list[Call] = []
        self.reasons: dict[str, str] = {}

    def note(self, kind: str, layer: Any, path: str, inputs: Any) -> Reader | None:
        """Notes a call; the layer's reader, if it is known."""
        if path not in self._shapes:
            return None
        reader = reader_of(kind, layer, self._shapes[path], jnp.ndim(inputs))
        if isinstance(reader, str):
            self.reasons[path] = reader
            return None
        self.calls.append(Call(path, reader, inputs))
        return reader

    def lose(self, path: str) -> None:
        """Notes that some inputs of a layer could not be captured."""
        self.reasons[path] = "its inputs are inside a transform, for example nn.scan"

    def summary(self, recorded: dict[str, Sums]) -> Calls:
        """The calls whose sums have come out of the traced model."""
        for path in {call.path for call in self.calls} - self.reasons.keys():
            if path not in recorded or recorded[path].gram.ndim != 2:
                self.lose(path)
        return Calls([call for call in self.calls if call.path not in self.reasons], self.reasons)


class Model(abc.ABC):
    """A Linen or NNX model, compiled for the layers whose sums are requested."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, ...], Any] = {}

    def calls(self, params: PyTree, arguments: Arguments, shapes: Shapes) -> Calls:
        """Traces the model once."""
        recorder = Recorder(shapes)
        arrays, rest = Static.split(arguments)

        def run(params: PyTree, others: PyTree, arrays: list[Any]) -> dict[str, Sums]:
            return self._recorded(recorder, params, others, rest.merge(arrays))

        return recorder.summary(jax.eval_shape(run, params, self._others(), arrays))

    def sums(self, params: PyTree, arguments: Arguments, paths: tuple[str, ...]) -> dict[str, Sums]:
        """The sums over the inputs of some layers in one batch."""
        if paths not in self._compiled:
            leaves = dict(named_leaves(params))
            shapes = {path: leaves[path].shape for path in paths}

            def run(
                params: PyTree, others: PyTree, arrays: list[Any], rest: Static
            ) -> dict[str, Sums]:
                return self._recorded(Recorder(shapes), params, others, rest.merge(arrays))

            # Those before are not needed again.
            self._compiled = {paths: jax.jit(run, static_argnums=3)}
        return self._compiled[paths](params, self._others(), *Static.split(arguments))

    @abc.abstractmethod
    def _others(self) -> PyTree:
        """The variables that are not parameters: batch statistics, random streams."""

    @abc.abstractmethod
    def _recorded(
        self, recorder: Recorder, params: PyTree, others: PyTree, arguments: Arguments
    ) -> dict[str, Sums]:
        """Runs the model; sums over the inputs of the recorder's layers, by path."""


def sums_of(reader: Reader, inputs: jax.Array, used: jax.Array, kernel: jax.Array) -> Sums:
    """The sums over the inputs of a layer that computes with the kernel ``used``."""

    def sums(inputs: jax.Array, used: jax.Array, kernel: jax.Array) -> Sums:
        rows = reader.rows(inputs)
        mismatch = jnp.max(jnp.abs(used - kernel)) / jnp.max(jnp.abs(kernel))
        return Sums(gram_of(rows), jnp.asarray(len(rows)), mismatch.astype(jnp.float32))

    return on_automatic_axes(sums, inputs, used, kernel)
