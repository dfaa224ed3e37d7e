r"""AdaHessian: Adam's form with the Hessian's diagonal.

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
* With a refresh interval $n$ a new $D$ has weight $1 - \beta_2^n$. At the end of each cycle that
  equals feeding the same $D$ at each of the $n$ steps, as the published delayed variant does, and
  needs no cached copy.
* $\hat v = v / w$, where $w$ is the same average of ones over accepted refreshes.
  It is $1 - \beta_2^t$ at interval 1 and stays correct when the interval changes or a refresh is
  skipped.
* A leaf whose estimate is not finite keeps its previous one; until it has one, its update is zero.
* Each entry of the step is bounded, since curvature may vanish where the gradient does not.
* Curvature is kept in float32 or wider whatever the parameters are: bfloat16 cannot hold 0.999.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from curvax._checks import as_key, check_choice, check_count, check_range, check_real
from curvax._layouts import Layout
from curvax._trees import PyTree, is_inexact, varying_like
from curvax.curvature._probes import Distribution
from curvax.curvature._products import Mode
from curvax.curvature._refresh import (
    check_refresh_rule,
    clamped_interval,
    decide,
    every_step,
    refresh_due,
    step_key,
)
from curvax.optimizers._averaging import (
    Averaging,
    Rule,
    average_curvature,
    check_averaging,
    check_leaves,
)
from curvax.optimizers._curvature_input import curvature_of_function, given_diag
from curvax.optimizers._moments import (
    average_gradient,
    clipped_entries,
    corrected_mean,
    preconditioned,
)
from curvax.optimizers._squared_average import SquaredAverage

Scalar = jax.typing.ArrayLike


class ScaleByAdaHessianState(NamedTuple):
    """State of `curvax.scale_by_adahessian`.

    Attributes:
      count: int32 scalar, the number of steps taken.
      due: bool scalar, whether the next step refreshes the curvature; None if ``update_interval``
        is the Python integer 1, since every step does.
      key: PRNG key; step ``t`` draws its probes from ``fold_in(key, t)``.
      mu: a tree like ``params``, the average of gradients.
      nu: a tree like ``params`` in float32 or wider, the average of squared curvature.
      nu_weight: scalar, the same average of ones, which corrects the bias of ``nu``.
      refreshes: int32 scalar, the number of curvature estimates so far.
      refusals: int32, for each leaf in the order of ``jax.tree.leaves(params)``, the number of
        estimates that were not finite.
      clipped: float32 scalar, the fraction of entries that ``clip_threshold`` clipped in the last
        step; None without a threshold.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax
    due: jax.Array | None
    key: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_weight: jax.Array
    refreshes: jax.Array
    refusals: jax.Array
    clipped: jax.Array | None


def scale_by_adahessian(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-4,
    hessian_power: Scalar = 1.0,
    *,
    averaging: Averaging | Rule = "conv",
    layout: Layout = "auto",
    update_interval: Scalar = 1,
    refresh_warmup: Scalar = 0,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
    key: jax.Array | int | None = None,
    mu_dtype: Any | None = None,
    clip_threshold: Scalar | None = 1.0,
    nesterov: bool = False,
    skip_zeros: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by the averaged diagonal of the Hessian.

    See `curvax.adahessian` for the rule and the arguments. Chain it with
    ``optax.scale_by_learning_rate``, which applies the sign and the learning rate.

    Args:
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate, per step, of the average of squared curvature, in [0, 1).
      eps: positive constant added to the denominator, outside root and power.
      hessian_power: the power $k$ of the curvature, in [0, 1].
      averaging: which entries of a kernel share one curvature value.
      layout: the roles of the leaves' axes.
      update_interval: the number of steps between curvature refreshes.
      refresh_warmup: the number of initial steps that all refresh the curvature.
      num_probes: the number of probes if the curvature is computed from ``obj_fn``.
      distribution: the distribution of these probes, ``"rademacher"`` or ``"normal"``.
      mode: how to compute their products; see `curvax.value_grad_and_hvp`.
      key: PRNG key for the probes, or an integer seed; ``jax.random.key(0)`` by default.
      mu_dtype: dtype of the average of gradients; the params' by default.
      clip_threshold: bound on the absolute value of each entry of the rescaled gradient; None
        for no bound.
      nesterov: whether to use Nesterov momentum.
      skip_zeros: whether to ignore estimates that are exactly zero.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a
      `curvax.ScaleByAdaHessianState`.

    Raises:
      ValueError: at construction, if an argument is out of range; in ``init``, if parameters are
        complex; in ``update``, if no curvature is given or it does not match the gradients.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = optax.chain(
      ...     curvax.scale_by_adahessian(), optax.scale_by_learning_rate(0.1)
      ... )
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> def loss(x):
      ...     return 2 * x[0] ** 2 + x[1] ** 2
      >>> updates, state = tx.update(
      ...     jnp.array([2.0, 1.0]), state, params, obj_fn=loss
      ... )
      >>> print(updates.round(2))  # a tenth of Newton's step
      [-0.05 -0.05]

    References:
      Yao et al., [ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
      Learning](https://arxiv.org/abs/2006.00719), 2020, Algorithm 1.
    """
    check_range("b1", b1, low=0, high=1, open_high=True)
    check_range("b2", b2, low=0, high=1, open_high=True)
    check_range("eps", eps, low=0, open_low=True)
    check_range("hessian_power", hessian_power, low=0, high=1)
    check_averaging(averaging, layout)
    check_refresh_rule(update_interval, refresh_warmup)
    check_count("num_probes", num_probes)
    check_choice("distribution", distribution, get_args(Distribution))
    check_choice("mode", mode, get_args(Mode))
    as_key(key)
    if clip_threshold is not None:
        check_range("clip_threshold", clip_threshold, low=0, open_low=True)
    _check_b2_precision(b2)
    mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def next_due(count: jax.Array) -> jax.Array | None:
        if every_step(update_interval):
            return None
        return refresh_due(count, update_interval, refresh_warmup)

    def decay_of_refresh(count: jax.Array, dtype: Any) -> jax.Array:
        """The decay for an estimate at this step, which counts until the next refresh."""
        if every_step(update_interval):
            return jnp.asarray(b2, dtype)
        steps = jnp.where(count < refresh_warmup, 1, clamped_interval(update_interval))
        return jnp.asarray(b2, dtype) ** steps.astype(dtype)

    def init(params: optax.Params) -> ScaleByAdaHessianState:
        check_real("AdaHessian", params)
        check_leaves(averaging, layout, params)
        count, average = jnp.zeros((), jnp.int32), SquaredAverage.empty(params)
        state = ScaleByAdaHessianState(
            count=count,
            due=next_due(count),
            # A copy: donation of the state must not delete the caller's array.
            key=jnp.copy(as_key(key)),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_mu_dtype(p, mu_dtype)), params),
            nu=average.nu,
            nu_weight=average.weight,
            refreshes=average.refreshes,
            refusals=average.refusals,
            clipped=None if clip_threshold is None else jnp.zeros((), jnp.float32),
        )
        return varying_like(state, params)

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
        due = decide(refresh, state)
        average = SquaredAverage(state.nu, state.nu_weight, state.refreshes, state.refusals)
        if due is not False:
            if hessian_diag is not None:
                diag = given_diag(hessian_diag, updates)
            else:
                diag = curvature_of_function(
                    obj_fn if obj_fn is not None else value_fn,
                    params,
                    step_key(state),
                    num_probes=num_probes,
                    distribution=distribution,
                    mode=mode,
                    due=due,
                )
            squares = _squared_curvature(averaging, layout, diag, state.nu)
            decay = decay_of_refresh(state.count, average.weight.dtype)
            average = average.fold_in(squares, decay, due, skip_zeros=skip_zeros)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: average_gradient(g, m, b1), updates, state.mu)
        mean = corrected_mean(mu, updates, count, b1, average.weight.dtype, nesterov=nesterov)
        squares = average.filled() if skip_zeros else average.corrected()
        steps = preconditioned(mean, squares, average.known(), eps, hessian_power)
        clipped = None
        if clip_threshold is not None:
            steps, clipped = clipped_entries(steps, clip_threshold)
        new_state = ScaleByAdaHessianState(
            count=count,
            due=next_due(count),
            key=state.key,
            mu=jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu),
            nu=average.nu,
            nu_weight=average.weight,
            refreshes=average.refreshes,
            refusals=average.refusals,
            clipped=clipped,
        )
        like = updates if params is None else params
        return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), steps, like), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-4,
    hessian_power: Scalar = 1.0,
    *,
    averaging: Averaging | Rule = "conv",
    layout: Layout = "auto",
    update_interval: Scalar = 1,
    refresh_warmup: Scalar = 0,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    mode: Mode = "forward_over_reverse",
    key: jax.Array | int | None = None,
    mu_dtype: Any | None = None,
    clip_threshold: Scalar | None = 1.0,
    nesterov: bool = False,
    skip_zeros: bool = False,
    weight_decay: Scalar = 0.0,
    mask: PyTree | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian: an adaptive optimizer that uses the Hessian's diagonal.

    With $g_t$ the gradient, $D_t = A(|z \odot H_t z|)$ the averaged estimate of
    the Hessian's diagonal from a Rademacher probe $z$, and $\hat{\ }$ bias correction,

    $$
    \begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, D_t^2 \\
    \theta_t &= \theta_{t-1} - \alpha_t \left( \frac{\hat m_t}{\hat v_t^{k/2} + \epsilon}
    + \lambda\, \theta_{t-1} \right)
    \end{aligned}
    $$

    ``update`` takes the curvature from the first of these extra arguments that is given:
    ``hessian_diag``, a tree like the gradients, which `curvax.value_grad_and_hessian_diag` and its
    siblings return with the gradient; ``obj_fn``, a function ``params -> loss`` that closes over
    the batch; ``value_fn``, the same under L-BFGS's name. Other extra arguments are ignored.

    ``refresh``, a static extra argument, says whether the step uses new curvature: ``None`` leaves
    it to the state, ``True`` means yes, ``False`` means no, so none need be given.

    Args:
      learning_rate: a number or a schedule, on Newton's scale, not Adam's: start at 0.3 with
        ``hessian_power=1``; the paper uses 0.15 for ResNets, and 0.05 to 2 elsewhere.
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate, per step, of the average of squared curvature, in [0, 1).
      eps: positive constant added to the denominator, outside root and power. Where curvature
        vanishes, the step is the gradient divided by ``eps``; ``clip_threshold`` bounds it.
      hessian_power: the power $k$ of the curvature, in [0, 1]: 1 is Newton-like, 0
        ignores curvature. The paper's language models use 0.5.
      averaging: which entries of a kernel share one curvature value.

        * ``"conv"``: the spatial axes of convolution kernels, as in the published image code.
        * ``"row"``: also the whole fan-in of matrices, as in the published instruction code.
        * ``"block"``: runs of 32 along the fan-in of matrices, as in the transformer code.
        * ``"none"``: each entry has its own value.
        * ``"paper"``: like ``"conv"``, but averages the signed values, Eq. 10.
        * a function ``(path, shape) -> axes`` of a leaf's path, such as ``"layers/0/kernel"``, and
          shape; it returns a tuple of axes or a `curvax.Block`. (Name it in the ``static_args`` of
          ``optax.inject_hyperparams``, which would treat a callable as a schedule.)
      layout: how a preset reads the axes of a leaf: ``"auto"``, ``"flax"``,
        ``"out_first"`` (Equinox, PyTorch), ``"haiku"``, a mapping from path patterns
        (``re.search``) to layouts, such as ``{"encoder/.*kernel": "LHWIO"}``
        (`curvax.KernelLayout`), or a function ``(path, shape) -> layout``, also to be named in
        ``static_args``. `curvax.averaging_table` shows the result.
      update_interval: the number of steps $n$ between curvature refreshes. A refresh has weight
        $1 - \beta_2^n$, so ``b2`` remains a decay rate per step. A schedule's value below 1 counts
        as 1. See `curvax.refresh_due`.
      refresh_warmup: the number of initial steps that all refresh the curvature. With an interval
        above 1, use tens or hundreds of steps: ReLU units that are inactive at a single refresh
        have no curvature until the next.
      num_probes: the number of probes if the curvature is computed from ``obj_fn``. More probes
        change what $v$ estimates, $H_{ii}^2 + \frac1S \sum_{j \ne i} H_{ij}^2$, not only its noise.
      distribution: the distribution of these probes, ``"rademacher"`` or ``"normal"``.
      mode: how to compute their products; see `curvax.value_grad_and_hvp`.
      key: PRNG key for the probes, or an integer seed; ``jax.random.key(0)`` by default.
      mu_dtype: dtype of the average of gradients; the params' by default.
      clip_threshold: bound on the absolute value of each entry of the preconditioned step,
        before learning rate and decay. None is the published rule, whose steps are the gradient
        divided by ``eps`` where curvature vanishes.
      nesterov: whether to use Nesterov momentum, as in ``optax.adam``:
        $\hat m_t = \beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1)\, g_t / (1 - \beta_1^t)$.
      skip_zeros: whether to ignore estimates that are exactly zero. The entry then keeps its
        $\hat v$; an entry without one uses the mean $\hat v$ of the entries of its leaf that have
        one. Inactive units, and embedding rows that a batch does not use, have no curvature at most
        steps. The published average includes those zeros, so each use moves such an entry by more
        than Newton's step: better for rare words, worse for rare ids.
      weight_decay: the decoupled weight decay $\lambda$, multiplied by the learning rate. Divide a
        decay tuned for AdamW by the ratio of the learning rates.
      mask: a tree of bools, or a function of params that returns one; True leaves decay.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: at construction, if an argument is out of range; in ``init``, if parameters are
        complex; in ``update``, if no curvature is given or it does not match the gradients.

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
            refresh_warmup=refresh_warmup,
            num_probes=num_probes,
            distribution=distribution,
            mode=mode,
            key=key,
            mu_dtype=mu_dtype,
            clip_threshold=clip_threshold,
            nesterov=nesterov,
            skip_zeros=skip_zeros,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _squared_curvature(
    averaging: Averaging | Rule, layout: Layout, diag: PyTree, nu: PyTree
) -> PyTree:
    """$D^2$ of Algorithm 1, in the dtypes of ``nu``."""
    diag = jax.tree.map(lambda d, v: jnp.asarray(d, v.dtype), diag, nu)
    averaged = average_curvature(averaging, diag, layout)
    # Adding zeros restores the sharding of nu, which a mean on an explicit mesh loses.
    return jax.tree.map(lambda d, v: jnp.zeros_like(v) + jnp.square(d), averaged, nu)


def _check_b2_precision(b2: Scalar) -> None:
    dtype = getattr(b2, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"b2 has dtype {dtype}, which cannot represent 0.999; with "
            "optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )


def _mu_dtype(leaf: Any, mu_dtype: Any | None) -> Any:
    return mu_dtype if mu_dtype is not None and is_inexact(leaf) else jnp.result_type(leaf)
