"""One pass with the key and the refresh interval read from an optimizer's own state."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from curvax._checks import check_choice
from curvax._find import find_node
from curvax._trees import Differentiable, PyTree
from curvax.curvature._diagonal import value_grad_and_hessian_diag
from curvax.curvature._probes import Distribution
from curvax.curvature._products import Mode, loss_of_leaves


@runtime_checkable
class RefreshState(Protocol):
    """What an optimizer's state must hold to say when curvature is due, and its key."""

    @property
    def count(self) -> jax.Array:
        """The steps taken, an int32 scalar."""

    @property
    def interval(self) -> jax.Array:
        """The steps from one refresh to the next, an int32 scalar."""

    @property
    def key(self) -> jax.Array:
        """PRNG key; step ``t`` draws its probes from ``fold_in(key, t)``."""


def is_due(state: RefreshState) -> jax.Array:
    """Whether the step that ``state`` is about to take refreshes the curvature."""
    return state.count % state.interval == 0


def step_key(state: RefreshState) -> jax.Array:
    """The key of the step that ``state`` is about to take."""
    return jax.random.fold_in(state.key, state.count)


def value_grad_and_hessian_diag_from_state(
    fun: Callable[..., Any],
    *,
    has_aux: bool = False,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
) -> Callable[..., tuple[Any, PyTree, PyTree | None]]:
    r"""Like `curvax.value_grad_and_hessian_diag`, with key and interval from the state.

    The optimizer's state says at which step it is, how often it wants curvature and which
    key that step draws from, so a training loop carries no key of its own and a checkpoint
    of state and params resumes a run bit for bit.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      has_aux: whether ``fun`` returns auxiliary data (new batch statistics, metrics).
      num_probes: the number of probes; the same as the optimizer's, which uses its own only
        when it is fed ``obj_fn``.
      distribution: ``"rademacher"`` or ``"normal"``.
      mode: how the product is taken, see `curvax.value_grad_and_hvp`.

    Returns:
      A function ``(params, *args, state, refresh=None, **kwargs) -> (value, grads, diag)``.

      ``state`` is the optimizer's state, found inside ``optax.chain``, ``masked``,
      ``partition``, ``MultiSteps``, ``inject_hyperparams``, ``apply_if_finite`` and the
      ``opt_state`` of ``nnx.Optimizer``; where several optimizers keep curvature, hand over
      the part of the state that is meant.

      ``refresh`` is static. ``None`` decides inside, from the state's count, with
      ``lax.cond``: off the refresh steps only the gradient is computed and ``diag`` is
      zeros, which the optimizer's own count makes it ignore. ``True`` computes, ``False``
      skips the product and returns ``None`` for ``diag``: compile one step for each and
      choose on the host. On CPU do that for convolutional networks, since XLA runs the
      gradients of a convolution 5 to 25 times slower inside a conditional.

    Raises:
      ValueError: where the state holds no such optimizer or several of them, whose paths
        are then named; on an option out of range; on a loss that is not a real scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params) ** 4)
      >>> tx = optax.chain(optax.clip(1.0), curvax.adahessian(0.1, update_interval=5))
      >>> params, batch = jnp.ones(2), jnp.eye(2)
      >>> state = tx.init(params)
      >>> one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
      >>> value, grads, diag = one_pass(params, batch, state=state)
      >>> updates, state = tx.update(grads, state, params, hessian_diag=diag)
      >>> print(updates.round(3))
      [-0.017 -0.017]
    """
    one_pass = value_grad_and_hessian_diag(
        fun, has_aux=has_aux, num_probes=num_probes, distribution=distribution, mode=mode
    )

    def value_grad_and_diag(
        params: PyTree,
        *args: Any,
        state: Any,
        refresh: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PyTree, PyTree | None]:
        check_refresh(refresh)
        found = find_refresh_state(state)

        def with_diag() -> tuple[Any, PyTree, PyTree]:
            return one_pass(params, *args, key=step_key(found), **kwargs)

        def without_diag() -> tuple[Any, PyTree]:
            return _value_and_grad(fun, has_aux, params, args, kwargs)

        if refresh is None:
            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.cond(is_due(found), with_diag, lambda: (*without_diag(), zeros))
        return with_diag() if refresh else (*without_diag(), None)

    return value_grad_and_diag


def check_refresh(refresh: Any) -> None:
    """Raises unless ``refresh`` is one of its three static values."""
    if isinstance(refresh, jax.Array):
        raise ValueError(
            "refresh must be static (None, True or False), got an array; pass it to the "
            "jitted step with static_argnames, or pass None to decide by the state's count."
        )
    check_choice("refresh", refresh, (None, True, False))


def _value_and_grad(
    fun: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, PyTree]:
    tree = Differentiable.of(params)
    loss = loss_of_leaves(fun, tree, args, kwargs, has_aux=has_aux)
    leaves = tree.select(tree.leaves)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(leaves)
    return ((value, aux) if has_aux else value), tree.tangent(grads)


def find_refresh_state(state: Any) -> RefreshState:
    """The one node of ``state`` that keeps curvature, with plain arrays in it."""
    fields = ("count", "interval", "key")
    node = find_node(
        state,
        fields,
        one="optimizer that keeps curvature",
        several="optimizers that keep curvature",
        example="curvax.adahessian",
    )
    # nnx.Optimizer wraps arrays in variables.
    return node._replace(**{name: jax.tree.leaves(getattr(node, name))[0] for name in fields})
