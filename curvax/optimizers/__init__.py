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
from curvax.optimizers._shardings import state_shardings

__all__ = [
    "AccumulateHessianDiagState",
    "Block",
    "HutchinsonEstimatorState",
    "ScaleByAdaHessianState",
    "ScaleByMfacState",
    "accumulate_hessian_diag",
    "adahessian",
    "averaging_table",
    "hutchinson_estimator",
    "merge_masked",
    "mfac",
    "mfac_ihvp",
    "scale_by_adahessian",
    "scale_by_mfac",
    "state_bytes",
    "state_shardings",
]
