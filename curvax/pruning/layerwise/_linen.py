"""The inputs of the layers of a Linen module, taken where the layers are called."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax._trees import PyTree, named_leaves
from curvax.pruning.layerwise._calls import Reader, kind_of
from curvax.pruning.layerwise._model import Arguments, Model, Recorder, Sums, sums_of

_COLLECTION, _NAME = "curvax", "sums"


class LinenModel(Model):
    """A Linen module with its variables."""

    def __init__(self, module: Any, variables: Mapping[str, Any], call: Any) -> None:
        super().__init__()
        self._module, self._variables, self._call = module, dict(variables), call

    def _others(self) -> PyTree:
        return self._variables

    def _recorded(
        self, recorder: Recorder, params: PyTree, others: PyTree, arguments: Arguments
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
                {**others, "params": params},
                *arguments,
                method=self._call,
                mutable=[_COLLECTION],
            )
        return _by_path(state.get(_COLLECTION, {}))


def _kind(module: Any) -> str | None:
    import flax.linen as nn

    kinds = {nn.Dense: "dense", nn.DenseGeneral: "general", nn.Conv: "conv", nn.Einsum: "einsum"}
    return kind_of(module, kinds, ("__call__", "param"))


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
        sums_of(reader, inputs, used, kernel),
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
