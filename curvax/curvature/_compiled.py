"""A cache of compiled functions, keyed by a function's identity, that does not keep it alive.

A loss is compiled once, however often its curvature is computed. The cache must never return the
entry of another function, nor keep a function alive: entries are found by ``id``, hold functions by
weak references and are dropped with them. A function that may compute something else at the next
call, such as a method of an object whose attributes can change, is compiled each time.
"""

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

T = TypeVar("T")


class _Entry(NamedTuple):
    references: tuple[Callable[[], Any], ...]
    compiled: Any


_entries: dict[Hashable, _Entry] = {}


def compiled_once(build: Callable[..., T], *functions: Any, **options: Hashable) -> T:
    """``build(*functions, **options)``, made once for these functions.

    ``build`` must use the functions only through its arguments, which are stand-ins with weak
    references: the caller must keep the functions alive while it uses the result. Strings and None
    are passed unchanged, and tuples item by item.
    """
    names = [_identity(function) for function in functions]
    if None in names:
        return build(*functions, **options)
    key = (build, *names, *sorted(options.items()))
    if key not in _entries:
        references: list[Any] = []
        stand_ins = [
            _weakly(one, references, lambda _: _entries.pop(key, None)) for one in functions
        ]
        _entries[key] = _Entry(tuple(references), build(*stand_ins, **options))
    return _entries[key].compiled


def _identity(function: Any) -> Hashable | None:
    """A key that is unique while the function is alive; None where its calls may change."""
    if function is None or isinstance(function, str):
        return (function,)
    if isinstance(function, tuple):
        names = [_identity(item) for item in function]
        return None if None in names else (type(function), *names)
    owner = function.__self__ if isinstance(function, types.MethodType) else function
    called = getattr(function, "__func__", None)
    if isinstance(owner, functools.partial) and _identity(owner.func) is None:
        return None
    if isinstance(owner, types.FunctionType | functools.partial) or hasattr(owner, "__wrapped__"):
        return id(owner), id(called)
    if isinstance(owner, bool | int | float):
        return type(owner), owner
    if type(owner).__hash__ in (None, object.__hash__):
        return None
    try:  # objects that compare by value, such as Linen's modules, show a change in their hash
        return id(owner), id(called), hash(owner)
    except TypeError:
        return None


def _weakly(function: Any, references: list[Any], drop: Callable[[Any], Any]) -> Any:
    if function is None or isinstance(function, str | bool | int | float):
        return function
    if isinstance(function, tuple):
        items = [_weakly(item, references, drop) for item in function]
        return type(function)(*items) if hasattr(function, "_fields") else tuple(items)
    method = isinstance(function, types.MethodType)
    reference: Any = weakref.WeakMethod(function, drop) if method else weakref.ref(function, drop)
    references.append(reference)
    return lambda *args, **kwargs: reference()(*args, **kwargs)


class Static:
    """The rest of a tree without its arrays, as a static argument of a jitted function."""

    def __init__(self, treedef: Any, others: tuple[Any, ...]) -> None:
        """Takes the structure, and the leaves that are not arrays; None stands for an array."""
        self._treedef, self._others = treedef, others

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Any], "Static"]:
        """The arrays of a tree, and the rest."""
        leaves, treedef = jax.tree.flatten(tree)
        is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
        pairs = list(zip(leaves, is_array, strict=True))
        others = tuple(None if array else (leaf,) for leaf, array in pairs)
        return [leaf for leaf, array in pairs if array], cls(treedef, others)

    def merge(self, arrays: list[Any]) -> Any:
        """The tree again."""
        rest = iter(arrays)
        return self._treedef.unflatten(next(rest) if o is None else o[0] for o in self._others)

    def _key(self) -> Hashable:
        # Unhashable values are compared by identity; 1, 1.0 and True differ.
        return self._treedef, tuple(o and (type(o[0]), _hashable(o[0])) for o in self._others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
