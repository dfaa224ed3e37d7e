"""Optimizers at published settings: ResNet-20 on CIFAR-10, whose rates were searched for before."""

import optax

import curvax
from training import steppers
from training.optimizers import Contestant
from training.steppers import Schedule, Stepper
from training.tasks.task import Task

DECAY = 5e-4


def _sgd(task: Task, rate: Schedule) -> Stepper:
    decayed = optax.add_decayed_weights(DECAY)
    return steppers.first_order(task, optax.chain(decayed, optax.sgd(rate, momentum=0.9)))


def _adamw(task: Task, rate: Schedule) -> Stepper:
    return steppers.first_order(task, optax.adamw(rate, weight_decay=DECAY))


def _adahessian(task: Task, rate: Schedule) -> Stepper:
    tx = curvax.adahessian(rate, weight_decay=DECAY, clip_threshold=None)
    return steppers.with_hessian_diag(task, tx)


def _mfac(task: Task, rate: Schedule) -> Stepper:
    tx = optax.chain(optax.add_decayed_weights(3e-3), curvax.mfac(rate, 512, damping=1e-5))
    return steppers.first_order(task, tx)


PUBLISHED = {
    "SGD": Contestant("sgd(0.1, momentum=0.9), L2 5e-4", 0.1, _sgd),
    "AdaHessian": Contestant(
        "adahessian(0.15, weight_decay=5e-4, clip_threshold=None)", 0.15, _adahessian
    ),
    "AdamW": Contestant("adamw(0.01, weight_decay=5e-4)", 0.01, _adamw),
    "M-FAC": Contestant("mfac(1e-3, 512, damping=1e-5), L2 3e-3", 1e-3, _mfac),
}
