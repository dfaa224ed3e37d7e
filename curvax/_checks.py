"""Checks of the user's arguments, made before any work is done."""

import functools
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax._trees import PyTree, dtype_of, path_name, path_names, shape_of


def is_traced(value: Any) -> bool:
    """Whether ``value`` has no concrete content yet, as under ``inject_hyperparams``."""
    return isinstance(value, jax.core.Tracer)


def check_range(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises unless ``value`` lies in the interval; tracers pass."""
    if is_traced(value):
        return
    try:
        number = np.asarray(math.nan if isinstance(value, str) else value, dtype=np.float64)
    except (TypeError, ValueError):
        number = np.asarray(math.nan)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if number.shape != () or not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}.")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raises unless ``value`` is an integer of at least ``least``; tracers pass."""
    _check_integer(name, value, least, "")


def check_index(name: str, value: Any, advice: str) -> None:
    """Raises, with ``advice``, unless ``value`` is an integer of at least zero."""
    _check_integer(name, value, 0, f"; {advice}")


def _check_integer(name: str, value: Any, low: int, advice: str) -> None:
    if is_traced(value):
        return
    number = np.asarray(value)
    if number.shape != () or number.dtype.kind not in "iu" or number < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}{advice}.")


def as_key(key: Any) -> jax.Array:
    """A PRNG key from a key, typed or raw, or from an integer seed; key 0 from None."""
    if key is None:
        return jax.random.key(0)
    if not isinstance(key, jax.Array | np.ndarray | int | np.integer) or isinstance(key, bool):
        raise ValueError(
            f"key must be a PRNG key, such as jax.random.key(0), or an integer seed, got {key!r}."
        )
    if jnp.shape(key) == () and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    return jnp.asarray(key)


def check_size(name: str, value: Any) -> None:
    """Raises unless ``value`` is a Python integer of at least one, which fixes a shape."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} fixes the shape of the state and must be a Python integer, got an array; "
            f"with optax.inject_hyperparams name it in static_args=({name!r}, ...)."
        )
    check_count(name, value)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises unless ``value`` is one of ``allowed``."""
    if not any(value is choice or value == choice for choice in allowed):
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {names}, got {value!r}.")


def check_pattern(owner: str, pattern: Any) -> None:
    """Raises unless ``pattern``, a key of the mapping ``owner``, is one for ``re.search``."""
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        raise ValueError(
            f"{owner} keys must be valid patterns for re.search, got {pattern!r}."
        ) from None


def check_like(name: str, tree: PyTree, params: PyTree, whose: str = "params") -> None:
    """Raises unless ``tree`` has a leaf of the same shape for each leaf of ``params``."""
    ours = jax.tree_util.tree_leaves_with_path(tree)
    theirs = jax.tree_util.tree_leaves_with_path(params)
    for one, other in itertools.zip_longest(ours, theirs):
        found, wanted = _describe(one), _describe(other)
        if found != wanted:
            raise ValueError(
                f"{name} must match {whose} leaf for leaf: at the first difference "
                f"{name} has {found}, {whose} has {wanted}."
            )


def check_arrays(params: PyTree) -> None:
    """Raises if a leaf of ``params`` is no array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype_of(leaf, path_name(path))


def check_real(owner: str, params: PyTree) -> None:
    """Raises if a leaf of ``params`` is complex, which ``owner`` does not handle."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = dtype_of(leaf, path_name(path))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{owner} needs real parameters, got {dtype} at {path_name(path)}; "
                "store real and imaginary parts as two leaves."
            )


def _describe(entry: tuple[tuple[Any, ...], Any] | None) -> str:
    if entry is None:
        return "no more leaves"
    path, leaf = entry
    return f"{path_name(path)} of shape {shape_of(leaf)}"


def check_keywords(owner: str, fun: Callable[..., Any], reserved: tuple[str, ...]) -> None:
    """Raises if ``fun`` has a keyword that ``owner`` uses itself and would not pass on.

    A parameter without a default is accepted: it is passed by position, or Python raises. What
    ``functools.partial`` has bound needs no check.
    """
    bound: set[str] = set()
    inner: Any = fun
    while isinstance(inner, functools.partial):
        bound |= inner.keywords.keys()
        inner = inner.func
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):  # builtins may have no signature
        return
    for name in reserved:
        found = parameters.get(name)
        if found is None or name in bound:
            continue
        if found.kind is found.KEYWORD_ONLY or found.default is not found.empty:
            raise ValueError(
                f"{owner} uses the keyword {name} itself and does not pass it to the loss or "
                f"network: bind it with functools.partial(fun, {name}=...), or rename it."
            )


def warn_of_batch_stats(params: PyTree) -> None:
    """Warns where running statistics are among the parameters, as in Linen's variables."""
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if "batch_stats" in path_names(path):
            warnings.warn(
                f"params contains running statistics at {path_name(path)}, which would be treated "
                'as parameters: pass only variables["params"], and pass batch_stats to the loss '
                "through a closure or as part of the batches.",
                stacklevel=3,
            )
            return


def scalar_loss(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """``fun`` as ``(loss, aux)``, refusing an output that is not a real scalar."""

    def loss_and_aux(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        output = fun(*args, **kwargs)
        value, aux = _split_aux(output) if has_aux else (output, None)
        if isinstance(value, tuple | list | dict):
            raise ValueError(
                f"the loss must return a scalar, got a {type(value).__name__}; if it "
                "returns (loss, aux), pass has_aux=True (an obj_fn must drop the aux: "
                "lambda params: loss_fn(params, batch)[0])."
            )
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "the loss must return a real floating-point scalar, got shape "
                f"{shape} and dtype {dtype}; reduce it, for example with jnp.mean."
            )
        return value, aux

    return loss_and_aux


def _split_aux(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise ValueError(
            "with has_aux=True the loss must return a pair (loss, aux), got a "
            f"{type(output).__name__}."
        )
    return output
