"""The contestants: each has one learning rate to be searched for, and fixed other settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import curvax
from training import candidates, steppers
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
      family: ``"Adam"`` for those that set the target, else ``""``.
      only: the tasks that it can run on; None for all.
    """

    words: str
    start: float
    make: Callable[[Task, Schedule], Stepper]
    family: str = ""
    only: tuple[str, ...] | None = None


def _first_order(
    words: str, start: float, make: Callable[..., Any], family: str = ""
) -> Contestant:
    return Contestant(
        words, start, lambda task, rate: steppers.first_order(task, make(rate)), family
    )


def _adahessian(
    words: str, *, start: float = 0.3, radius: float = 0.0, **options: Any
) -> Contestant:
    interval, warmup = (options.get(key, 0) for key in ("update_interval", "refresh_warmup"))

    def make(task: Task, rate: Schedule) -> Stepper:
        tx = curvax.adahessian(rate, **options)
        return steppers.with_hessian_diag(task, tx, interval or 1, warmup, radius)

    return Contestant(words, start, make)


def _ggn(words: str, *, start: float = 0.03, **options: Any) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        return steppers.with_ggn_diag(task, curvax.adahessian(rate, **options))

    return Contestant(words, start, make)


def _mfac(
    words: str, *, before: float = 0.0, start: float = 0.05 / WINDOW, **options: Any
) -> Contestant:
    def make(rate: Schedule) -> Any:
        tx = curvax.mfac(rate, WINDOW, **options)
        return optax.chain(optax.ema(before), tx) if before else tx

    return _first_order(words, start, make)


def _nesterov_mfac(words: str, **options: Any) -> Contestant:
    def make(rate: Schedule) -> Any:
        tx = curvax.mfac(rate, WINDOW, window_scaling="relative", **options)
        return optax.chain(optax.trace(0.9, nesterov=True), tx)

    return _first_order(words, 0.1, make)


def _somax(
    words: str, name: str, start: float, only: tuple[str, ...], **options: Any
) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        import somax  # optional

        method = name
        if name.endswith("_"):
            method += "ce" if task.loss.takes_labels else "mse"
        return steppers.of_somax(task, getattr(somax, method), learning_rate=rate, **options)

    return Contestant(words, start, make, only=only)


def _sophia(task: Task, rate: Schedule) -> Stepper:
    return steppers.with_function(task, optax.contrib.sophia(rate))


def _sassha(words: str, *, start: float, radius: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = candidates.root_of_absolute(curvax.adahessian(rate, nesterov=True))
        return steppers.with_hessian_diag(task, tx, radius=radius)

    return Contestant(words, start, make)


def _relative_eps(words: str, eps: float) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        tx = candidates.relative_eps(rate, eps, nesterov=True)
        return steppers.with_hessian_diag(task, tx)

    return Contestant(words, 0.3, make)


def _relative_mfac(words: str, *, start: float, damping: float, power: float) -> Contestant:
    def make(rate: Schedule) -> Any:
        scaling = candidates.scale_by_relative_mfac(WINDOW, damping, power)
        return optax.chain(optax.ema(0.9), scaling, optax.scale_by_learning_rate(rate))

    return _first_order(words, start, make)


def _natural(words: str, start: float, **options: Any) -> Contestant:
    def make(task: Task, rate: Schedule) -> Stepper:
        return candidates.natural_gradient(task, optax.sgd(rate, momentum=0.9), **options)

    return Contestant(
        words, start, make, only=("fashion-mlp", "fashion-cnn", "clicks", "poisson", "burgers")
    )


IN_SOMAX = ("fashion-mlp", "fashion-cnn", "clicks", "shakespeare", "poisson", "burgers")
ONE_OUTPUT = ("fashion-mlp", "fashion-cnn", "clicks", "poisson", "burgers")

CONTESTANTS = {
    "SGD": _first_order(
        "optax.sgd(rate, momentum=0.9)", 0.1, lambda rate: optax.sgd(rate, momentum=0.9)
    ),
    "Adam": _first_order("optax.adam(rate)", 4e-3, optax.adam, "Adam"),
    "AdamW": _first_order(
        f"optax.adamw(rate, weight_decay={DECAY})",
        4e-3,
        lambda rate: optax.adamw(rate, weight_decay=DECAY),
        "Adam",
    ),
    "NAdamW": _first_order(
        f"optax.nadamw(rate, weight_decay={DECAY})",
        4e-3,
        lambda rate: optax.nadamw(rate, weight_decay=DECAY),
        "Adam",
    ),
    "Muon": _first_order("optax.contrib.muon(rate)", 0.02, optax.contrib.muon),
    "Sophia": Contestant("optax.contrib.sophia(rate)", 4e-3, _sophia),
    "Somax AdaHessian": _somax("somax.adahessian(learning_rate=rate)", "adahessian", 0.1, IN_SOMAX),
    "Somax Gauss-Newton": _somax("somax.egn_*(learning_rate=rate)", "egn_", 0.3, ONE_OUTPUT),
    "AdaHessian": _adahessian("curvax.adahessian(rate)"),
    "AdaHessian, interval 10": _adahessian(
        "curvax.adahessian(rate, update_interval=10, refresh_warmup=100)",
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov": _adahessian("curvax.adahessian(rate, nesterov=True)", nesterov=True),
    "AdaHessian, skipping zeros, Nesterov": _adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True)", skip_zeros=True, nesterov=True
    ),
    "AdaHessian, skipping zeros, Nesterov, interval 10": _adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True, update_interval=10, "
        "refresh_warmup=100)",
        skip_zeros=True,
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "Gauss-Newton diagonal": _ggn("curvax.adahessian(rate), value_grad_and_ggn_diag_from_outputs"),
    "Gauss-Newton diagonal, skipping zeros, Nesterov": _ggn(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True), from outputs",
        skip_zeros=True,
        nesterov=True,
    ),
    "M-FAC": _mfac(f"curvax.mfac(rate, {WINDOW})"),
    "M-FAC, momentum before": _mfac(f"chain(ema(0.9), curvax.mfac(rate, {WINDOW}))", before=0.9),
    "M-FAC, sparse": _mfac(
        f"chain(ema(0.9), curvax.mfac(rate, {WINDOW}, density=0.05))", before=0.9, density=0.05
    ),
    "M-FAC, relative, Nesterov": _nesterov_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.1, window_scaling='relative'))",
        damping=0.1,
    ),
    "M-FAC, relative, Nesterov, sparse": _nesterov_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.1, density=0.05, relative))",
        damping=0.1,
        density=0.05,
    ),
}

CANDIDATES = {
    "AdaHessian, Nesterov, no clip": _adahessian(
        "curvax.adahessian(rate, nesterov=True, clip_threshold=None)",
        nesterov=True,
        clip_threshold=None,
    ),
    "AdaHessian, Nesterov, interval 10": _adahessian(
        "curvax.adahessian(rate, nesterov=True, update_interval=10, refresh_warmup=100)",
        nesterov=True,
        update_interval=10,
        refresh_warmup=100,
    ),
    "AdaHessian, Nesterov, interval 10, cold": _adahessian(
        "curvax.adahessian(rate, nesterov=True, update_interval=10)",
        nesterov=True,
        update_interval=10,
    ),
    "AdaHessian, Nesterov, sharpness-aware": _adahessian(
        "curvax.adahessian(rate, nesterov=True) at a radius of 0.05", nesterov=True, radius=0.05
    ),
    "SASSHA": _sassha("root of the mean of |D| at a radius of 0.05", start=0.05, radius=0.05),
    "AdaHessian, root": _sassha("root of the mean of |D|", start=0.05, radius=0.0),
    "AdaHessian, Nesterov, eps .1 of the leaf": _relative_eps("relative eps 0.1", 0.1),
    "AdaHessian, Nesterov, eps .01 of the leaf": _relative_eps("relative eps 0.01", 0.01),
    "Gauss-Newton diagonal, Nesterov": _ggn(
        "curvax.adahessian(rate, nesterov=True), value_grad_and_ggn_diag_from_outputs",
        nesterov=True,
    ),
    "AdaHessian, skipping zeros": _adahessian(
        "curvax.adahessian(rate, skip_zeros=True)", skip_zeros=True
    ),
    "AdaHessian, skipping zeros, Nesterov, interval 10, cold": _adahessian(
        "curvax.adahessian(rate, skip_zeros=True, nesterov=True, update_interval=10)",
        skip_zeros=True,
        nesterov=True,
        update_interval=10,
    ),
    "M-FAC, relative, Newton's units": _relative_mfac(
        "relative damping 0.1, power 0", start=0.05, damping=0.1, power=0.0
    ),
    "M-FAC, relative, scale-free": _relative_mfac(
        "relative damping 0.1, power 0.5", start=0.05, damping=0.1, power=0.5
    ),
    "M-FAC, relative, gradient's units": _relative_mfac(
        "relative damping 0.1, power 1", start=0.05, damping=0.1, power=1.0
    ),
    "M-FAC, relative, 0.01": _relative_mfac(
        "relative damping 0.01, power 0.5", start=0.05, damping=0.01, power=0.5
    ),
    "M-FAC, relative, Nesterov, 0.01": _nesterov_mfac(
        f"chain(trace(0.9, nesterov=True), mfac(rate, {WINDOW}, 0.01, window_scaling='relative'))",
        damping=0.01,
    ),
    "natural gradient, iEF": _natural("iEF of the batch, relative damping 0.1", 0.1),
    "natural gradient, EF": _natural("EF of the batch, relative damping 0.1", 0.1, improved=False),
}
