"""Learning rate and momentum from a spectrum, and how its ends depend on the batch size."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import as_key, check_count, check_range
from curvax._progress import progress_bar
from curvax._trees import PyTree
from curvax.curvature._batches import num_examples, parts
from curvax.curvature._modes import Mode
from curvax.curvature._operators import hessian_operator
from curvax.spectrum._eigenpairs import top_eigenpairs


class StepSizes(NamedTuple):
    r"""Settings of gradient descent on a quadratic with eigenvalues in $[\mu, L]$.

    Attributes:
      largest_stable: $2 / L$, above which gradient descent diverges.
      gradient_descent: $2 / (L + \mu)$, the fastest for gradient descent.
      heavy_ball: $4 / (\sqrt L + \sqrt\mu)^2$, the fastest with momentum.
      momentum: $\left((\sqrt L - \sqrt\mu) / (\sqrt L + \sqrt\mu)\right)^2$, that momentum.
    """

    largest_stable: float
    gradient_descent: float
    heavy_ball: float
    momentum: float


def step_sizes(largest: float, smallest: float = 0.0) -> StepSizes:
    r"""Learning rate and momentum for gradient descent, from the ends of a spectrum.

    Args:
      largest: $L$, the largest eigenvalue, positive.
      smallest: $\mu$, the smallest that matters, in $[0, L]$. Networks have a bulk at zero and
        negative eigenvalues; the edge of the bulk, or a quantile of the density, is a sensible
        choice.

    Returns:
      The settings; with $\mu = 0$ the momentum is 1 and no rate is optimal.

    Raises:
      ValueError: if the ends are not in order.

    Example:
      >>> from curvax import spectrum
      >>> sizes = spectrum.step_sizes(9.0, 1.0)
      >>> print(sizes.gradient_descent, sizes.heavy_ball, sizes.momentum)
      0.2 0.25 0.25

    References:
      Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    """
    check_range("largest", largest, low=0.0, open_low=True)
    check_range("smallest", smallest, low=0.0, high=largest)
    root_l, root_mu = float(np.sqrt(largest)), float(np.sqrt(smallest))
    return StepSizes(
        2 / largest,
        2 / (largest + smallest),
        4 / (root_l + root_mu) ** 2,
        ((root_l - root_mu) / (root_l + root_mu)) ** 2,
    )


class BatchSizeStudy(NamedTuple):
    """Extremal eigenvalues of batch Hessians and of the full Hessian.

    Attributes:
      batch_sizes: of shape (b,).
      largest: of shape (b, num_draws), the largest eigenvalue of each batch's Hessian.
      smallest: the smallest, of the same shape.
      full_largest: the largest eigenvalue over all examples.
      full_smallest: the smallest.
    """

    batch_sizes: np.ndarray
    largest: np.ndarray
    smallest: np.ndarray
    full_largest: float
    full_smallest: float


def batch_size_study(
    loss_fn: Callable[..., Any],
    params: PyTree,
    examples: tuple[Any, ...],
    batch_sizes: Sequence[int],
    *,
    key: jax.Array | int,
    num_draws: int = 4,
    micro_batch_size: int | None = None,
    tolerance: float = 1e-3,
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    progress: bool = False,
) -> BatchSizeStudy:
    r"""Measures how the ends of the Hessian's spectrum depend on the batch size.

    A batch Hessian is the full one plus noise, which pushes the largest eigenvalue up and the
    smallest down. Spiked models of random-matrix theory predict by how much, and so how the
    learning rate should grow with the batch size.

    Args:
      loss_fn: ``loss_fn(params, *examples) -> loss``, the mean over examples.
      params: the parameters.
      examples: the arguments, arrays with all examples along the first axis.
      batch_sizes: the sizes to try, at most the number of examples.
      key: a PRNG key for batches and start vectors, or an integer seed.
      num_draws: the number of random batches of each size.
      micro_batch_size: the number of examples per product with the full Hessian; all by default.
      tolerance: of the eigenvalues, as in `top_eigenpairs`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.
      mode: how to compute products; see `curvax.value_grad_and_hvp`.
      progress: whether a progress bar is shown.

    Returns:
      The eigenvalues; `plot_batch_sizes` draws them.

    Raises:
      ValueError: if a batch size is larger than the data, or the first axes of examples disagree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> inputs = jax.random.normal(jax.random.key(0), (64, 3))
      >>> def loss_fn(params, inputs):
      ...     return jnp.mean((inputs @ params) ** 2)
      >>> study = spectrum.batch_size_study(
      ...     loss_fn, jnp.zeros(3), (inputs,), [4, 32], key=jax.random.key(1)
      ... )
      >>> # Small batches are sharper.
      >>> bool(study.largest[0].mean() > study.largest[1].mean())
      True

    References:
      Granziol, Zohren and Roberts, [Learning rates as a function of batch size: a random matrix
      theory approach](https://arxiv.org/abs/2006.09092), 2022.
    """
    check_count("num_draws", num_draws)
    if micro_batch_size is not None:
        check_count("micro_batch_size", micro_batch_size)
    number = num_examples(examples, "close over what has no examples")
    if not number:
        raise ValueError("examples are empty: the study needs at least one.")
    for size in batch_sizes:
        check_count("each of batch_sizes", size)
        if size > number:
            raise ValueError(f"batch_sizes must be at most the {number} examples, got {size}.")

    def ends(batches: list[Any], end_key: jax.Array) -> tuple[float, float]:
        operator = hessian_operator(
            loss_fn, params, batches, has_aux=has_aux, mode=mode, check_deterministic=False
        )
        k = min(2, operator.size)
        pairs = top_eigenpairs(operator, k, key=end_key, which="both", tolerance=tolerance)
        return float(pairs.values[0]), float(pairs.values[-1])

    pieces = [part for part, _ in parts(examples, micro_batch_size or number)]
    key = as_key(key)
    full = ends(pieces, key)
    found = np.empty((2, len(batch_sizes), num_draws))
    with progress_bar(len(batch_sizes) * num_draws, "batches", progress) as advance:
        for row, size in enumerate(batch_sizes):
            for draw in range(num_draws):
                part_key = jax.random.fold_in(jax.random.fold_in(key, row), draw)
                chosen = jax.random.choice(part_key, number, (size,), replace=False)
                batch = jax.tree.map(lambda x, c=chosen: x[c] if jnp.ndim(x) else x, examples)
                found[:, row, draw] = ends([batch], part_key)
                advance()
    return BatchSizeStudy(np.asarray(batch_sizes), found[0], found[1], *full)
