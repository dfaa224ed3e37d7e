"""Second-order optimization for Optax.

Optimizers: `adahessian`, `mfac`, `natural_gradient`, and transformations to chain with them.
Curvature of a loss: products, diagonals and traces of its Hessian, Gauss-Newton and Fisher
matrices, most of them computed with value and gradient in one pass. The inverse empirical Fisher
matrix of given gradients: `inverse_fisher`. Optimal Brain Surgeon with it: `curvax.pruning`. Data
attribution by influence functions: `curvax.influence`. The spectrum of a loss's curvature:
`curvax.spectrum`.
"""

from curvax import influence, pruning, spectrum
from curvax._layouts import KernelLayout
from curvax.curvature import (
    DiagEstimate,
    OutputLoss,
    RefreshState,
    TraceEstimate,
    WeightedTargets,
    convex_loss,
    fisher_vp,
    for_nnx,
    from_state,
    ggn_vp,
    hessian_diag,
    hessian_trace,
    hvp,
    linearized_hvp,
    random_probe,
    refresh_due,
    softmax_cross_entropy,
    squared_error,
    value_grad_and_ggn_diag,
    value_grad_and_ggn_diag_from_outputs,
    value_grad_and_hessian_diag,
    value_grad_and_hessian_diag_from_state,
    value_grad_and_hvp,
)
from curvax.fisher import inverse_fisher
from curvax.optimizers import (
    AccumulateHessianDiagState,
    Block,
    HutchinsonEstimatorState,
    ScaleByAdaHessianState,
    ScaleByMfacState,
    ScaleByNaturalGradientState,
    accumulate_hessian_diag,
    adahessian,
    averaging_table,
    hutchinson_estimator,
    merge_masked,
    mfac,
    mfac_ihvp,
    natural_gradient,
    scale_by_adahessian,
    scale_by_mfac,
    scale_by_natural_gradient,
    state_bytes,
    state_shardings,
    without_curvature,
)

__version__ = "0.1.0"

__all__ = [
    "AccumulateHessianDiagState",
    "Block",
    "DiagEstimate",
    "HutchinsonEstimatorState",
    "KernelLayout",
    "OutputLoss",
    "RefreshState",
    "ScaleByAdaHessianState",
    "ScaleByMfacState",
    "ScaleByNaturalGradientState",
    "TraceEstimate",
    "WeightedTargets",
    "accumulate_hessian_diag",
    "adahessian",
    "averaging_table",
    "convex_loss",
    "fisher_vp",
    "for_nnx",
    "from_state",
    "ggn_vp",
    "hessian_diag",
    "hessian_trace",
    "hutchinson_estimator",
    "hvp",
    "influence",
    "inverse_fisher",
    "linearized_hvp",
    "merge_masked",
    "mfac",
    "mfac_ihvp",
    "natural_gradient",
    "pruning",
    "random_probe",
    "refresh_due",
    "scale_by_adahessian",
    "scale_by_mfac",
    "scale_by_natural_gradient",
    "softmax_cross_entropy",
    "spectrum",
    "squared_error",
    "state_bytes",
    "state_shardings",
    "value_grad_and_ggn_diag",
    "value_grad_and_ggn_diag_from_outputs",
    "value_grad_and_hessian_diag",
    "value_grad_and_hessian_diag_from_state",
    "value_grad_and_hvp",
    "without_curvature",
]
