"""The inputs of the layers of a Linen module, taken where the layers are called."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, named_leaves
from curvax.pruning.layerwise._calls import Reader
from curvax.pruning.layerwise._model import Arguments, Calls, Recorder, Shapes, Sums, sums_of

_COLLECTION, _NAME = "curvax", "sums"


class LinenModel:
    """A Linen module with its variables."""

    def __init__(self, module: Any, variables: Mapping[str, Any], call: Any) -> None:
        self._module, self._variables, self._call = module, dict(variables), call
        self._compiled: dict[tuple[str, ...], Any] = {}

    def calls(self, params: PyTree, arguments: Arguments, shapes: Shapes) -> Calls:
        """Traces the module once."""
        recorder = Recorder(shapes)
        run = functools.partial(self._recorded, recorder)
        return recorder.summary(jax.eval_shape(run, params, self._variables, arguments))

    def sums(self, params: PyTree, arguments: Arguments, paths: tuple[str, ...]) -> dict[str, Sums]:
        """The sums over the inputs of some layers in one batch."""
        if paths not in self._compiled:
            leaves = dict(named_leaves(params))
            shapes = {path: leaves[path].shape for path in paths}

            def run(params: PyTree, variables: PyTree, arguments: Arguments) -> dict[str, Sums]:
                return self._recorded(Recorder(shapes), params, variables, arguments)

            self._compiled = {paths: jax.jit(run)}  # those before are not needed again
        return self._compiled[paths](params, self._variables, arguments)

    def _recorded(
        self, recorder: Recorder, params: PyTree, variables: PyTree, arguments: Arguments
    ) -> dict[str, Sums]:
        """Applies the module; sums over the inputs of the recorder's layers, by path."""
        import flax.linen as nn

        kernels = dict(named_leaves(params))

        def intercept(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
            kind = _kind(context.module)
            if kind and context.method_name == "__call__":
                path = "/".join((*context.module.scope.path, "kernel"))
                inputs = args[0] if args else kwargs["inputs"]
                reader = recorder.note(kind, context.module, path, inputs)
                if reader is not None and not _sow(context.module, reader, inputs, kernels[path]):
                    recorder.lose(path)
            return call_next(*args, **kwargs)

        with nn.intercept_methods(intercept):
            _, state = self._module.apply(
                {**variables, "params": params},
                *arguments,
                method=self._call,
                mutable=[_COLLECTION],
            )
        return _by_path(state.get(_COLLECTION, {}))


def _kind(module: Any) -> str | None:
    import flax.linen as nn

    kinds = {nn.Dense: "dense", nn.DenseGeneral: "general", nn.Conv: "conv", nn.Einsum: "einsum"}
    return next((kind for layer, kind in kinds.items() if isinstance(module, layer)), None)


def _sow(module: Any, reader: Reader, inputs: jax.Array, kernel: jax.Array) -> bool:
    """Adds to the sums in the module's own scope, which transforms of Linen return; if they do."""
    import flax.linen as nn
    from flax.core import tracers

    used = nn.meta.unbox(module.get_variable("params", "kernel"))
    if used is None or used.shape != kernel.shape:
        return False
    # Inside a transform of JAX, rather than of Linen, a scope must not be changed.
    if tracers.current_trace() != module.scope.trace_level:
        return False
    zero = Sums(*(jnp.zeros(()),) * 3)
    return module.sow(
        _COLLECTION,
        _NAME,
        sums_of(reader.rows(inputs), used, kernel),
        reduce_fn=Sums.plus,
        init_fn=lambda: zero,
    )


def _by_path(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Sums]:
    if isinstance(tree, Sums):
        return {"/".join((*path[:-1], "kernel")): tree}
    found: dict[str, Sums] = {}
    for name, child in tree.items():
        found |= _by_path(child, (*path, name))
    return found
