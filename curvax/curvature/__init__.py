"""The Hessian side: products of a loss's curvature with vectors.

Plain functions of a loss; nothing here depends on Optax.
"""

from curvax.curvature._batch_loss import WeightedTargets
from curvax.curvature._diagonal import value_grad_and_hessian_diag
from curvax.curvature._from_state import (
    from_state,
    value_grad_and_hessian_diag_from_state,
)
from curvax.curvature._gauss_newton import fisher_vp, ggn_vp
from curvax.curvature._gauss_newton_diag import (
    value_grad_and_ggn_diag,
    value_grad_and_ggn_diag_from_outputs,
)
from curvax.curvature._hutchinson import (
    DiagEstimate,
    TraceEstimate,
    hessian_diag,
    hessian_trace,
)
from curvax.curvature._losses import (
    OutputLoss,
    convex_loss,
    softmax_cross_entropy,
    squared_error,
)
from curvax.curvature._nnx import for_nnx
from curvax.curvature._probes import random_probe
from curvax.curvature._products import hvp, linearized_hvp, value_grad_and_hvp
from curvax.curvature._refresh import RefreshState, refresh_due

__all__ = [
    "DiagEstimate",
    "OutputLoss",
    "RefreshState",
    "TraceEstimate",
    "WeightedTargets",
    "convex_loss",
    "fisher_vp",
    "for_nnx",
    "from_state",
    "ggn_vp",
    "hessian_diag",
    "hessian_trace",
    "hvp",
    "linearized_hvp",
    "random_probe",
    "refresh_due",
    "softmax_cross_entropy",
    "squared_error",
    "value_grad_and_ggn_diag",
    "value_grad_and_ggn_diag_from_outputs",
    "value_grad_and_hessian_diag",
    "value_grad_and_hessian_diag_from_state",
    "value_grad_and_hvp",
]
