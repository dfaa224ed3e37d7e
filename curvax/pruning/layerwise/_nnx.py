"""The inputs of the layers of an NNX model, taken where the layers of a clone are called."""

from typing import Any

import jax

from curvax._trees import PyTree, named_leaves
from curvax.pruning.layerwise._calls import kind_of
from curvax.pruning.layerwise._model import Arguments, Model, Recorder, Sums, sums_of


class NNXModel(Model):
    """A model of NNX; it is cloned, and stays as it is."""

    def __init__(self, model: Any, call: Any) -> None:
        super().__init__()
        self._model, self._call = model, call

    def params(self) -> PyTree:
        """The parameters of the model."""
        from flax import nnx

        return nnx.state(self._model, nnx.Param)

    def _others(self) -> PyTree:
        from flax import nnx

        parts: Any = nnx.split(self._model, nnx.Param, ...)
        return parts[2]

    def _recorded(
        self, recorder: Recorder, params: PyTree, others: PyTree, arguments: Arguments
    ) -> dict[str, Sums]:
        """Calls a clone; sums over the inputs of the recorder's layers, by path."""
        from flax import nnx

        parts: Any = nnx.split(self._model, nnx.Param, ...)
        clone = nnx.merge(parts[0], params, others)
        sums = _SumsAtOneTrace(recorder, dict(named_leaves(params)))
        nodes = list(nnx.iter_graph(clone))
        paths = {id(node): "/".join(map(str, path)) for path, node in nodes}
        for _, node in nodes:
            kind, path = _kind(node), paths.get(id(getattr(node, "kernel", None)), "")
            if kind:
                sums.watch(node, kind, path)
        if callable(self._call):
            self._call(clone, *arguments)
        else:
            getattr(clone, self._call or "__call__")(*arguments)
        return sums.by_path


class _SumsAtOneTrace:
    """Sums over the inputs of layers that are called where the model is, in no inner transform.

    Attributes:
      by_path: the sums by the path of the layer's kernel; layers that share one add up.
    """

    def __init__(self, recorder: Recorder, kernels: dict[str, jax.Array]) -> None:
        from flax.core import tracers

        self._current_trace = tracers.current_trace
        self._trace = tracers.current_trace()
        self._recorder, self._kernels = recorder, kernels
        self.by_path: dict[str, Sums] = {}

    def watch(self, layer: Any, kind: str, path: str) -> None:
        """Makes a layer report its inputs, through a subclass."""
        plain = type(layer)

        def call(layer: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._add(layer, kind, path, inputs)
            return plain.__call__(layer, inputs, *args, **kwargs)

        watched = type(plain.__name__, (plain,), {"__call__": call})
        object.__setattr__(layer, "__class__", watched)

    def _add(self, layer: Any, kind: str, path: str, inputs: Any) -> None:
        reader = self._recorder.note(kind, layer, path, inputs)
        # Arrays of an inner transform, such as a scan, must not leave it.
        if self._current_trace() != self._trace:
            self._recorder.lose(path)
        elif reader is not None:
            sums = sums_of(reader, inputs, layer.kernel[...], self._kernels[path])
            self.by_path[path] = self.by_path[path].plus(sums) if path in self.by_path else sums


def _kind(node: Any) -> str | None:
    from flax import nnx

    kinds = {
        nnx.Linear: "dense",
        nnx.LinearGeneral: "general",
        nnx.Conv: "conv",
        nnx.Einsum: "einsum",
    }
    return kind_of(node, kinds, ("__call__",))
