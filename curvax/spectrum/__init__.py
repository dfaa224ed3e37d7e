"""The spectrum of a loss's curvature.

Operators, Lanczos, eigenpairs, densities and traces, a tracker of sharpness, learning rates from
spectra, the neural tangent kernel, losses along paths, slopes of single examples, and neural
collapse.
"""

from curvax.curvature._operator import Operator, check_symmetric
from curvax.curvature._operators import empirical_fisher_operator, ggn_operator, hessian_operator
from curvax.spectrum._alignment import kernel_alignment
from curvax.spectrum._collapse import NeuralCollapse, neural_collapse
from curvax.spectrum._density import SpectralDensity, spectral_density, wasserstein_distance
from curvax.spectrum._eigenpairs import Eigenpairs, top_eigenpairs
from curvax.spectrum._lanczos import Lanczos, lanczos
from curvax.spectrum._landscape import LossCurve, LossSurface, loss_along, loss_over_plane
from curvax.spectrum._ntk import KernelEigenpairs, ntk_eigenpairs, ntk_gram
from curvax.spectrum._plots import (
    plot_batch_sizes,
    plot_density,
    plot_layer_traces,
    plot_sharpness,
)
from curvax.spectrum._preconditioned import (
    adahessian_inverse_root,
    adam_inverse_root,
    mfac_inverse_root,
    preconditioned,
)
from curvax.spectrum._projections import ExampleProjections, example_projections
from curvax.spectrum._sharpness import TrackSharpnessState, track_sharpness
from curvax.spectrum._step_size import BatchSizeStudy, StepSizes, batch_size_study, step_sizes
from curvax.spectrum._trace import trace

__all__ = [
    "BatchSizeStudy",
    "Eigenpairs",
    "ExampleProjections",
    "KernelEigenpairs",
    "Lanczos",
    "LossCurve",
    "LossSurface",
    "NeuralCollapse",
    "Operator",
    "SpectralDensity",
    "StepSizes",
    "TrackSharpnessState",
    "adahessian_inverse_root",
    "adam_inverse_root",
    "batch_size_study",
    "check_symmetric",
    "empirical_fisher_operator",
    "example_projections",
    "ggn_operator",
    "hessian_operator",
    "kernel_alignment",
    "lanczos",
    "loss_along",
    "loss_over_plane",
    "mfac_inverse_root",
    "neural_collapse",
    "ntk_eigenpairs",
    "ntk_gram",
    "plot_batch_sizes",
    "plot_density",
    "plot_layer_traces",
    "plot_sharpness",
    "preconditioned",
    "spectral_density",
    "step_sizes",
    "top_eigenpairs",
    "trace",
    "track_sharpness",
    "wasserstein_distance",
]
