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
from curvax.optimizers._averaging import Block, averaging_table
from curvax.optimizers._curvature_input import merge_masked
from curvax.optimizers._hutchinson_estimator import (
    HutchinsonEstimatorState,
    hutchinson_estimator,
)
from curvax.optimizers._memory import state_bytes
from curvax.optimizers._mfac import ScaleByMfacState, mfac, scale_by_mfac
from curvax.optimizers._mfac_ihvp import mfac_ihvp
from curvax.optimizers._natural_gradient import (
    ScaleByNaturalGradientState,
    natural_gradient,
    scale_by_natural_gradient,
)
from curvax.optimizers._shardings import state_shardings
from curvax.optimizers._without_curvature import without_curvature

__all__ = [
    "AccumulateHessianDiagState",
    "Block",
    "HutchinsonEstimatorState",
    "ScaleByAdaHessianState",
    "ScaleByMfacState",
    "ScaleByNaturalGradientState",
    "accumulate_hessian_diag",
    "adahessian",
    "averaging_table",
    "hutchinson_estimator",
    "merge_masked",
    "mfac",
    "mfac_ihvp",
    "natural_gradient",
    "scale_by_adahessian",
    "scale_by_mfac",
    "scale_by_natural_gradient",
    "state_bytes",
    "state_shardings",
    "without_curvature",
]
