"""Ideas that were measured before they became an option of the library or were dropped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.fisher import DenseWindow, solve_damped_gram
from training import steppers
from training.optimizers import (
    WINDOW,
    Contestant,
    adahessian,
    first_order,
    gauss_newton,
    relative_mfac,
)
from training.steppers import Schedule, Stepper
from training.tasks.task import Batch, Task, Variables, mean_loss

PyTree = Any


class RelativeMfacState(NamedTuple):
    """As M-FAC's state, without what cannot change."""

    count: jax.Array
    window: DenseWindow
    gram: jax.Array


def scale_by_relative_mfac(
    num_grads: int, damping: float = 0.1, power: float = 0.5
) -> optax.GradientTransformation:
    r"""M-FAC with a damping relative to $q$, the mean diagonal of $G G^T$ over the rows so far.

    $u = q^p\, G^T (\delta q I + G G^T)^{-1} e_j$: Newton's units at $p = 0$, those of steps that do
    not depend on the loss's scale at $p = 1/2$, the gradient's at $p = 1$.
    """

    def init(params: PyTree) -> RelativeMfacState:
        window = DenseWindow.empty(params, num_grads, None)
        return RelativeMfacState(jnp.int32(0), window, jnp.zeros((num_grads, num_grads)))

    def update(grads: PyTree, state: RelativeMfacState, params: PyTree = None) -> Any:
        del params
        slot = state.count % num_grads
        row, kept = state.window.compress(grads)
        window = state.window.push(row, slot, optax.tree.norm(grads) < jnp.inf)
        newest = jnp.arange(num_grads) == slot
        products = window.dots(kept, jnp.float32)
        gram = jnp.where(newest, products[:, None], state.gram)
        gram = jnp.where(newest[:, None], products, gram)
        rows = jnp.minimum(state.count + 1, num_grads)
        size = jnp.trace(gram) / rows
        solution = solve_damped_gram(gram, damping * size, newest.astype(jnp.float32))
        updates = window.combine(size**power * solution.x, grads)
        return updates, RelativeMfacState(state.count + 1, window, gram)

    return optax.GradientTransformation(init, update)


def natural_gradient(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    damping: float = 0.1,
    improved: bool = True,
) -> Stepper:
    r"""The natural gradient of a batch, from the gradients of its examples.

    $F = \lambda I + \frac1n \sum_n g_n g_n^T$ with $g_n$ the gradient of an example or, in the
    improved empirical Fisher matrix, that over the length of the loss's gradient in the outputs, so
    that examples that fit do not count less: of one output that is the Gauss-Newton matrix.
    $\lambda$ is relative to the mean of $|g_n|^2$ over $n$, as M-FAC's.
    """

    def losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The loss of one example, and the squared length of its gradient in the outputs."""
        inputs, targets = batch
        outputs, _ = task.apply(params, inputs, {}, None)
        loss, cotangent = jax.value_and_grad(lambda z: mean_loss(task.loss, z, targets))(outputs)
        return loss, jnp.sum(cotangent**2)

    def step(variables: Variables, state: PyTree, batch: Batch, key: jax.Array, _: Any) -> Any:
        del key
        params = variables.params
        per_example = jax.vmap(jax.value_and_grad(losses, has_aux=True), in_axes=(None, 0))
        parts = [per_example(params, part) for part in examples(batch)]
        (values, lengths), rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        lengths = jnp.sqrt(lengths + 1e-6 * jnp.mean(lengths))
        scales = lengths if improved else jnp.ones_like(lengths)
        rows = jax.vmap(lambda row, scale: jax.tree.map(lambda leaf: leaf / scale, row))(
            rows, scales
        )
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(rows))
        inverse = curvax.inverse_fisher(rows, damping * squares / len(scales) ** 2)
        direction = inverse.solve_in_sample_space(scales / len(scales))
        updates, state = tx.update(direction, state, params)
        return variables._replace(params=optax.apply_updates(params, updates)), state, values.mean()

    return Stepper(tx.init, step)


def examples(batch: Batch) -> list[Batch]:
    """A batch's examples as batches of one, on a new axis; sets of points one after the other."""
    inputs, targets = batch
    if not isinstance(inputs, dict):
        return [jax.tree.map(lambda leaf: leaf[:, None], batch)]
    parts, start = [], 0
    for name, points in inputs.items():
        others = {key: jnp.zeros((len(points), 0, *rest.shape[1:])) for key, rest in inputs.items()}
        part = {**others, name: points[:, None]}
        parts.append((part, targets[start : start + len(points), None]))
        start += len(points)
    return parts


def root_of_absolute(tx: Any) -> Any:
    r"""SASSHA's curvature: the average of $|D|$, and its root in the denominator."""

    def update(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> Any:
        diag = extra.pop("hessian_diag", None)
        if diag is not None:
            extra["hessian_diag"] = jax.tree.map(lambda leaf: jnp.sqrt(jnp.abs(leaf)), diag)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def relative_eps(rate: Any, eps: float, clip_threshold: float = 1.0, **options: Any) -> Any:
    r"""AdaHessian with $\epsilon$ relative to the root mean square of the leaf's curvature."""
    tiny = 1e-12
    tx = curvax.scale_by_adahessian(eps=tiny, clip_threshold=None, **options)

    def update(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)

        def leaf(update: jax.Array, nu: jax.Array) -> jax.Array:
            curvature = jnp.sqrt(nu / state.nu_weight)
            size = jnp.sqrt(jnp.mean(curvature**2))
            return update * (curvature + tiny) / (curvature + eps * size + tiny)

        return jax.tree.map(leaf, updates, state.nu), state

    relative = optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.chain(relative, optax.clip(clip_threshold), optax.scale_by_learning_rate(rate))


def _sassha(words: str, *, start: float, radius: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = root_of_absolute(curvax.adahessian(rate, nesterov=True))
        return steppers.with_hessian_diag(task, tx, radius=radius)

    return Contestant(words, start, make)


def _of_relative_eps(words: str, eps: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = relative_eps(rate, eps, nesterov=True)
        return steppers.with_hessian_diag(task, tx)

    return Contestant(words, 0.3, make)


def _of_relative_mfac(words: str, *, start: float, damping: float, power: float) -> Contestant:
    def make(rate: Schedule) -> Any:
        scaling = scale_by_relative_mfac(WINDOW, damping, power)
        return optax.chain(optax.ema(0.9), scaling, optax.scale_by_learning_rate(rate))

    return first_order(words, start, make)


def _natural(words: str, start: float, **options: Any) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        return natural_gradient(task, optax.sgd(rate, momentum=0.9), **options)

    return Contestant(
        words, start, make, only=("fashion-mlp", "fashion-cnn", "clicks", "poisson", "burgers")
    )


CANDIDATES = {
    "AdaHessian, Nesterov, no clip": adahessian(
        "curvax.adahessian(rate, nesterov=True, clip_threshold=None)",
        nesterov=True,
        clip_threshold=None,
    ),
    "AdaHessian, Nesterov, interval 10": adahessian(
        "curvax.adahessian(rate, nesterov=True, update_interval=10, refresh_warmup=100)",
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov, interval 10, cold": adahessian(
        "curvax.adahessian(rate, nesterov=True, update_interval=10)",
        nesterov=True,
        update_interval=10,
    ),
    "AdaHessian, Nesterov, sharpness-aware": adahessian(
        "curvax.adahessian(rate, nesterov=True) at a radius of 0.05", nesterov=True, radius=0.05
    ),
    "SASSHA": _sassha("root of the mean of |D| at a radius of 0.05", start=0.05, radius=0.05),
    "AdaHessian, root": _sassha("root of the mean of |D|", start=0.05, radius=0.0),
    "AdaHessian, Nesterov, eps .1 of the leaf": _of_relative_eps("relative eps 0.1", 0.1),
    "AdaHessian, Nesterov, eps .01 of the leaf": _of_relative_eps("relative eps 0.01", 0.01),
    "Gauss-Newton diagonal, Nesterov": gauss_newton(
        "curvax.adahessian(rate, nesterov=True), value_grad_and_ggn_diag_from_outputs",
        nesterov=True,
    ),
    "AdaHessian, skipping zeros": adahessian(
        "curvax.adahessian(rate, skip_zeros=True)", skip_zeros=True
    ),
    "AdaHessian, skipping zeros, Nesterov, interval 10, cold": adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True, update_interval=10)",
        skip_zeros=True,
        nesterov=True,
        update_interval=10,
    ),
    "M-FAC, relative, Newton's units": _of_relative_mfac(
        "relative damping 0.1, power 0", start=0.05, damping=0.1, power=0.0
    ),
    "M-FAC, relative, scale-free": _of_relative_mfac(
        "relative damping 0.1, power 0.5", start=0.05, damping=0.1, power=0.5
    ),
    "M-FAC, relative, gradient's units": _of_relative_mfac(
        "relative damping 0.1, power 1", start=0.05, damping=0.1, power=1.0
    ),
    "M-FAC, relative, 0.01": _of_relative_mfac(
        "relative damping 0.01, power 0.5", start=0.05, damping=0.01, power=0.5
    ),
    "M-FAC, relative, Nesterov, 0.01": relative_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.01, window_scaling='relative'))",
        damping=0.01,
    ),
    "natural gradient, iEF": _natural("iEF of the batch, relative damping 0.1", 0.1),
    "natural gradient, EF": _natural("EF of the batch, relative damping 0.1", 0.1, improved=False),
}
