"""Ideas that were measured and have not become an option of the library, each against its recipe.

The recipe of AdaHessian is Nesterov momentum and zeros skipped; that of M-FAC a window in relative
units with Nesterov momentum before it. An idea changes one thing of it; where its name says that
zeros count, the recipe is that for transformers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.fisher import DenseWindow, solve_damped_gram
from training import steppers
from training.optimizers import (
    DECAY,
    WINDOW,
    Contestant,
    adahessian,
    first_order,
    relative_mfac,
)
from training.steppers import Schedule, Stepper
from training.tasks.task import Batch, Task, Variables, mean_loss

PyTree = Any
RECIPE = {"nesterov": True, "skip_zeros": True}
RADIUS = 0.05  # of SASSHA's point; the paper searches 0.01 to 0.25
TRANSFORMERS = ("shakespeare", "multi30k")
FEW_OUTPUTS = ("clicks", "poisson", "burgers")
CHEAP = ("fashion-mlp", "fashion-cnn", "shakespeare", "clicks", "poisson", "burgers")


def root_of_absolute(tx: Any) -> Any:
    r"""SASSHA's curvature: the average of $|D|$, and its root in the denominator."""

    def update(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> Any:
        diag = extra.pop("hessian_diag", None)
        if diag is not None:
            extra["hessian_diag"] = jax.tree.map(lambda leaf: jnp.sqrt(jnp.abs(leaf)), diag)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def relative_eps(rate: Schedule, eps: float) -> Any:
    r"""AdaHessian with $\epsilon$ relative to the root mean square of the leaf's curvature."""
    tiny = 1e-12
    tx = curvax.scale_by_adahessian(eps=tiny, clip_threshold=None, **RECIPE)

    def update(updates: PyTree, state: PyTree, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)

        def leaf(update: jax.Array, nu: jax.Array) -> jax.Array:
            typical = jnp.sum(nu) / jnp.maximum(jnp.sum(nu > 0), 1)
            squares = jnp.where(nu > 0, nu, typical)  # as the recipe fills them
            curvature, size = (jnp.sqrt(x / state.nu_weight) for x in (squares, typical))
            return update * (curvature + tiny) / (curvature + eps * size + tiny)

        return jax.tree.map(leaf, updates, state.nu), state

    relative = optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.chain(relative, optax.clip(1.0), optax.scale_by_learning_rate(rate))


class RelativeMfacState(NamedTuple):
    """As M-FAC's state, without what cannot change."""

    count: jax.Array
    window: DenseWindow
    gram: jax.Array


def scale_by_mfac_in_units(num_grads: int, damping: float, power: float) -> Any:
    r"""M-FAC with a damping relative to $q$, the mean diagonal of $G G^T$ over the rows so far.

    $u = q^p\, G^T (\delta q I + G G^T)^{-1} e_j$: Newton's units at $p = 0$, the gradient's at
    $p = 1$; the library's relative window is $p = 1/2$.
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
    task: Task, tx: optax.GradientTransformation, *, improved: bool, damping: float = 0.1
) -> Stepper:
    r"""The natural gradient of a batch, from the gradients of its examples.

    $F = \lambda I + \frac1n \sum_n g_n g_n^T$ with $g_n$ the gradient of an example or, in the
    improved empirical Fisher matrix, that over the length of the loss's gradient in the outputs, so
    that examples that fit do not count less: of one output that is the Gauss-Newton matrix.
    $\lambda$ is relative to the mean of $|g_n|^2$ over $n$, as M-FAC's.
    """
    tx = optax.chain(curvax.scale_by_natural_gradient(damping, relative_damping=True), tx)

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
        updates, state = tx.update(rows, state, params, cotangents=scales)
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


def _recipe(words: str, only: tuple[str, ...] | None = None, **options: Any) -> Contestant:
    contestant = adahessian(f"recipe, {words}", **RECIPE, **options)
    return contestant._replace(only=only)


def _averaged(preset: str) -> Contestant:
    """AdaHessian's recipe for transformers, with the curvature of a matrix averaged."""
    words = f"adahessian(rate, nesterov=True, averaging={preset!r})"
    contestant = adahessian(words, nesterov=True, averaging=preset)
    return contestant._replace(only=TRANSFORMERS)


def _clipped(words: str, start: float, make: Callable[[Schedule], Any]) -> Contestant:
    """A first-order optimizer of clipped gradients, beside AdaHessian's on transformers."""
    contestant = first_order(
        f"chain(clip_by_global_norm(1.0), {words})",
        start,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), make(rate)),
    )
    return contestant._replace(only=TRANSFORMERS)


def _of_root(words: str, radius: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = root_of_absolute(curvax.adahessian(rate, **RECIPE))
        return steppers.with_hessian_diag(task, tx, radius=radius)

    return Contestant(words, 0.05, make)


def _of_relative_eps(eps: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        return steppers.with_hessian_diag(task, relative_eps(rate, eps))

    return Contestant(f"recipe, eps {eps} of the leaf's typical curvature", 0.3, make)


def _mfac_in_units(words: str, power: float) -> Contestant:
    def make(rate: Schedule) -> Any:
        scaling = scale_by_mfac_in_units(WINDOW, 0.1, power)
        momentum = optax.trace(0.9, nesterov=True)
        return optax.chain(momentum, scaling, optax.scale_by_learning_rate(rate))

    contestant = first_order(words, 0.1, make)
    return contestant._replace(only=("fashion-mlp", *FEW_OUTPUTS))


def _natural(words: str, *, improved: bool) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = optax.sgd(rate, momentum=0.9)
        return natural_gradient(task, tx, improved=improved)

    return Contestant(words, 0.1, make, only=FEW_OUTPUTS)


CANDIDATES = {
    "AdaHessian, no bound": _recipe("clip_threshold=None", clip_threshold=None),
    "AdaHessian, gradients clipped": adahessian(
        "chain(clip_by_global_norm(1.0), recipe)", clip_norm=1.0, **RECIPE
    ),
    "AdaHessian, zeros counted, gradients clipped": adahessian(
        "chain(clip_by_global_norm(1.0), adahessian(rate, nesterov=True))",
        clip_norm=1.0,
        nesterov=True,
    )._replace(only=TRANSFORMERS),
    "AdaHessian, zeros counted, averaging row": _averaged("row"),
    "AdaHessian, zeros counted, averaging block": _averaged("block"),
    "NAdamW, gradients clipped": _clipped(
        f"nadamw(rate, weight_decay={DECAY})",
        4e-3,
        lambda rate: optax.nadamw(rate, weight_decay=DECAY),
    ),
    "Muon, gradients clipped": _clipped("muon(rate)", 0.02, optax.contrib.muon),
    "AdaHessian, interval 10, no warm-up": _recipe("update_interval=10", update_interval=10),
    "AdaHessian, sharpness-aware": _recipe(f"at a radius of {RADIUS}", radius=RADIUS),
    "SASSHA": _of_root(f"recipe of the root of the mean of |D|, at a radius of {RADIUS}", RADIUS),
    "AdaHessian, eps .01 of the leaf": _of_relative_eps(0.01),
    "AdaHessian, 4 probes": _recipe("num_probes=4", CHEAP, num_probes=4),
    "M-FAC, damping .01": relative_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.01, window_scaling='relative'))",
        damping=0.01,
    ),
    "M-FAC, window of 32": relative_mfac(
        "chain(trace(0.9, nesterov=True), mfac(rate, 32, 0.1, window_scaling='relative'))",
        damping=0.1,
        num_grads=32,
    ),
    "M-FAC, window of 512": relative_mfac(
        "chain(trace(0.9, nesterov=True), mfac(rate, 512, 0.1, window_scaling='relative'))",
        damping=0.1,
        num_grads=512,
    )._replace(only=FEW_OUTPUTS),
    "M-FAC, Newton's units": _mfac_in_units("relative damping 0.1, power 0", 0.0),
    "M-FAC, gradient's units": _mfac_in_units("relative damping 0.1, power 1", 1.0),
    "natural gradient, iEF": _natural("iEF of the batch, relative damping 0.1", improved=True),
    "natural gradient, EF": _natural("EF of the batch, relative damping 0.1", improved=False),
}


def recipe_of(name: str) -> str:
    """The contestant that an idea is compared with."""
    if name.startswith(("NAdamW", "Muon")):
        return name.split(",")[0]
    if "zeros counted" in name:
        return "AdaHessian, Nesterov"
    if name.startswith(("AdaHessian", "SASSHA")):
        return "AdaHessian, Nesterov, zeros skipped"
    return "M-FAC, relative, Nesterov"
