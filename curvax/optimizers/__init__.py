"""Optax gradient transformations that use curvature."""

from curvax.optimizers._accumulation import (
    AccumulateHessianDiagState,
    accumulate_hessian_diag,
)
from curvax.optimizers._adahessian import (
    ScaleByAdaHessianState,
    adahessian,
    scale_by_adahessian,
)
from curvax.optimizers._averaging import Block
from curvax.optimizers._curvature_input import merge_masked
from curvax.optimizers._hutchinson_estimator import (
    HutchinsonEstimatorState,
    hutchinson_estimator,
)
from curvax.optimizers._shardings import state_shardings

__all__ = [
    "AccumulateHessianDiagState",
    "Block",
    "HutchinsonEstimatorState",
    "ScaleByAdaHessianState",
    "accumulate_hessian_diag",
    "adahessian",
    "hutchinson_estimator",
    "merge_masked",
    "scale_by_adahessian",
    "state_shardings",
]
