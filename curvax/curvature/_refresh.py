"""When curvature is refreshed: the rule, and what an optimizer's state says about its next step."""

from typing import Any, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from curvax._checks import check_choice, check_count, check_index, is_traced
from curvax._find import find_node


@runtime_checkable
class RefreshState(Protocol):
    """What an optimizer's state must hold: whether curvature is due, and the key."""

    @property
    def count(self) -> jax.Array:
        """The steps taken, an int32 scalar."""

    @property
    def due(self) -> jax.Array | None:
        """Whether the next step refreshes the curvature, a bool scalar; None if every step does.

        None is part of the state's structure, so nothing is left to decide in a compiled step.
        """

    @property
    def key(self) -> jax.Array:
        """PRNG key; step ``t`` draws its probes from ``fold_in(key, t)``."""


@overload
def refresh_due(  # type: ignore[overload-overlap]  # integers are ArrayLike, too
    step: int | np.integer, update_interval: int | np.integer, refresh_warmup: int | np.integer = 0
) -> bool: ...


@overload
def refresh_due(
    step: ArrayLike, update_interval: ArrayLike, refresh_warmup: ArrayLike = 0
) -> jax.Array: ...


def refresh_due(step: Any, update_interval: Any, refresh_warmup: Any = 0) -> bool | jax.Array:
    r"""Returns whether a step refreshes the curvature.

    The first ``refresh_warmup`` steps do, then every ``update_interval``-th. With warm-up $w$ and
    interval $n$, step $t$ does if

    $$
    t < w \quad \text{or} \quad (t - w) \bmod n = 0
    $$

    `curvax.adahessian` uses the same rule. A loop that decides on the host calls this function with
    the optimizer's interval and warm-up, so that both refresh at the same steps.

    Args:
      step: the number of steps taken before this one, an integer or an int array.
      update_interval: the number of steps between refreshes. An array below 1 counts as 1, so that
        a schedule may fall below it.
      refresh_warmup: the number of initial steps that all refresh.

    Returns:
      A Python bool if all arguments are Python or NumPy integers, else a bool array.

    Raises:
      ValueError: if ``update_interval`` is not an integer of at least 1 or ``refresh_warmup`` not
        an integer of at least 0; arrays are not checked.

    Example:
      >>> import curvax
      >>> [
      ...     step
      ...     for step in range(12)
      ...     if curvax.refresh_due(step, 4, refresh_warmup=3)
      ... ]
      [0, 1, 2, 3, 7, 11]
    """
    check_refresh_rule(update_interval, refresh_warmup)
    if all(isinstance(n, int | np.integer) for n in (step, update_interval, refresh_warmup)):
        return bool(step < refresh_warmup or (step - refresh_warmup) % update_interval == 0)
    since = jnp.asarray(step) - refresh_warmup
    return (since < 0) | (since % clamped_interval(update_interval) == 0)


def check_refresh_rule(update_interval: Any, refresh_warmup: Any) -> None:
    """Raises unless both are integers in range; arrays, as from schedules, are let through."""
    if not isinstance(update_interval, jax.Array):
        check_count("update_interval", update_interval)
    if not isinstance(refresh_warmup, jax.Array):
        check_index("refresh_warmup", refresh_warmup, "pass the number of initial steps or 0")


def clamped_interval(update_interval: Any) -> jax.Array:
    """An interval that may be a schedule's value, as an int32 of at least 1."""
    return jnp.maximum(jnp.asarray(update_interval).astype(jnp.int32), 1)


def every_step(update_interval: Any) -> bool:
    """Whether each step refreshes, known before anything is traced."""
    return isinstance(update_interval, int | np.integer) and update_interval == 1


def decide(refresh: Any, state: RefreshState) -> bool | jax.Array:
    """Whether the next step refreshes: a bool where that is known, else a traced bool scalar.

    Args:
      refresh: the user's static argument: True, False, or None to follow the state.
      state: the optimizer's own state.
    """
    if isinstance(refresh, jax.Array):
        raise ValueError(
            "refresh must be static (None, True or False), got an array; list it in the "
            "static_argnames of the jitted step, or pass None to follow the state."
        )
    check_choice("refresh", refresh, (None, True, False))
    if refresh is not None:
        return bool(refresh)
    if state.due is None:
        return True
    # Outside jit the value is known, and a conditional would be compiled at each call.
    return state.due if is_traced(state.due) else bool(state.due)


def step_key(state: RefreshState) -> jax.Array:
    """The key of the next step."""
    return jax.random.fold_in(state.key, state.count)


def find_refresh_state(state: Any) -> RefreshState:
    """The one node of ``state`` that keeps curvature, with plain arrays in it."""
    fields = ("count", "due", "key")
    node = find_node(
        state,
        fields,
        one="optimizer that keeps curvature",
        several="optimizers that keep curvature",
        example="curvax.adahessian",
    )

    def plain(field: Any) -> Any:
        # nnx.Optimizer wraps arrays in variables.
        return next(iter(jax.tree.leaves(field)), None)

    return node._replace(**{name: plain(getattr(node, name)) for name in fields})
