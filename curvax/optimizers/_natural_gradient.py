r"""The gradient of a batch, preconditioned by the Fisher or Gauss-Newton matrix of that very batch.

With the gradients of n examples as rows of $G$, or of their outputs, and the gradient of the mean
$G^T s / n$, the direction

$$
d = F^{-1} \frac1n G^T s = G^T K^{-1} s, \qquad F = \lambda I + \frac1n G^T G, \quad
K = n \lambda I + G G^T
$$

is exact at the cost of a matrix of the size of the batch (the push-through identity). With a
direction $d'$ carried from the last step, $d = \mu d' + G^T K^{-1} (s - \mu G d')$ is the nearest
to $\mu d'$ of the damped solutions of $G d = s$, and $G d = s - n \lambda K^{-1} (s - \mu G d')$
in any case.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from curvax._checks import check_arrays, check_choice, check_range, check_size
from curvax._trees import Leaves, PyTree, is_inexact, varying_like, wide_dtype
from curvax.curvature._losses import Loss, output_loss
from curvax.curvature._output_rows import Matrix
from curvax.fisher._cholesky import diagonal
from curvax.fisher._damped_gram import solve_damped_gram
from curvax.fisher.samples import Coordinates, on_every_device
from curvax.optimizers._batch_rows import BatchRows, OutputOptions, of_gradients, of_outputs

Scalar = jax.typing.ArrayLike


class ScaleByNaturalGradientState(NamedTuple):
    r"""State of `curvax.scale_by_natural_gradient`.

    Attributes:
      count: int32 scalar, the number of steps.
      damping: scalar, the damping in $F$ at the last step.
      fisher_norm: scalar, the length $\sqrt{d^T F d}$ of the last direction, before its bound.
      failures: int32 scalar, the number of steps whose factorization failed and was repeated with a
        larger damping.
      carried: a tree like ``params``, the last direction; None without momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax
    damping: jax.Array
    fisher_norm: jax.Array
    failures: jax.Array
    carried: optax.Updates | None


class _Direction(NamedTuple):
    """A direction, and what the state says about it."""

    parts: Leaves
    damping: jax.Array
    fisher_norm: jax.Array
    failed: jax.Array
    finite: jax.Array


def scale_by_natural_gradient(
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    loss: Loss = "squared_error",
    matrix: Matrix = "gauss_newton",
    momentum: Scalar = 0.0,
    centered: bool = False,
    relative_damping: bool = False,
    max_fisher_norm: Scalar | None = None,
    micro_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the gradient of a batch by the Fisher or Gauss-Newton matrix of that batch.

    See `curvax.natural_gradient` for the rule, the arguments and what ``update`` takes. Chain it
    with ``optax.scale_by_learning_rate``, which applies the sign and the learning rate, or, after
    ``optax.scale(-1.0)``, with ``optax.scale_by_backtracking_linesearch``. Updates support
    forward-mode differentiation only, as those of `curvax.scale_by_mfac`.

    Args:
      damping: the damping $\lambda$, a positive number or a schedule of the number of steps.
      loss: the loss of an example's outputs.
      matrix: ``"gauss_newton"``, ``"empirical_fisher"`` or ``"improved_empirical_fisher"``.
      momentum: the share $\mu$ of the last direction that is carried over, in [0, 1).
      centered: whether the mean is subtracted from the rows of $G$.
      relative_damping: whether the damping is in units of the rows' mean squared length.
      max_fisher_norm: bound on $\sqrt{d^T F d}$.
      micro_batch_size: the number of examples whose rows are in memory together; None for all.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a
      `curvax.ScaleByNaturalGradientState`.

    Raises:
      ValueError: as for `curvax.natural_gradient`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def residual(params, x, y):
      ...     return x @ params - y
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> tx = optax.chain(
      ...     curvax.scale_by_natural_gradient(damping=1e-6),
      ...     optax.scale_by_learning_rate(1.0),
      ... )
      >>> params = jnp.zeros(2)
      >>> rows = jax.vmap(jax.grad(residual), in_axes=(None, 0, 0))(params, x, y)
      >>> # The gradients of each example, and their coefficients in that of the loss.
      >>> updates, state = tx.update(
      ...     rows, tx.init(params), params, cotangents=residual(params, x, y)
      ... )
      >>> print(updates.round(3))  # the solution of least squares
      [1. 1.]

    References:
      As for `curvax.natural_gradient`.
    """
    _check_damping(damping)
    output_loss(loss)
    check_choice("matrix", matrix, get_args(Matrix))
    check_range("momentum", momentum, low=0, high=1, open_high=True)
    if max_fisher_norm is not None:
        check_range("max_fisher_norm", max_fisher_norm, low=0, open_low=True)
    if micro_batch_size is not None:
        check_size("micro_batch_size", micro_batch_size)
    options = OutputOptions(loss, matrix, centered, micro_batch_size)
    carries = not (isinstance(momentum, int | float) and momentum == 0)

    def init(params: optax.Params) -> ScaleByNaturalGradientState:
        check_arrays(params)
        dtype = Coordinates.of(params).dtype
        state = ScaleByNaturalGradientState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.zeros((), dtype),
            fisher_norm=jnp.zeros((), dtype),
            failures=jnp.zeros((), jnp.int32),
            carried=jax.tree.map(_wide_zeros, params) if carries else None,
        )
        return varying_like(state, params)

    def update(
        updates: optax.Updates | None,
        state: ScaleByNaturalGradientState,
        params: optax.Params | None = None,
        *,
        outputs_fn: Callable[..., jax.Array] | None = None,
        batch: Any = None,
        targets: Any = None,
        cotangents: Any = None,
        weights: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByNaturalGradientState]:
        del extra_args
        if outputs_fn is None:
            rows = of_gradients(updates, params, cotangents, weights, centered=centered)
        else:
            rows = of_outputs(outputs_fn, params, batch, targets, cotangents, weights, options)
        coordinates = rows.coordinates
        now = damping(state.count) if callable(damping) else damping
        now = jnp.asarray(now, coordinates.dtype)
        carried = None
        if state.carried is not None:
            decay = jnp.asarray(momentum, coordinates.dtype)
            carried = [decay * part for part in coordinates.split(state.carried)]
        direction = _direction(rows, now, carried, relative=relative_damping)
        tree = coordinates.tangent(direction.parts)
        new_state = ScaleByNaturalGradientState(
            count=optax.safe_increment(state.count),
            damping=direction.damping,
            fisher_norm=direction.fisher_norm,
            failures=state.failures + direction.failed,
            carried=None if state.carried is None else tree,
        )
        new_state = jax.tree.map(
            lambda new, old: jnp.where(direction.finite, new.astype(old.dtype), old),
            new_state,
            state,
        )
        factor = jnp.where(direction.finite, 1, jnp.nan).astype(coordinates.dtype)
        if max_fisher_norm is not None:
            factor *= jnp.minimum(1, max_fisher_norm / direction.fisher_norm)
        return _as_updates(tree, factor, coordinates.leaves), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    loss: Loss = "squared_error",
    matrix: Matrix = "gauss_newton",
    momentum: Scalar = 0.0,
    centered: bool = False,
    relative_damping: bool = False,
    max_fisher_norm: Scalar | None = None,
    micro_batch_size: int | None = None,
    weight_decay: Scalar = 0.0,
    mask: PyTree | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The natural gradient of a batch: Gauss-Newton, minSR and SPRING steps in sample space.

    With the rows $G$ of a batch of n examples, and the gradient $G^T s / n$ of the mean of their
    losses,

    $$
    \begin{aligned}
    F_t &= \lambda I + \frac1n G^T G \\
    d_t &= \mu d_{t-1} + F_t^{-1} \frac1n G^T (s - \mu G d_{t-1})
        = \mu d_{t-1} + G^T (n \lambda I + G G^T)^{-1} (s - \mu G d_{t-1}) \\
    \theta_t &= \theta_{t-1} - \alpha_t (d_t + \nu\, \theta_{t-1})
    \end{aligned}
    $$

    so the matrix that is factored is of the size of the batch, and nothing cancels however small
    the damping. ``update`` takes the batch in one of two forms.

    * **Outputs**: ``outputs_fn(params, *batch)`` returns the outputs of each example, of shape (n,)
      or (n, k), and ``batch`` is a tuple of arrays with the examples along their first axis. The
      rows are those of the outputs' Jacobian. With the default loss and no ``targets``, outputs are
      residuals, whose mean of half squares is minimized; with ``targets``, predictions.
      ``cotangents``, of the outputs' shape, are given in place of a loss: the gradient is
      $\frac1n \sum_i s_i \nabla f_i$, such as with local energies for log-amplitudes. Then
      ``updates`` may be None, or the gradient as in other Optax loops; it is not used.
    * **Gradients of each example**: without ``outputs_fn``, the ``updates`` themselves have leaves
      ``(n, *leaf.shape)``, as for ``optax.contrib.differentially_private_aggregate``. They are the
      rows, and ``cotangents``, of shape (n,), their coefficients $s$: ones unless given.

    ``weights``, of shape (n,), makes means weighted ones. With complex outputs or gradients the
    direction is $F^{-1} \operatorname{Re}(G^H s) / n$ for real parameters, $F = \lambda I + \frac1n
    \operatorname{Re} G^H G$: a complex number is two real ones. Complex parameters are treated so
    too, which for a holomorphic function is $F = \lambda I + \frac1n G^H G$.

    A batch with rows that are not finite leaves the state unchanged; the update is NaN, so that
    ``optax.apply_if_finite`` and monitoring detect it.

    Sharded examples and parameters stay sharded; the matrix of the size of the batch is on every
    device.

    Args:
      learning_rate: a number or a schedule; 1 is a whole Gauss-Newton step.
      damping: the damping $\lambda$, a positive number or a schedule of the number of steps, on the
        scale of squared gradient entries. In float32, choose it above about $10^{-6}$ of $F$'s
        largest eigenvalue: below, it is raised to what rounding allows.
      loss: the loss of an example's outputs, as for `curvax.ggn_vp`; unused with ``cotangents``. A
        loss other than ``"squared_error"`` needs ``targets``.
      matrix: which matrix preconditions.

        * ``"gauss_newton"``: $F = \lambda I + \frac1n \sum_i J_i^T H_i J_i$ with the loss's Hessian
          $H_i$ in the outputs, k rows an example. It is the Fisher matrix where the loss is a
          likelihood; the identity in place of $H_i$ where ``cotangents`` are given.
        * ``"empirical_fisher"``: $\frac1n \sum_i g_i g_i^T$, one row an example.
        * ``"improved_empirical_fisher"``: each $g_i$ over the length of the loss's gradient
          in the outputs, so that examples that fit do not count less; one row an example. With a
          single output it equals the Gauss-Newton matrix of the squared error.
      momentum: the share $\mu$ of the last direction that is carried over, in [0, 1): SPRING. The
        new examples correct it where they see it.
      centered: whether the (weighted) mean is subtracted from the rows of $G$, as for
        log-amplitudes of unnormalized wave functions. The mean of $s$ then has no effect.
      relative_damping: whether the damping is in units of the rows' mean squared length, so that
        $G G^T$ is damped by $\lambda\, \operatorname{tr}(G G^T) / m$ for its m rows.
      max_fisher_norm: bound on $\sqrt{d^T F d}$, a trust region: for residuals, about how much
        their root mean square may change at a learning rate of 1. The direction carried over is not
        bounded.
      micro_batch_size: with ``outputs_fn``, the number of examples whose rows are in memory
        together, twice; they are computed again for each pair of micro-batches. None for all on one
        device, and on a mesh for as many as one device has of all examples. There it should be a
        multiple of the number of devices.
      weight_decay: the decoupled weight decay $\nu$, multiplied by the learning rate.
      mask: a tree of bools, or a function of params that returns one; True leaves decay.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: at construction, if an argument is out of range; in ``update``, if the updates are
        not gradients of each example, the outputs not those of each example, shapes do not match,
        weights are negative or all zero, or the rows do not fit into memory.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def residuals(params, x, y):
      ...     return jnp.tanh(x @ params["w"]) @ params["v"] - y
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (32, 2))
      >>> y = jnp.sin(x[:, 0])
      >>> params = {
      ...     "w": jax.random.normal(keys[1], (2, 16)),
      ...     "v": jax.random.normal(keys[2], (16,)),
      ... }
      >>> tx = curvax.natural_gradient(0.5, damping=1e-3)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(
      ...         None, state, params, outputs_fn=residuals, batch=(x, y)
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> bool(jnp.mean(residuals(params, x, y) ** 2) < 1e-3)
      True

    References:
      Amari, [Natural gradient works efficiently in
      learning](https://doi.org/10.1162/089976698300017746), 1998. In sample space: Ren and
      Goldfarb, [Efficient subsampled Gauss-Newton and natural gradient
      methods](https://arxiv.org/abs/1906.02353), 2019; Chen and Heyl, [Empowering deep neural
      quantum states through efficient optimization](https://arxiv.org/abs/2302.01941), 2023
      (minSR). Momentum: Goldshlager, Abrahamsen and Lin, [A Kaczmarz-inspired approach to
      accelerate the optimization of neural network
      wavefunctions](https://arxiv.org/abs/2401.10190), 2024 (SPRING). Wu et al., [An improved
      empirical Fisher approximation for natural gradient
      descent](https://arxiv.org/abs/2406.06420), 2024 (iEF).
    """
    return optax.chain(
        scale_by_natural_gradient(
            damping,
            loss=loss,
            matrix=matrix,
            momentum=momentum,
            centered=centered,
            relative_damping=relative_damping,
            max_fisher_norm=max_fisher_norm,
            micro_batch_size=micro_batch_size,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _direction(
    batch: BatchRows, damping: jax.Array, carried: Leaves | None, *, relative: bool
) -> _Direction:
    r"""$d = \mu d' + G^T K^{-1} (s - \mu G d')$."""
    samples = batch.samples
    gram, dots = batch.rows.gram_and_dots(carried)
    rest = samples if dots is None else samples - dots
    squares = diagonal(gram)
    normalizer = batch.normalizer
    finite = jnp.isfinite(jnp.sum(squares) + jnp.sum(jnp.square(rest))) & (normalizer > 0)
    shift = normalizer * damping
    if relative:
        size = jnp.sum(squares) / len(squares)
        shift = damping * jnp.where(size > 0, size, 1)
    gram = jnp.where(finite, gram, jnp.eye(len(gram), dtype=gram.dtype))
    rest = jnp.where(finite, rest, 0)
    solution = on_every_device(solve_damped_gram, gram, shift, rest)
    parts = batch.rows.combine(solution.x)
    if carried is not None:
        parts = [part + old for part, old in zip(parts, carried, strict=True)]
    explained = jnp.sum(jnp.square(samples - shift * solution.x))
    length = sum(jnp.sum(jnp.square(part)) for part in parts)
    return _Direction(
        parts,
        shift / normalizer,
        jnp.sqrt((explained + shift * length) / normalizer),
        solution.failed & finite,
        finite,
    )


def _as_updates(tree: PyTree, factor: jax.Array, like: tuple[Any, ...]) -> PyTree:
    leaves: Leaves = jax.tree.leaves(tree)

    def of_leaf(leaf: jax.Array, param: Any) -> jax.Array:
        return (leaf * factor).astype(jnp.result_type(param)) if is_inexact(param) else leaf

    pairs = zip(leaves, like, strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(tree), [of_leaf(leaf, param) for leaf, param in pairs]
    )


def _wide_zeros(leaf: Any) -> jax.Array:
    return jnp.zeros_like(leaf, dtype=wide_dtype(leaf))


def _check_damping(damping: Any) -> None:
    """Raises unless the damping is positive or a schedule."""
    if not callable(damping):
        check_range("damping", damping, low=0, open_low=True)
