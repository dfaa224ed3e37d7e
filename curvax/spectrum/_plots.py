"""Plots of spectra on matplotlib axes, without global state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from curvax._extras import new_axes
from curvax._trees import named_leaves
from curvax.curvature._hutchinson import TraceEstimate
from curvax.spectrum._density import SpectralDensity
from curvax.spectrum._step_size import BatchSizeStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, GRAY = "#0072b2", "#d55e00", "0.5"


def plot_density(
    density: SpectralDensity,
    *,
    outliers: Sequence[float] | np.ndarray | None = None,
    log_x: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Plots the density on a logarithmic axis with its error band, the bulk and the outliers.

    Args:
      density: the density.
      outliers: eigenvalues to mark, for example those of `top_eigenpairs`.
      log_x: whether to use a symmetric logarithmic axis for eigenvalues, and to smooth the density
        on it.
      ax: axes of matplotlib; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> operator = spectrum.Operator(lambda v: jnp.arange(9.0) * v, jnp.zeros(9))
      >>> density = spectrum.spectral_density(operator, key=jax.random.key(0))
      >>> spectrum.plot_density(density, outliers=[8.0]).get_yscale()
      'log'
    """
    ax = ax or new_axes()
    if log_x:
        threshold = density.bandwidth
        places = [np.arcsinh(values / threshold) for values in density.nodes]
        low, high = min(map(np.min, places)), max(map(np.max, places))
        width = max(high - low, 1e-6) / 60
        grid = np.linspace(low - 4 * width, high + 4 * width, len(density.grid))
        curve = density._replace(nodes=places).smoothed(grid, width)
        ax.plot(threshold * np.sinh(grid), curve, color=BLUE)
        ax.set_xscale("symlog", linthresh=threshold)
        ax.set_ylabel("density of asinh(eigenvalue)")
    else:
        curve = density.density
        ax.plot(density.grid, curve, color=BLUE)
        lower = np.maximum(curve - 2 * density.standard_error, 1e-30)
        upper = curve + 2 * density.standard_error
        ax.fill_between(density.grid, lower, upper, color=BLUE, alpha=0.2, linewidth=0)
        ax.set_ylabel("density")
    ax.set_yscale("log")
    ax.set_ylim(max(curve.max() * 1e-7, 1e-12), curve.max() * 3)
    if outliers is not None:
        bottom = ax.get_ylim()[0]
        ax.plot(outliers, np.full(len(outliers), 1.5 * bottom), "|", color=RED, markersize=12)
    ax.set_xlabel("eigenvalue")
    ax.grid(alpha=0.3)
    return ax


def plot_sharpness(
    steps: Sequence[float],
    sharpness: Sequence[float],
    learning_rate: float | Sequence[float],
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Plots sharpness over steps, with the line $2 / \eta$ above which gradient descent is
    unstable.

    Args:
      steps: the steps.
      sharpness: the sharpness at each.
      learning_rate: a number, or one for each step.
      ax: axes of matplotlib; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> from curvax import spectrum
      >>> ax = spectrum.plot_sharpness([0, 1, 2], [5.0, 15.0, 20.0], 0.1)
      >>> ax.get_xlabel()
      'step'
    """
    ax = ax or new_axes()
    ax.plot(steps, sharpness, color=BLUE, label="sharpness")
    edge = 2 / np.broadcast_to(np.asarray(learning_rate, float), np.shape(steps))
    ax.plot(steps, edge, color=RED, linestyle="--", label="2 / learning rate")
    ax.set_xlabel("step")
    ax.set_ylabel("largest eigenvalue")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def plot_layer_traces(trace: TraceEstimate[Any], *, ax: "Axes | None" = None) -> "Axes":
    """Plots the trace of each leaf's diagonal block as bars with standard errors.

    Args:
      trace: what `trace` or `curvax.hessian_trace` returned.
      ax: axes of matplotlib; by default those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if the trace has no values per leaf.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax import spectrum
      >>> def loss(params):
      ...     return jnp.sum(params["first"] ** 2) + jnp.sum(params["second"] ** 4)
      >>> params = {"first": jnp.ones(2), "second": jnp.ones(3)}
      >>> trace = curvax.hessian_trace(loss, params, method="exact")
      >>> [
      ...     float(bar.get_width())
      ...     for bar in spectrum.plot_layer_traces(trace).patches
      ... ]
      [4.0, 36.0]
    """
    if trace.per_leaf is None:
        raise ValueError('the trace has no values per leaf: use method="hutchinson".')
    ax = ax or new_axes()
    names, values = zip(*named_leaves(trace.per_leaf), strict=True)
    errors = np.nan_to_num([float(x) for x in jax.tree.leaves(trace.per_leaf_standard_error)])
    ax.barh(names, [float(value) for value in values], xerr=errors, color=BLUE, ecolor=GRAY)
    ax.invert_yaxis()
    ax.set_xlabel("trace of the diagonal block")
    return ax


def plot_batch_sizes(study: BatchSizeStudy, *, ax: "Axes | None" = None) -> "Axes":
    """Plots the ends of the batch Hessians' spectra against the batch size, with the full
    Hessian's.

    Args:
      study: what `batch_size_study` returned.
      ax: axes of matplotlib; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import numpy as np
      >>> from curvax import spectrum
      >>> ends = np.array([[4.0, 6.0], [3.0, 3.0]])
      >>> study = spectrum.BatchSizeStudy(np.array([8, 64]), ends, -ends, 2.5, -0.1)
      >>> spectrum.plot_batch_sizes(study).get_xscale()
      'log'
    """
    ax = ax or new_axes()
    rows = (
        (study.largest, study.full_largest, RED, "largest"),
        (study.smallest, study.full_smallest, BLUE, "smallest"),
    )
    for values, full, color, name in rows:
        ax.plot(study.batch_sizes, values, "o", color=color, alpha=0.35, markersize=4)
        ax.plot(study.batch_sizes, values.mean(axis=1), color=color, label=f"{name}, of a batch")
        ax.axhline(full, color=color, linestyle=":", label=f"{name}, of all examples")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("batch size")
    ax.set_ylabel("eigenvalue")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    return ax
