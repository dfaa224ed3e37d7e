"""Signatures show what a private name stands for: `Literal["tree", "leaf"]`, not `BlockScope`."""

from dataclasses import fields
from typing import Any

from griffe import (
    Expr,
    ExprBinOp,
    ExprName,
    ExprSubscript,
    Extension,
    Function,
    GriffeLoader,
)


def _choices(name: ExprName, loader: GriffeLoader) -> Expr | None:
    """What a module of curvax assigns to a name, if that is a union or a `Literal`."""
    path = name.canonical_path
    if not path.startswith("curvax.") or path.startswith(
        "curvax._trees."
    ):  # PyTree, DType
        return None
    try:
        found = loader.modules_collection[path]
    except KeyError:  # a type parameter
        return None
    value = found.value if found.is_attribute else None
    if isinstance(value, ExprBinOp):
        return value
    if (
        isinstance(value, ExprSubscript)
        and value.canonical_path == "typing.Literal"
    ):
        return value
    return None


def _spelled_out(part: Any, loader: GriffeLoader) -> Any:
    if isinstance(part, ExprName):
        choices = _choices(part, loader)
        return part if choices is None else _spelled_out(choices, loader)
    if isinstance(part, list):
        return [_spelled_out(element, loader) for element in part]
    if isinstance(part, Expr):
        for field in fields(part):
            setattr(
                part,
                field.name,
                _spelled_out(getattr(part, field.name), loader),
            )
    return part


class SpelledOutTypes(Extension):
    """The extension, for mkdocstrings."""

    def on_function(
        self, *, func: Function, loader: GriffeLoader, **_: Any
    ) -> None:
        """Changes a function's annotations when all modules are known."""
        for parameter in func.parameters:
            parameter.annotation = _spelled_out(parameter.annotation, loader)
        func.returns = _spelled_out(func.returns, loader)
