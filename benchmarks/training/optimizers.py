"""The contestants: each has one learning rate to be searched for, and fixed other settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import curvax
from training import steppers
from training.steppers import Schedule, Stepper
from training.tasks.task import Task

WINDOW = 128
DECAY = 0.01


class Contestant(NamedTuple):
    """An optimizer in a table.

    Attributes:
      words: the call, as its settings.
      start: the rate around which the search begins.
      make: ``(task, schedule) -> stepper``.
      only: the tasks that it can run on; None for all.
    """

    words: str
    start: float
    make: Callable[[Task, Schedule], Stepper]
    only: tuple[str, ...] | None = None


def first_order(words: str, start: float, make: Callable[..., Any]) -> Contestant:
    return Contestant(words, start, lambda task, rate: steppers.first_order(task, make(rate)))


def adahessian(
    words: str,
    *,
    clip_norm: float | None = None,
    radius: float = 0.0,
    num_probes: int = 1,
    **options: Any,
) -> Contestant:
    interval, warmup = (options.get(key, 0) for key in ("update_interval", "refresh_warmup"))

    def make(task: Task, rate: Schedule) -> Stepper:
        tx = curvax.adahessian(rate, **options)
        if clip_norm is not None:
            tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
        return steppers.with_hessian_diag(
            task, tx, interval or 1, warmup, radius=radius, num_probes=num_probes
        )

    return Contestant(words, 0.3, make)


def gauss_newton(words: str, **options: Any) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        return steppers.with_ggn_diag(task, curvax.adahessian(rate, **options))

    return Contestant(words, 0.03, make)


def mfac(words: str, *, before: float = 0.0, **options: Any) -> Contestant:
    def make(rate: Schedule) -> Any:
        tx = curvax.mfac(rate, WINDOW, **options)
        return optax.chain(optax.ema(before), tx) if before else tx

    return first_order(words, 0.05 / WINDOW, make)


def relative_mfac(words: str, *, num_grads: int = WINDOW, **options: Any) -> Contestant:
    def make(rate: Schedule) -> Any:
        tx = curvax.mfac(rate, num_grads, window_scaling="relative", **options)
        return optax.chain(optax.trace(0.9, nesterov=True), tx)

    return first_order(words, 0.1, make)


def _somax_adahessian(task: Task, rate: Schedule) -> Stepper:
    import somax  # optional

    return steppers.of_somax(task, somax.adahessian, learning_rate=rate)


def _sophia(task: Task, rate: Schedule) -> Stepper:
    return steppers.with_function(task, optax.contrib.sophia(rate))


WITHOUT_STATISTICS = (
    "fashion-mlp",
    "fashion-cnn",
    "shakespeare",
    "multi30k",
    "clicks",
    "poisson",
    "burgers",
)

CONTESTANTS = {
    "SGD": first_order(
        "optax.sgd(rate, momentum=0.9)", 0.1, lambda rate: optax.sgd(rate, momentum=0.9)
    ),
    "Adam": first_order("optax.adam(rate)", 4e-3, optax.adam),
    "AdamW": first_order(
        f"optax.adamw(rate, weight_decay={DECAY})",
        4e-3,
        lambda rate: optax.adamw(rate, weight_decay=DECAY),
    ),
    "NAdamW": first_order(
        f"optax.nadamw(rate, weight_decay={DECAY})",
        4e-3,
        lambda rate: optax.nadamw(rate, weight_decay=DECAY),
    ),
    "Muon": first_order("optax.contrib.muon(rate)", 0.02, optax.contrib.muon),
    "Sophia": Contestant("optax.contrib.sophia(rate)", 4e-3, _sophia),
    "Somax AdaHessian": Contestant(
        "somax.adahessian(learning_rate=rate)", 0.1, _somax_adahessian, only=WITHOUT_STATISTICS
    ),
    "AdaHessian": adahessian("curvax.adahessian(rate)"),
    "AdaHessian, interval 10": adahessian(
        "curvax.adahessian(rate, update_interval=10, refresh_warmup=100)",
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov": adahessian("curvax.adahessian(rate, nesterov=True)", nesterov=True),
    "AdaHessian, Nesterov, interval 10": adahessian(
        "curvax.adahessian(rate, nesterov=True, update_interval=10, refresh_warmup=100)",
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov, gradients clipped, interval 10": adahessian(
        "chain(clip_by_global_norm(1.0), curvax.adahessian(rate, nesterov=True, "
        "update_interval=10, refresh_warmup=100))",
        clip_norm=1.0,
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov, zeros skipped": adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True)",
        skip_zeros=True,
        nesterov=True,
    ),
    "AdaHessian, Nesterov, zeros skipped, interval 10": adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True, update_interval=10, "
        "refresh_warmup=100)",
        skip_zeros=True,
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "Gauss-Newton diagonal": gauss_newton(
        "curvax.adahessian(rate), value_grad_and_ggn_diag_from_outputs"
    ),
    "Gauss-Newton diagonal, Nesterov, zeros skipped": gauss_newton(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True), from outputs",
        skip_zeros=True,
        nesterov=True,
    ),
    "M-FAC": mfac(f"curvax.mfac(rate, {WINDOW})"),
    "M-FAC, momentum before": mfac(f"chain(ema(0.9), curvax.mfac(rate, {WINDOW}))", before=0.9),
    "M-FAC, sparse": mfac(
        f"chain(ema(0.9), curvax.mfac(rate, {WINDOW}, density=0.05))", before=0.9, density=0.05
    ),
    "M-FAC, relative, Nesterov": relative_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.1, window_scaling='relative'))",
        damping=0.1,
    ),
    "M-FAC, relative, Nesterov, sparse": relative_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.1, density=0.05, relative))",
        damping=0.1,
        density=0.05,
    ),
}
