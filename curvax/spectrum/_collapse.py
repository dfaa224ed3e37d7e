r"""Neural collapse: how far the last layer's features are from a single point per class."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class NeuralCollapse(NamedTuple):
    r"""The four measures of neural collapse, each zero where it is complete.

    Attributes:
      within: NC1, $\operatorname{tr}(\Sigma_W \Sigma_B^+) / C$, the spread of features within
        classes over that of class means.
      norms: NC2, the standard deviation of the lengths of centered class means, divided by their
        mean.
      angles: NC2, the mean of $|\cos(m_c, m_d) + 1 / (C - 1)|$ over pairs of classes: the deviation
        from the angles of a simplex.
      duality: NC3, $\lVert W / \lVert W \rVert_F - M / \lVert M \rVert_F \rVert_F^2$, the
        difference of the classifier's rows and the centered class means; NaN without a classifier.
      nearest_mean: NC4, the fraction of examples that the classifier does not assign to the class
        with the nearest mean; NaN without a classifier.
    """

    within: float
    norms: float
    angles: float
    duality: float
    nearest_mean: float


def neural_collapse(
    features: ArrayLike,
    labels: ArrayLike,
    kernel: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> NeuralCollapse:
    r"""Measures neural collapse on the features of a data set.

    With $\mu_c$ the mean of the features of class $c$, $\mu$ the mean of the $\mu_c$, and $M$ the
    matrix of rows $m_c = \mu_c - \mu$,

    $$
    \Sigma_W = \frac1N \sum_n (h_n - \mu_{y_n})(h_n - \mu_{y_n})^T, \qquad
    \Sigma_B = \frac1C \sum_c m_c m_c^T .
    $$

    Each class counts equally in the global mean and $\Sigma_B$, however many examples it has; each
    example counts equally in $\Sigma_W$.

    Args:
      features: inputs of the last layer, of shape (N, d).
      labels: integer classes, of shape (N,), of which C occur. With ``kernel``, they are the
        indices of its columns, and all must occur.
      kernel: the last layer's, (d, C) as in Flax, for NC3 and NC4.
      bias: its bias, of shape (C,).

    Returns:
      The measures.

    Raises:
      ValueError: if shapes do not fit, features are not finite, there are fewer than two classes,
        a class mean equals the global mean, or ``kernel`` has a class that does not occur.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> corners = jnp.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
      >>> labels = jnp.array([0, 0, 1, 1, 2, 2])
      >>> measured = spectrum.neural_collapse(corners[labels], labels, 4 * corners.T)
      >>> print([round(value, 6) for value in measured])
      [0.0, 0.0, 0.0, 0.0, 0.0]

    References:
      Papyan, Han and Donoho, [Prevalence of neural collapse during the terminal phase of deep
      learning training](https://arxiv.org/abs/2008.08186), 2020. Their global mean is over
      examples, ours over classes; they differ only for classes of different sizes.
    """
    rows, classes = np.asarray(features, np.float64), np.asarray(labels)
    _check(rows, classes)
    names, members = np.unique(classes, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"at least two classes must occur in labels, got {names.tolist()}.")
    means = np.stack([rows[members == number].mean(axis=0) for number in range(len(names))])
    centered = means - means.mean(axis=0)
    lengths = np.linalg.norm(centered, axis=1)
    if not lengths.min() > 0:
        raise ValueError("a class mean equals the global mean: its angles are undefined.")
    residuals = rows - means[members]
    between_inverse = np.linalg.pinv(centered.T @ centered / len(names), hermitian=True)
    within = np.sum((residuals @ between_inverse) * residuals) / len(rows) / len(names)
    directions = centered / lengths[:, np.newaxis]
    cosines = (directions @ directions.T)[np.triu_indices(len(names), 1)]
    duality = nearest_mean = np.nan
    if kernel is not None:
        weights = np.asarray(kernel, np.float64)
        offsets = np.zeros(len(names)) if bias is None else np.asarray(bias, np.float64)
        _check_classifier(weights, offsets, rows, names)
        ours, theirs = (matrix / np.linalg.norm(matrix) for matrix in (weights.T, centered))
        duality = float(np.sum((ours - theirs) ** 2))
        distances = np.sum(means**2, axis=1) - 2 * rows @ means.T  # less that of the features
        chosen = np.argmax(rows @ weights + offsets, axis=1)
        nearest_mean = float(np.mean(chosen != np.argmin(distances, axis=1)))
    return NeuralCollapse(
        float(within),
        float(lengths.std() / lengths.mean()),
        float(np.mean(np.abs(cosines + 1 / (len(names) - 1)))),
        duality,
        nearest_mean,
    )


def _check(features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            "features must be of shape (N, d) and labels integers of shape (N,), got "
            f"{features.shape} and {labels.shape} of {labels.dtype}."
        )
    if not np.isfinite(features).all():
        raise ValueError("features must be finite.")


def _check_classifier(
    kernel: np.ndarray, bias: np.ndarray, features: np.ndarray, names: np.ndarray
) -> None:
    wanted = (features.shape[1], len(names))
    if kernel.shape != wanted or bias.shape != wanted[1:] or names.tolist() != [*range(len(names))]:
        raise ValueError(
            f"with classes {names.tolist()} in labels, kernel must have shape {wanted} and bias "
            f"{wanted[1:]}, got {kernel.shape} and {bias.shape}: all classes must occur, and "
            "Equinox's weight must be transposed."
        )
