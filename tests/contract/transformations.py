"""Every public transformation, optimizer or not: a new one joins as one row.

A line search behind `curvax.without_curvature` is Optax's own and has tests of its own.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax
from curvax import pruning, spectrum

PyTree = Any
Loss = Callable[[PyTree], jax.Array]


class Transformation(NamedTuple):
    """A transformation, and what the tests must know of it.

    Attributes:
      name: what the tests are called by.
      make: makes it for ``params`` from numeric options.
      options: the numeric options that ``inject_hyperparams`` may turn into arrays.
      extra: the extra arguments of ``update`` for a loss at ``params``.
      flattens: whether ``optax.flatten`` may wrap it: it takes a diagonal, and nothing else like
        the params.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any] = MappingProxyType({})
    extra: Callable[[Loss, PyTree], dict[str, Any]] = lambda loss, params: {"obj_fn": loss}
    flattens: bool = False


def mask_of(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) > -0.5, params)


def adahessian(params, **options):
    del params
    return curvax.adahessian(**options)


def keep_pruned(params, **options):
    return pruning.keep_pruned(mask_of(params), curvax.adahessian(**options))


def prune_on_schedule(params, **options):
    """From the fourth step on a half of what is not a scalar is gone."""
    del params
    sparsity = optax.linear_schedule(0.0, 0.5, 4)
    return pruning.prune_on_schedule(
        sparsity,
        curvax.adahessian(learning_rate=0.1),
        update_interval=2,
        select=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating),
        **options,
    )


def track_sharpness(params, **options):
    del params
    return spectrum.track_sharpness(**options, update_interval=2, num_matvecs=2)


def mfac(params, **options):
    del params
    return curvax.mfac(**options, num_grads=3)


def natural_gradient(params, **options):
    del params
    return curvax.natural_gradient(**options, micro_batch_size=2)


def three_residuals(loss, params):
    """Three multiples of a loss, as the residuals of three examples."""
    del params
    return {
        "outputs_fn": lambda params, factors: factors * loss(params),
        "batch": jnp.arange(1.0, 4),
    }


RATE = {"learning_rate": 0.1}
INTERVAL = {**RATE, "update_interval": 3, "refresh_warmup": 2, "clip_threshold": 0.5}

TRANSFORMATIONS = (
    Transformation("adahessian", adahessian, RATE, flattens=True),
    Transformation("adahessian-interval", adahessian, INTERVAL, flattens=True),
    Transformation(
        "adahessian-nesterov", lambda p, **o: adahessian(p, nesterov=True, **o), RATE, flattens=True
    ),
    Transformation(
        "adahessian-skip-zeros",
        lambda p, **o: adahessian(p, skip_zeros=True, **o),
        RATE,
        flattens=True,
    ),
    Transformation("mfac", mfac, {**RATE, "damping": 0.1}, flattens=True),
    Transformation(
        "natural_gradient",
        natural_gradient,
        {**RATE, "damping": 0.1, "momentum": 0.5},
        three_residuals,
    ),
    Transformation("keep_pruned", keep_pruned, RATE),
    Transformation("keep_pruned-alone", lambda p: pruning.keep_pruned(mask_of(p))),
    Transformation("prune_on_schedule", prune_on_schedule),
    Transformation("prune_on_schedule-random", lambda p: prune_on_schedule(p, method="random")),
    Transformation("track_sharpness", track_sharpness, RATE),
    Transformation(
        "track_sharpness-outside",
        lambda p, **o: spectrum.track_sharpness(**o, from_outside=True),
        RATE,
        lambda loss, params: {"sharpness": 2.0},
    ),
    Transformation(
        "accumulate_hessian_diag",
        lambda p, **o: curvax.accumulate_hessian_diag(**o),
        {"every_k": 2},
    ),
    Transformation(
        "hutchinson_estimator",
        lambda p, **o: curvax.hutchinson_estimator(**o),
        {"num_probes": 2},
    ),
)


def parametrized(rows: list[Transformation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


every_transformation = parametrized(list(TRANSFORMATIONS))
every_one_with_options = parametrized([row for row in TRANSFORMATIONS if row.options])
every_one_that_flattens = parametrized([row for row in TRANSFORMATIONS if row.flattens])
