"""The table of optimizers under contract: a new one joins as one row of `ROWS`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax
import pytest

import curvax


class Trial(NamedTuple):
    """How a row is tried on a target: the number of steps, and options in place of its own."""

    steps: int
    options: Mapping[str, Any]


def trials(quadratic: Trial, rosenbrock: Trial) -> Mapping[str, Trial]:
    names = ("parabola", "matrix_parabola", "mixed_tree")
    return MappingProxyType(dict.fromkeys(names, quadratic) | {"rosenbrock": rosenbrock})


NEWTON_LIKE = trials(
    quadratic=Trial(200, {"learning_rate": 0.5}),
    rosenbrock=Trial(1000, {"learning_rate": 0.15, "hessian_power": 0.5}),
)


class Row(NamedTuple):
    """An optimizer, and what the tests must know of it.

    Attributes:
      name: what the tests are called by.
      factory: makes the optimizer from ``options``.
      options: keyword arguments of ``factory``.
      trials: the settings of the convergence tests, by the target's name.
      static_args: the options that ``optax.inject_hyperparams`` must not trace.
      takes_curvature: whether ``update`` needs ``hessian_diag`` or ``obj_fn``.
      largest_sum: the size of the largest array that an update on a mesh may sum over devices;
        nothing may be gathered.
      variant: whether it differs from another row in formulas only, so that the tests of
        wrappers can leave it out.
      compressed: whether it keeps leaves in a shape that is not their parameter's.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]
    trials: Mapping[str, Trial] = NEWTON_LIKE
    static_args: tuple[str, ...] = ()
    takes_curvature: bool = True
    largest_sum: int = 1
    variant: bool = False
    compressed: bool = False

    def make(self, **options: Any) -> optax.GradientTransformation:
        return self.factory(**{**self.options, **options})

    def from_function(self, loss: Callable[[Any], jax.Array]) -> dict[str, Any]:
        """The extra arguments that feed it from a loss ``params -> scalar``."""
        return {"obj_fn": loss} if self.takes_curvature else {}

    def from_diag(self, diag: Any) -> dict[str, Any]:
        """The extra arguments that feed it from a diagonal."""
        return {"hessian_diag": diag} if self.takes_curvature else {}


def adahessian(name: str, *, variant: bool = True, **options: Any) -> Row:
    return Row(name, curvax.adahessian, {"learning_rate": 0.1, **options}, variant=variant)


# The decay moves the minimum, along Rosenbrock's valley most.
WEAK_DECAY = trials(
    NEWTON_LIKE["parabola"],
    Trial(1000, {"learning_rate": 0.15, "hessian_power": 0.5, "weight_decay": 1e-6}),
)
WINDOW = 8


def mfac(name: str, **options: Any) -> Row:
    """A short window; its sizes, and whether there is an average, fix the state's shape."""
    options = {"learning_rate": 0.1, "num_grads": WINDOW, "damping": 0.1, **options}
    row = Row(name, curvax.mfac, options, NATURAL, ("num_grads", "density", "momentum"))
    return row._replace(takes_curvature=False, largest_sum=4 * WINDOW)


# With a damping well above the squared gradients near a minimum, a step there is the gradient
# times learning_rate / damping.
NATURAL = trials(
    quadratic=Trial(1000, {"learning_rate": 0.5, "damping": 1.0}),
    rosenbrock=Trial(20000, {"learning_rate": 0.001, "damping": 1.0}),
)
# Entries wait for their turn in the error feedback, so the step is shorter.
PATIENT = trials(Trial(4000, {"learning_rate": 0.05, "damping": 1.0}), NATURAL["rosenbrock"])
# A control: what the tests ask, Optax's own optimizers give.
ADAM = trials(Trial(300, {"learning_rate": 0.3}), Trial(2000, {"learning_rate": 0.05}))

ROWS = (
    adahessian("adahessian", variant=False),
    adahessian("adahessian-power-0.5-none", hessian_power=0.5, averaging="none"),
    adahessian("adahessian-interval-5-probes-2", update_interval=5, num_probes=2, variant=False),
    # The mean along a sharded axis is a sum of as many numbers as the kernel has columns.
    adahessian("adahessian-row", averaging="row")._replace(largest_sum=3),
    adahessian("adahessian-block", averaging="block"),
    adahessian("adahessian-published", averaging="paper", clip_threshold=None),
    adahessian("adahessian-skip-zeros", skip_zeros=True, nesterov=True),
    adahessian("adahessian-decay", weight_decay=1e-3)._replace(trials=WEAK_DECAY),
    mfac("mfac"),
    mfac("mfac-momentum-bfloat16", momentum=0.5, window_dtype="bfloat16")._replace(variant=True),
    mfac("mfac-sparse", density=0.25, window_scaling="filled")._replace(
        trials=PATIENT, variant=True, compressed=True
    ),
    mfac("mfac-relative", damping=0.1, window_scaling="relative")._replace(variant=True),
    Row("adam", optax.adam, {"learning_rate": 0.1}, ADAM, takes_curvature=False),
)


def parametrized(rows: tuple[Row, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


every_row = parametrized(ROWS)
every_kind = parametrized(tuple(row for row in ROWS if not row.variant))
# Where the layout of the state matters.
every_layout = parametrized(tuple(row for row in ROWS if row.compressed or not row.variant))
