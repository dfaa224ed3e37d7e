r"""M-FAC: gradients preconditioned by the inverse empirical Fisher matrix of recent ones.

With the last $m$ gradients as rows of $G$, the newest, $g_t$, in row $j$, and a damping
$\lambda$ (Section 4 of the paper),

$$
F_t = \lambda I + \frac1m G^T G, \qquad u_t = F_t^{-1} g_t
$$

Where this differs from the paper and the published code, and why:

* $u_t = m\, G^T x$ with $K x = e_j$, $K = m \lambda I + G G^T$: the push-through identity. It
  equals the published difference $(g - G^T c)/\lambda$ and does not cancel: in float32, at
  $\lambda = 10^{-7}$, it has 4 to 5 more digits (`curvax.fisher._damped_gram`).
* $K$ is factored by Cholesky at each step and the residual checked, in place of the recurrences;
  a failure is counted, and the step retried with a larger damping.
* A gradient that is not finite never enters the window, the momentum or the error feedback: the
  published window stays poisoned for $m$ steps.
* Weight decay is decoupled. The published coupled form, in which the decay is part of the
  gradients in the window, is ``optax.add_decayed_weights`` before the transformation.
* The window is a tree like the parameters, so a sharded model stays sharded.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from curvax._checks import check_choice, check_like, check_range, check_real, check_size
from curvax._trees import (
    DType,
    PyTree,
    is_inexact,
    tree_norm,
    varying_like,
    wide_dtype,
    widen,
    widest_dtype,
)
from curvax.fisher._damped_gram import solve_damped_gram
from curvax.fisher.window._dense import DenseWindow, Window, row_dtype
from curvax.fisher.window._sparse import SparseWindow
from curvax.optimizers._memory import check_window_memory

Scalar = jax.typing.ArrayLike
WindowScaling = Literal["nominal", "filled", "relative"]
WindowDtype = Literal["float32", "bfloat16", "float64"]


class ScaleByMfacState(NamedTuple):
    """State of `curvax.scale_by_mfac`.

    Attributes:
      count: int32 scalar, the number of gradients added to the window so far.
      window: the last ``num_grads`` gradients, a `curvax.fisher.DenseWindow` or a
        `curvax.fisher.SparseWindow`; gradient ``t`` is in row ``t % num_grads``.
      gram: the inner products of the window's rows, of shape (num_grads, num_grads), in
        float32 or wider.
      damping: scalar, the damping in $F$ at the last step.
      normalizer: scalar, the divisor of the sum of outer products at the last step.
      failures: int32 scalar, the number of steps whose factorization failed and was repeated with a
        larger damping.
      mu: a tree like ``params``, the average of updates; None without momentum.
      feedback: a tree like ``params`` in float32 or wider, the residual that sparse rows have left
        out so far; None with dense rows.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax
    window: Window
    gram: jax.Array
    damping: jax.Array
    normalizer: jax.Array
    failures: jax.Array
    mu: optax.Updates | None
    feedback: optax.Updates | None


def scale_by_mfac(
    num_grads: int = 1024,
    damping: optax.ScalarOrSchedule = 1e-5,
    *,
    momentum: Scalar = 0.0,
    window_scaling: WindowScaling = "nominal",
    window_dtype: WindowDtype | DType | None = None,
    density: float | None = None,
    top_k_recall: float | None = None,
    max_update_norm: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by the inverse empirical Fisher matrix of recent gradients.

    See `curvax.mfac` for the rule and the arguments. Chain it with
    ``optax.scale_by_learning_rate``, which applies the sign and the learning rate. Updates support
    forward-mode differentiation only: a factorization that fails is repeated in a loop of unknown
    length.

    Args:
      num_grads: the number $m$ of gradients in the window.
      damping: the damping $\lambda$, a positive number or a schedule of the number of gradients so
        far; its unit differs under ``"relative"`` scaling.
      momentum: decay rate of an average of the rescaled gradients, in [0, 1).
      window_scaling: ``"nominal"``, ``"filled"`` or ``"relative"``.
      window_dtype: dtype of the window's rows; the params', but float32 or wider, by default.
      density: the fraction of each gradient that sparse rows keep, in (0, 1]; None for dense rows.
      top_k_recall: the fraction of the largest entries that a TPU must find, in (0, 1]; None for
        all.
      max_update_norm: bound on the norm of the rescaled gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a
      `curvax.ScaleByMfacState`.

    Raises:
      ValueError: at construction, if an argument is out of range; in ``init``, if parameters are
        complex or the window is larger than the device's memory; in ``update``, if gradients do
        not match the window.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = optax.chain(
      ...     curvax.scale_by_mfac(num_grads=8, damping=0.5),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> params, grads = jnp.zeros(2), jnp.array([2.0, 0.0])
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates)  # -0.1 g / (damping + |g|^2 / 8)
      [-0.2 -0. ]

    References:
      Frantar et al., [M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information](https://arxiv.org/abs/2107.03356), 2021, Section 4.
    """
    check_size("num_grads", num_grads)
    if not callable(damping):
        check_range("damping", damping, low=0, open_low=True)
    check_range("momentum", momentum, low=0, high=1, open_high=True)
    check_choice("window_scaling", window_scaling, get_args(WindowScaling))
    _check_density(density)
    _check_recall(top_k_recall, density)
    if max_update_norm is not None:
        check_range("max_update_norm", max_update_norm, low=0, open_low=True)
    window_dtype = _checked_window_dtype(window_dtype)

    def wide_zeros(leaf: Any) -> jax.Array:
        return jnp.zeros_like(leaf, dtype=wide_dtype(leaf))

    def empty_window(params: optax.Params) -> Window:
        if density is None:
            return DenseWindow.empty(params, num_grads, window_dtype)
        return SparseWindow.empty(params, num_grads, window_dtype, density)

    def scales(count: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Damping and normalizer of the step after ``count`` gradients."""
        now = damping(count) if callable(damping) else damping
        filled = jnp.minimum(count + 1, num_grads)
        normalizer = num_grads if window_scaling == "nominal" else filled
        # A copy: donation of the state must not delete the caller's array.
        return jnp.array(now, dtype), jnp.asarray(normalizer, dtype)

    def init(params: optax.Params) -> ScaleByMfacState:
        check_real("M-FAC", params)
        shapes = jax.eval_shape(empty_window, params)
        check_window_memory(shapes, params, num_grads=num_grads, density=density)
        dtype = widest_dtype(params)
        count = jnp.zeros((), jnp.int32)
        damping_now, normalizer = scales(count, dtype)
        state = ScaleByMfacState(
            count=count,
            window=empty_window(params),
            gram=jnp.zeros((num_grads, num_grads), dtype),
            damping=damping_now,
            normalizer=normalizer,
            failures=jnp.zeros((), jnp.int32),
            mu=None if _is_zero(momentum) else jax.tree.map(jnp.zeros_like, params),
            feedback=None if density is None else jax.tree.map(wide_zeros, params),
        )
        return varying_like(state, params)

    def update(
        updates: optax.Updates,
        state: ScaleByMfacState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMfacState]:
        del extra_args
        check_like("the gradients", updates, gradient_shapes(state))
        dtype = state.gram.dtype
        entering = jax.tree.map(widen, updates)
        if state.feedback is not None:
            entering = optax.tree.add(entering, state.feedback)
        finite = _is_finite(entering, window_dtype, dtype)
        damping_now, normalizer = scales(state.count, dtype)
        window, gram, newest, feedback = _inserted(entering, state, finite, top_k_recall or 1.0)
        factor = normalizer
        if window_scaling == "relative":
            size = _mean_square(gram, normalizer)
            factor, damping_now = jnp.sqrt(size), damping_now * size / normalizer
        solution = solve_damped_gram(gram, normalizer * damping_now, newest.astype(dtype))
        scaled = window.combine(factor * solution.x, updates)
        if max_update_norm is not None:
            scaled = _bounded(scaled, max_update_norm)
        if state.mu is not None:
            scaled = jax.tree.map(lambda u, v: _average(u, v, momentum), scaled, state.mu)

        taken = state._replace(
            count=optax.safe_increment(state.count),
            damping=damping_now,
            normalizer=normalizer,
            failures=state.failures + solution.failed,
            mu=None if state.mu is None else scaled,
            feedback=feedback,
        )
        new_state = _select_small(finite, taken, state)._replace(window=window, gram=gram)
        like = updates if params is None else params
        return jax.tree.map(
            lambda u, p: _as_update(u, finite, jnp.result_type(p)), scaled, like
        ), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def mfac(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    num_grads: int = 1024,
    damping: optax.ScalarOrSchedule = 1e-5,
    *,
    momentum: Scalar = 0.0,
    window_scaling: WindowScaling = "nominal",
    window_dtype: WindowDtype | DType | None = None,
    density: float | None = None,
    top_k_recall: float | None = None,
    max_update_norm: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: PyTree | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""M-FAC: matrix-free natural-gradient steps from a window of past gradients.

    With the last $m$ gradients as rows of $G$, the newest, $g_t$, among them,

    $$
    \begin{aligned}
    F_t &= \lambda I + \frac1m G^T G \\
    u_t &= F_t^{-1} g_t = m\, G^T x, \qquad (m \lambda I + G G^T)\, x = e_t \\
    v_t &= \beta v_{t-1} + (1 - \beta)\, u_t \\
    \theta_t &= \theta_{t-1} - \alpha_t (v_t + \mu\, \theta_{t-1})
    \end{aligned}
    $$

    A step makes two passes over the window and solves $m$ equations. It needs only the gradient, so
    it works in any Optax loop where Adam does. Dense rows take $4 m$ bytes a parameter in float32:
    `curvax.state_bytes` gives the total.

    A gradient that is not finite leaves the state unchanged; the update is NaN, so that
    ``optax.apply_if_finite`` and monitoring detect it.

    Under ``optax.inject_hyperparams`` the arguments that fix shapes are static:
    ``static_args=("num_grads", "density", "momentum")``. ``optax.MultiSteps`` copies the window
    at every micro-step; average the micro-gradients outside instead.

    Args:
      learning_rate: a number or a schedule. A step's length grows with it and with
        $m / \lVert g_\perp \rVert$, where $g_\perp$ is the part of the gradient outside the span of
        the others in the window.
      num_grads: the number $m$ of gradients in the window.
      damping: the damping $\lambda$, a positive number or a schedule of the number of gradients so
        far. It is on the scale of squared gradient entries; 1e-6 to 1e-3 is usual. As gradients
        vanish, the step is the gradient times ``learning_rate / damping``.
      momentum: decay rate $\beta$ of an average of the updates, after preconditioning as
        published and without bias correction, in [0, 1). Heavy-ball momentum is
        ``optax.trace`` in the chain.
      window_scaling: the divisor of the sum of outer products while the window fills.

        * ``"nominal"``: $m$ from the first step, as published: full steps at once.
        * ``"filled"``: the number of gradients in the window, a linear warm-up of the step.
        * ``"relative"``: the same, with damping and step in units of the window's own gradients.
          With $q$ the mean of $\lVert g_i \rVert^2$ over the window,

            $$
            u_t = \sqrt q\; G^T (\lambda q I + G G^T)^{-1} e_t .
            $$

            The step depends neither on the scale of the loss nor on the size of the window:
            unrelated gradients give $g_t / \lVert g_t \rVert$ up to $1 + \lambda$, and the part of
            a gradient that the others explain is removed as before. So a damping of 0.1 and
            learning rates of 0.1 to 0.4 suit different models, and steps do not grow as gradients
            vanish.
      window_dtype: dtype of the window's rows: ``"float32"``, ``"bfloat16"``, which halves the
        memory, or ``"float64"``. The params', but float32 or wider, by default.
      density: the fraction of each gradient that sparse rows keep, in (0, 1]: the largest entries
        of each block; the rest is added to the next gradient. At 0.01 the window takes 1.5 % of a
        dense float32 one, 1 % with bfloat16 values. None for dense rows.
      top_k_recall: with ``density``, the expected fraction of the largest entries that is found, in
        (0, 1]; None for all. Below 1, TPUs search faster and keep other entries in place of those
        they miss, which are added to the next gradient. CPUs and GPUs find all.
      max_update_norm: bound on the norm of $u_t$.
      weight_decay: the decoupled weight decay $\mu$, multiplied by the learning rate. The published
        code adds the decay to the gradients in the window; for that, put
        ``optax.add_decayed_weights`` before `curvax.scale_by_mfac` in a chain.
      mask: a tree of bools, or a function of params that returns one; True leaves decay.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: at construction, if an argument is out of range; in ``init``, if parameters are
        complex or the window is larger than the device's memory; in ``update``, if gradients do
        not match the window.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> tx = curvax.mfac(learning_rate=0.05, num_grads=16, damping=0.1)
      >>> params, batch = {"w": jnp.zeros(2)}, jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     value, grads = jax.value_and_grad(loss)(params, batch)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, value
      >>> for _ in range(100):
      ...     params, state, value = step(params, state, batch)
      >>> bool(value < 1e-3)
      True

    References:
      Frantar et al., [M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information](https://arxiv.org/abs/2107.03356), 2021, Section 4.
    """
    return optax.chain(
        scale_by_mfac(
            num_grads,
            damping,
            momentum=momentum,
            window_scaling=window_scaling,
            window_dtype=window_dtype,
            density=density,
            top_k_recall=top_k_recall,
            max_update_norm=max_update_norm,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _inserted(
    grads: PyTree, state: ScaleByMfacState, finite: jax.Array, recall: float
) -> tuple[Window, jax.Array, jax.Array, PyTree | None]:
    """Window and Gram matrix with the gradient in, which row it is, and the new error feedback.

    If it is not ``finite``, window and Gram matrix are unchanged and no row is the newest.
    """
    size = len(state.gram)
    slot = state.count % size
    row, kept = state.window.compress(grads, recall=recall)
    window = state.window.push(row, slot, finite)
    newest = (jnp.arange(size) == slot) & finite
    gram = _with_row(state.gram, newest, window.dots(kept, state.gram.dtype))
    feedback = None if state.feedback is None else optax.tree.sub(grads, kept)
    return window, gram, newest, feedback


def _with_row(gram: jax.Array, newest: jax.Array, products: jax.Array) -> jax.Array:
    """The Gram matrix with the newest row and column replaced."""
    products = jnp.broadcast_to(products, newest.shape)  # of a tree without leaves: a zero
    column = jnp.where(newest, products[:, jnp.newaxis], gram)
    return jnp.where(newest[:, jnp.newaxis], products, column)


def _mean_square(gram: jax.Array, rows: jax.Array) -> jax.Array:
    """The mean squared norm of the gradients in the window; 1 if all are zero."""
    size = jnp.trace(gram) / rows
    return jnp.where(size > 0, size, 1)


def _select_small(
    finite: jax.Array, taken: ScaleByMfacState, state: ScaleByMfacState
) -> ScaleByMfacState:
    """The new state if ``finite``; window and Gram matrix were guarded when written."""
    names = tuple(name for name in state._fields if name not in ("window", "gram"))

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new.astype(old.dtype), old)

    selected = {
        name: jax.tree.map(select, getattr(taken, name), getattr(state, name)) for name in names
    }
    return state._replace(**selected)


def _bounded(updates: PyTree, max_norm: Scalar) -> PyTree:
    """The updates, scaled down to the norm if they are longer."""
    factor = jnp.minimum(1, max_norm / tree_norm(updates))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)


def _average(update: jax.Array, mean: jax.Array, decay: Scalar) -> jax.Array:
    decay = jnp.asarray(decay, update.dtype)
    return decay * mean.astype(update.dtype) + (1 - decay) * update


def _as_update(update: jax.Array, finite: jax.Array, dtype: Any) -> jax.Array:
    """The update in the params' dtype; NaN where the gradient was not finite."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros_like(update, dtype=dtype)
    return jnp.where(finite, update, jnp.nan).astype(dtype)


def _is_finite(grads: PyTree, window_dtype: Any | None, gram_dtype: Any) -> jax.Array:
    """Whether squares of a gradient can be summed in the rows' dtype and kept in the Gram matrix.

    The squared norm overflows first, and on a mesh it is one number for each leaf.
    """

    def squared(leaf: jax.Array) -> jax.Array:
        wide = jnp.promote_types(row_dtype(leaf, window_dtype), jnp.float32)
        return jnp.sum(jnp.square(leaf.astype(wide))).astype(gram_dtype)

    leaves = [leaf for leaf in jax.tree.leaves(grads) if is_inexact(leaf)]
    return jnp.isfinite(sum(map(squared, leaves), start=jnp.zeros((), gram_dtype)))


def gradient_shapes(state: ScaleByMfacState) -> PyTree:
    """A tree with the shapes that gradients must have."""
    if not isinstance(state.window, DenseWindow):
        return state.feedback
    return jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), state.window.rows
    )


def _check_density(density: Any) -> None:
    if density is None:
        return
    if isinstance(density, jax.Array):
        raise ValueError(
            "density fixes the shape of the state and must be a Python number, got an array; "
            'with optax.inject_hyperparams name it in static_args=("density", ...).'
        )
    check_range("density", density, low=0, high=1, open_low=True)


def _check_recall(recall: Any, density: float | None) -> None:
    if recall is None:
        return
    if isinstance(recall, jax.Array):
        raise ValueError(
            "top_k_recall is compiled in and must be a Python number, got an array; "
            'with optax.inject_hyperparams name it in static_args=("top_k_recall", ...).'
        )
    check_range("top_k_recall", recall, low=0, high=1, open_low=True)
    if density is None:
        raise ValueError(f"top_k_recall={recall} needs sparse rows: set density, such as 0.01.")


def _checked_window_dtype(window_dtype: WindowDtype | DType | None) -> DType | None:
    if window_dtype is None:
        return None
    window_dtype = jax.dtypes.canonicalize_dtype(window_dtype)
    check_choice("window_dtype", window_dtype.name, get_args(WindowDtype))
    return window_dtype


def _is_zero(momentum: Scalar) -> bool:
    # An array, as inject_hyperparams passes, is not inspected: its average is kept.
    return isinstance(momentum, int | float) and momentum == 0
