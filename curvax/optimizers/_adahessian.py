r"""AdaHessian: Adam's shape on the Hessian's diagonal.

With $g_t$ the gradient and $D_t = A(|z \odot H_t z|)$ the averaged estimate of the
diagonal (Algorithm 1 of the paper),

$$
\begin{aligned}
m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, D_t^2 \\
u_t &= \hat m_t / (\hat v_t^{k/2} + \epsilon)
\end{aligned}
$$

Where this differs from the paper and the published code, and why:

* Layouts: the spatial axes of a convolution kernel are the first ones in Flax, the last ones in
  Equinox and PyTorch (`curvax._layouts`).
* A refresh interval $n$ weighs a new $D$ with $1 - \beta_2^n$. That equals
  feeding the same $D$ at each of the $n$ steps, as the published delayed variant
  does, at the end of each cycle, and needs no cached copy.
* $\hat v = v / w$, where $w$ is the same average of ones over accepted refreshes.
  It is $1 - \beta_2^t$ at interval 1 and stays right when the interval changes or a
  refresh is skipped.
* A non-finite estimate is not folded in; while there is none yet, the update is zero.
* Curvature is kept in float32 or wider whatever the parameters are: bfloat16 cannot hold 0.999.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax._checks import check_choice, check_count, check_range, check_real
from curvax._layouts import Layout
from curvax._trees import PyTree, is_inexact, part_like, wide_dtype, widest_dtype
from curvax.curvature._from_state import check_refresh, is_due, step_key
from curvax.curvature._probes import Distribution
from curvax.optimizers._averaging import Rule, average_curvature, check_averaging
from curvax.optimizers._curvature_input import curvature_of_function

Scalar = jax.typing.ArrayLike


class ScaleByAdaHessianState(NamedTuple):
    """State of `curvax.scale_by_adahessian`.

    Attributes:
      count: int32 scalar, the steps taken.
      interval: int32 scalar, the steps from one refresh of the curvature to the next.
      key: PRNG key; step ``t`` draws its probes from ``fold_in(key, t)``.
      mu: a tree like ``params``, the average of gradients.
      nu: a tree like ``params`` in float32 or wider, the average of squared curvature.
      nu_weight: scalar, the same average of ones: the bias correction of ``nu``.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax
    interval: jax.Array
    key: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_weight: jax.Array


def scale_by_adahessian(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-4,
    hessian_power: Scalar = 1.0,
    *,
    averaging: str | Rule = "conv",
    layout: Layout = "auto",
    update_interval: Scalar = 1,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    key: jax.Array | None = None,
    mu_dtype: Any | None = None,
    clip_threshold: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by the averaged diagonal of the Hessian.

    See `curvax.adahessian` for the rule and the arguments. The sign and the learning rate
    are left to the chain.

    Args:
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate, per step, of the average of squared curvature, in [0, 1).
      eps: added to the denominator, outside root and power; positive.
      hessian_power: the power $k$ of the curvature, in [0, 1].
      averaging: which entries of a kernel share one curvature value.
      layout: what the axes of the leaves are.
      update_interval: steps from one refresh of the curvature to the next.
      num_probes: probes averaged when curvature is computed from ``obj_fn``.
      distribution: ``"rademacher"`` or ``"normal"``, likewise.
      key: PRNG key of the probes; ``jax.random.key(0)`` by default.
      mu_dtype: dtype of the average of gradients; the params' by default.
      clip_threshold: bound on the absolute value of each entry of the rescaled gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a
      `curvax.ScaleByAdaHessianState`.

    Raises:
      ValueError: on an argument out of range, at construction; in ``init``, on complex
        parameters; in ``update``, where no curvature is given or it does not match.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = optax.chain(curvax.scale_by_adahessian(), optax.scale_by_learning_rate(0.1))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> def loss(x):
      ...     return 2 * x[0] ** 2 + x[1] ** 2
      >>> updates, state = tx.update(jnp.array([4.0, 4.0]), state, params, obj_fn=loss)
      >>> print(updates.round(2))  # a tenth of Newton's step
      [-0.1 -0.2]

    References:
      Yao et al., [ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
      Learning](https://arxiv.org/abs/2006.00719), 2020, Algorithm 1.
    """
    check_range("b1", b1, low=0, high=1, open_high=True)
    check_range("b2", b2, low=0, high=1, open_high=True)
    check_range("eps", eps, low=0, open_low=True)
    check_range("hessian_power", hessian_power, low=0, high=1)
    check_averaging(averaging, layout)
    check_count("update_interval", update_interval)
    check_count("num_probes", num_probes)
    check_choice("distribution", distribution, ("rademacher", "normal"))
    if clip_threshold is not None:
        check_range("clip_threshold", clip_threshold, low=0, open_low=True)
    _check_b2_precision(b2)
    mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init(params: optax.Params) -> ScaleByAdaHessianState:
        check_real("AdaHessian", params)
        return ScaleByAdaHessianState(
            count=jnp.zeros((), jnp.int32),
            interval=jnp.asarray(update_interval, jnp.int32),
            # A copy: handing out the caller's array would let donation delete it.
            key=jax.random.key(0) if key is None else jnp.copy(key),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_mu_dtype(p, mu_dtype)), params),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            nu_weight=jnp.zeros((), widest_dtype(params)),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByAdaHessianState,
        params: optax.Params | None = None,
        *,
        hessian_diag: PyTree | None = None,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdaHessianState]:
        del extra_args
        check_refresh(refresh)
        nu, weight = state.nu, state.nu_weight
        if refresh is not False:
            due = is_due(state) if refresh is None else jnp.asarray(True)
            if hessian_diag is not None:
                diag = part_like(hessian_diag, updates, name="hessian_diag")
            else:
                diag = curvature_of_function(
                    obj_fn if obj_fn is not None else value_fn,
                    params,
                    step_key(state),
                    num_probes=num_probes,
                    distribution=distribution,
                    due=None if refresh or _always(update_interval) else due,
                )
            squares = _squared_curvature(averaging, layout, diag, nu)
            nu, weight = _fold_in(squares, nu, weight, due, b2, update_interval)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: _average(g, m, b1), updates, state.mu)
        mu_weight = 1 - jnp.asarray(b1, weight.dtype) ** count

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            return _step(m, v, mu_weight, weight, eps, hessian_power, clip_threshold)

        scaled = jax.tree.map(step, mu, nu)
        new_state = ScaleByAdaHessianState(
            count=count,
            interval=jnp.asarray(update_interval, jnp.int32),
            key=state.key,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=nu,
            nu_weight=weight,
        )
        return optax.tree.cast_like(scaled, updates if params is None else params), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-4,
    hessian_power: Scalar = 1.0,
    *,
    averaging: str | Rule = "conv",
    layout: Layout = "auto",
    update_interval: Scalar = 1,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    key: jax.Array | None = None,
    mu_dtype: Any | None = None,
    clip_threshold: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: PyTree | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian: an adaptive optimizer on the Hessian's diagonal.

    With $g_t$ the gradient, $D_t = A(|z \odot H_t z|)$ the averaged estimate of
    the Hessian's diagonal from a Rademacher probe $z$, and $\hat{\ }$ the bias
    corrections,

    $$
    \begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, D_t^2 \\
    \theta_t &= \theta_{t-1} - \alpha_t \left( \frac{\hat m_t}{\hat v_t^{k/2} + \epsilon}
    + \lambda\, \theta_{t-1} \right)
    \end{aligned}
    $$

    The update takes curvature in one of three ways, the first that is given counting:
    ``hessian_diag``, a tree like the gradients, as `curvax.value_grad_and_hessian_diag` and
    its siblings return it beside the gradient in one pass; ``obj_fn``, a function
    ``params -> loss`` closed over the batch; ``value_fn``, the same under L-BFGS's name.
    Other extra arguments are ignored.

    ``refresh``, a static extra argument, says whether the step folds curvature in: ``None``
    decides by the count, ``True`` does, ``False`` does not and needs none.

    Args:
      learning_rate: a number or a schedule. It is Newton's, not Adam's: about 0.05 to 2 with
        ``hessian_power=1``; 0.15 is the paper's for ResNets.
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate, per step, of the average of squared curvature, in [0, 1).
      eps: added to the denominator, outside root and power; positive. It bounds the step
        where curvature vanishes: there the update is the gradient over ``eps``.
      hessian_power: the power $k$ of the curvature, in [0, 1]: 1 is Newton-like, 0
        ignores curvature. The paper's language models use 0.5.
      averaging: which entries of a kernel share one curvature value.

        * ``"conv"``: the spatial axes of convolution kernels, as the published image code.
        * ``"row"``: also the whole fan-in of matrices, as the published instruction code.
        * ``"block"``: runs of 32 along the fan-in of matrices, as the transformer code.
        * ``"none"``: each entry has its own.
        * ``"paper"``: like ``"conv"`` with the signed values averaged, Eq. 10.
        * a function ``(path, shape) -> axes`` of the leaf's path, ``"layers/0/kernel"``, and
          shape, that returns a tuple of axes or a `curvax.Block`. (Name it in the
          ``static_args`` of ``optax.inject_hyperparams``, which takes a callable for a
          schedule.)
      layout: what a preset takes the axes of a leaf for: ``"auto"``, ``"flax"``,
        ``"out_first"`` (Equinox, PyTorch), ``"haiku"``, a mapping of patterns of paths
        (``re.search``) to layouts, ``{"encoder/.*kernel": "LHWIO"}`` (`curvax.KernelLayout`), or
        a function ``(path, shape) -> layout``, likewise in ``static_args``.
        `curvax.averaging_table` shows what comes of it.
      update_interval: steps $n$ from one refresh of the curvature to the next. Its
        weight is $1 - \beta_2^n$, so ``b2`` keeps its meaning per step.
      num_probes: probes averaged when curvature is computed from ``obj_fn``. More of them
        change what $v$ estimates, $H_{ii}^2 + \frac1S \sum_{j \ne i} H_{ij}^2$,
        not only its noise.
      distribution: ``"rademacher"`` or ``"normal"``, likewise.
      key: PRNG key of the probes; ``jax.random.key(0)`` by default.
      mu_dtype: dtype of the average of gradients; the params' by default.
      clip_threshold: bound on the absolute value of each entry of the preconditioned step,
        before learning rate and decay.
      weight_decay: the decoupled decay $\lambda$, times the learning rate. A decay
        tuned for AdamW wants to be divided by the ratio of the learning rates.
      mask: a tree of bools, or a function of params that returns one: where to decay.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: on an argument out of range, at construction; in ``init``, on complex
        parameters; in ``update``, where no curvature is given or it does not match.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> tx = curvax.adahessian(learning_rate=0.5)
      >>> params, batch = {"w": jnp.zeros(2)}, jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> state = tx.init(params)
      >>> one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     value, grads, diag = one_pass(params, batch, state=state)
      ...     updates, state = tx.update(grads, state, params, hessian_diag=diag)
      ...     return optax.apply_updates(params, updates), state, value
      >>> for _ in range(50):
      ...     params, state, value = step(params, state, batch)
      >>> bool(value < 1e-3)
      True

    References:
      Yao et al., [ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
      Learning](https://arxiv.org/abs/2006.00719), 2020, Algorithm 1.
    """
    return optax.chain(
        scale_by_adahessian(
            b1=b1,
            b2=b2,
            eps=eps,
            hessian_power=hessian_power,
            averaging=averaging,
            layout=layout,
            update_interval=update_interval,
            num_probes=num_probes,
            distribution=distribution,
            key=key,
            mu_dtype=mu_dtype,
            clip_threshold=clip_threshold,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _squared_curvature(averaging: str | Rule, layout: Layout, diag: PyTree, nu: PyTree) -> PyTree:
    """$D^2$ of Algorithm 1, in the dtypes of ``nu``."""
    diag = jax.tree.map(lambda d, v: jnp.asarray(d, v.dtype), diag, nu)
    return jax.tree.map(jnp.square, average_curvature(averaging, diag, layout))


def _fold_in(
    squares: PyTree,
    nu: PyTree,
    weight: jax.Array,
    due: jax.Array,
    b2: Scalar,
    interval: Scalar,
) -> tuple[PyTree, jax.Array]:
    """``nu`` and its weight after a refresh, or as they were if not due or not finite."""
    # Judged on the squares, which overflow first.
    finite = [jnp.all(jnp.isfinite(square)) for square in jax.tree.leaves(squares)]
    accept = jnp.all(jnp.stack([due, *finite]))
    decay = jnp.asarray(b2, weight.dtype) ** interval

    def fold(old: jax.Array, new: jax.Array | float) -> jax.Array:
        kept = decay.astype(old.dtype)
        return jnp.where(accept, kept * old + (1 - kept) * new, old)

    return jax.tree.map(fold, nu, squares), fold(weight, 1.0)


def _average(gradient: jax.Array, mean: jax.Array, b1: Scalar) -> jax.Array:
    """``m`` of Algorithm 1, in float32 or wider; integers stay as they are."""
    if not is_inexact(mean):
        return mean
    dtype = jnp.promote_types(wide_dtype(gradient), mean.dtype)
    decay = jnp.asarray(b1, dtype)
    return decay * mean.astype(dtype) + (1 - decay) * gradient.astype(dtype)


def _step(
    mean: jax.Array,
    square: jax.Array,
    mean_weight: jax.Array,
    square_weight: jax.Array,
    eps: Scalar,
    hessian_power: Scalar,
    clip_threshold: Scalar | None,
) -> jax.Array:
    """The update of Algorithm 1, in float32 or wider; zero while there is no curvature."""
    if not is_inexact(mean):
        return jnp.zeros_like(mean)
    known = square_weight > 0
    corrected = square / jnp.where(known, square_weight, 1).astype(square.dtype)
    denominator = _power(jnp.sqrt(corrected), hessian_power) + eps
    step = mean / mean_weight.astype(mean.dtype) / denominator
    if clip_threshold is not None:
        bound = jnp.asarray(clip_threshold, step.dtype)
        step = jnp.clip(step, -bound, bound)
    return jnp.where(known, step, 0)


def _power(curvature: jax.Array, exponent: Scalar) -> jax.Array:
    """``curvature ** exponent`` without a transcendental where the exponent is known."""
    if isinstance(exponent, int | float) and exponent in (0.5, 1):
        return curvature if exponent == 1 else jnp.sqrt(curvature)
    return curvature**exponent


def _always(update_interval: Scalar) -> bool:
    # A known interval of 1 needs no conditional, in which XLA's CPU backend runs the
    # gradients of convolutions slowly. A traced one, under inject_hyperparams, is not asked.
    return isinstance(update_interval, int) and update_interval == 1


def _check_b2_precision(b2: Scalar) -> None:
    dtype = getattr(b2, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"b2 has dtype {dtype}, in which 0.999 rounds too far; with inject_hyperparams "
            "pass hyperparam_dtype=jnp.float32."
        )


def _mu_dtype(leaf: Any, mu_dtype: Any | None) -> Any:
    return mu_dtype if mu_dtype is not None and is_inexact(leaf) else leaf.dtype
