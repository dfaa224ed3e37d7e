"""Tracks sharpness during training, as a pass-through Optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from curvax._checks import as_key, check_arrays, check_choice, check_range, check_real, check_size
from curvax._trees import (
    PyTree,
    has_holes,
    is_placeholder,
    tree_dot,
    tree_norm,
    varying_like,
    widen,
)
from curvax.curvature import linearized_hvp, random_probe
from curvax.curvature._modes import Mode
from curvax.fisher import DenseWindow
from curvax.spectrum._basis import orthogonalized


class TrackSharpnessState(NamedTuple):
    r"""State of `track_sharpness`; read its numbers with ``optax.tree.get(state, "sharpness")``.

    Attributes:
      steps_seen: int32 scalar, the number of steps taken.
      sharpness: the largest eigenvalue of the Hessian at the last measurement; NaN before the
        first.
      hessian_trace: the estimate of its trace, averaged over the last measurements; NaN where the
        sharpness comes from outside.
      sharpness_times_lr: the sharpness times the learning rate; gradient descent is unstable above
        2.
      direction: a tree like the params, of length one, close to the top eigenvector; None where the
        sharpness comes from outside.
      probe_key: a PRNG key.
    """

    steps_seen: jax.Array
    sharpness: jax.Array
    hessian_trace: jax.Array
    sharpness_times_lr: jax.Array
    direction: optax.Params | None
    probe_key: jax.Array


def track_sharpness(
    learning_rate: optax.ScalarOrSchedule,
    *,
    update_interval: int = 1,
    num_matvecs: int = 4,
    trace_decay: float = 0.9,
    from_outside: bool = False,
    mode: Mode = "forward_over_reverse",
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures the Hessian's largest eigenvalue during training and passes updates through.

    Every ``update_interval`` steps it computes the largest Ritz value of a few Lanczos steps,
    started from the previous Ritz vector. The top eigenvector turns slowly during training, so the
    value catches up within a few measurements. A measurement costs ``num_matvecs + 1``
    Hessian-vector products, about ``2 num_matvecs + 2`` gradients: with ``update_interval=50`` and
    the other defaults, a fifth of a step. It measures the sharpness of the loss it is given: the
    batch's, if ``obj_fn`` is the loss of a batch.

    With ``update_interval > 1`` the measurement is in a conditional, where XLA's CPU backend
    computes the gradients of convolutions slowly. There, measure outside (`top_eigenpairs` with
    ``start``) and pass in the value: ``tx.update(..., sharpness=value)`` with
    ``from_outside=True``.

    Args:
      learning_rate: the learning rate of the chain, a number or a schedule.
      update_interval: the number of steps between measurements.
      num_matvecs: the number of Lanczos steps per measurement; use more if the top eigenvalues are
        close.
      trace_decay: decay rate of the average of the trace, which has one probe per measurement.
      from_outside: whether the sharpness is passed to ``update``. If so, nothing is measured and no
        direction is kept.
      mode: how to compute products; see `curvax.value_grad_and_hvp`.
      key: a PRNG key or an integer seed; ``jax.random.key(0)`` by default.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes ``obj_fn``
      (``params -> loss``), or ``sharpness`` with ``from_outside``, where None keeps the last value.

    Raises:
      ValueError: if an option is out of range; in ``update``, if ``obj_fn`` or ``params`` is
        missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from curvax import spectrum
      >>> def loss(x):
      ...     return x @ jnp.diag(jnp.array([4.0, 1.0])) @ x / 2
      >>> tx = optax.chain(spectrum.track_sharpness(0.1), optax.sgd(0.1))
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(
      ...     jax.grad(loss)(params), tx.init(params), params, obj_fn=loss
      ... )
      >>> print(
      ...     optax.tree.get(state, "sharpness"),
      ...     optax.tree.get(state, "sharpness_times_lr"),
      ... )
      4.0 0.4

    References:
      Cohen et al., [Gradient descent on neural networks typically occurs at the edge of
      stability](https://arxiv.org/abs/2103.00065), 2021.
    """
    check_size("update_interval", update_interval)
    check_choice("mode", mode, get_args(Mode))
    check_size("num_matvecs", num_matvecs)
    check_range("trace_decay", trace_decay, low=0.0, high=1.0, open_high=True)

    def init(params: optax.Params) -> TrackSharpnessState:
        # A copy: donation of the state must not delete the caller's array.
        own_key = jnp.copy(as_key(key))
        nan = jnp.full((), jnp.nan, jnp.float32)
        direction = None
        if is_placeholder(params):
            direction = None if from_outside else params
        else:
            _check_whole(params)
            check_real("track_sharpness", params)
            if not from_outside:
                wide = jax.tree.map(widen, params)
                unit = _unit(random_probe(own_key, wide, "normal"))
                # Placed as the params are, which random trees are only on explicit meshes.
                direction = jax.tree.map(lambda d, p: jnp.zeros_like(p) + d, unit, wide)
        state = TrackSharpnessState(
            jnp.zeros((), jnp.int32), nan, jnp.copy(nan), jnp.copy(nan), direction, own_key
        )
        return varying_like(state, params)

    def update(
        updates: optax.Updates,
        state: TrackSharpnessState,
        params: optax.Params | None = None,
        *,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        sharpness: Any | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackSharpnessState]:
        del extra_args
        if from_outside:
            given = state.sharpness if sharpness is None else jnp.array(sharpness, jnp.float32)
            measured = state._replace(sharpness=varying_like(given, state.sharpness))
        else:
            measured = _measured(state, params, obj_fn)
        rate = learning_rate(state.steps_seen) if callable(learning_rate) else learning_rate
        return updates, measured._replace(
            steps_seen=optax.safe_increment(state.steps_seen),
            sharpness_times_lr=jnp.float32(rate * measured.sharpness),
        )

    def _measured(
        state: TrackSharpnessState, params: PyTree, obj_fn: Callable[..., Any] | None
    ) -> TrackSharpnessState:
        if obj_fn is None or params is None:
            raise ValueError(
                "track_sharpness needs params and the loss: "
                "tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)); or pass "
                "from_outside=True and sharpness=value."
            )

        def measure(state: TrackSharpnessState) -> TrackSharpnessState:
            product = _wide_product(obj_fn, params, mode)
            value, direction = _ritz(product, state.direction, num_matvecs)
            probe_key = jax.random.fold_in(state.probe_key, state.steps_seen)
            probe = random_probe(probe_key, state.direction)
            sample = tree_dot(probe, product(probe)).astype(jnp.float32)
            average = trace_decay * state.hessian_trace + (1 - trace_decay) * sample
            finite = jnp.isfinite(value) & jnp.isfinite(tree_norm(direction))
            return state._replace(
                sharpness=value.astype(jnp.float32),
                hessian_trace=jnp.where(jnp.isfinite(state.hessian_trace), average, sample),
                direction=jax.tree.map(
                    lambda new, old: jnp.where(finite, new, old).astype(old.dtype),
                    direction,
                    state.direction,
                ),
            )

        if update_interval == 1:
            return measure(state)
        due = state.steps_seen % update_interval == 0
        return jax.lax.cond(due, measure, lambda unchanged: unchanged, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_whole(params: PyTree) -> None:
    if has_holes(params):
        raise ValueError(
            "track_sharpness needs all params, but optax.masked and optax.partition hide some: "
            "put it in a chain outside them."
        )
    check_arrays(params)
    if not any(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("track_sharpness needs params with at least one entry, got none.")


def _unit(vector: PyTree) -> PyTree:
    length = tree_norm(vector)
    return jax.tree.map(lambda leaf: (leaf / length).astype(leaf.dtype), vector)


def _wide_product(
    obj_fn: Callable[[PyTree], jax.Array], params: PyTree, mode: Mode
) -> Callable[[PyTree], PyTree]:
    product = linearized_hvp(obj_fn, params, mode=mode)

    def wide(vector: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), product(vector), vector)

    return wide


def _ritz(
    product: Callable[[PyTree], PyTree], start: PyTree, number: int
) -> tuple[jax.Array, PyTree]:
    """The largest Ritz pair of a Krylov space of dimension ``number``."""
    dtype = jnp.result_type(*jax.tree.leaves(start))
    basis = DenseWindow.empty(start, number, None)
    matrix = jnp.zeros((number, number), dtype)
    vector, length, unit = start, jnp.ones((), dtype), None
    # Unrolled: a loop would slow the gradients of convolutions on a CPU.
    for step in range(number):
        basis = basis.push(vector, jnp.int32(step))
        image = product(vector)
        if unit is None:
            unit = _power_of_two(tree_norm(image))
        column, rest, rest_length = orthogonalized(
            basis, jax.tree.map(lambda leaf, u=unit: leaf / u.astype(leaf.dtype), image)
        )
        matrix = matrix.at[:, step].set(column).at[step, :].set(column)
        # In an exhausted space further vectors are zeros, whose value must not be the largest.
        scale = jnp.abs(matrix).max()
        below = matrix[0, 0] - scale - 1
        matrix = matrix.at[step, step].set(jnp.where(length > 0, matrix[step, step], below))
        length = jnp.where(rest_length > 100 * jnp.finfo(dtype).eps * scale, rest_length, 0)
        vector = jax.tree.map(
            lambda r, b=length: jnp.where(b > 0, r / jnp.where(b > 0, b, 1), 0).astype(r.dtype),
            rest,
        )
    values, vectors = jnp.linalg.eigh(matrix)
    return unit * values[-1], _unit(basis.combine(vectors[:, -1], start))


def _power_of_two(length: jax.Array) -> jax.Array:
    """A power of two close to a length; 1 of zero."""
    limit = jnp.finfo(length.dtype).maxexp - 2
    exponent = jnp.clip(jnp.frexp(length)[1], -limit, limit)
    return jnp.where(length > 0, jnp.ldexp(jnp.ones_like(length), exponent), 1)
