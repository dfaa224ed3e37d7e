r"""The similarity of two kernels."""

import numpy as np
from jax.typing import ArrayLike


def kernel_alignment(first: ArrayLike, second: ArrayLike, *, centered: bool = True) -> float:
    r"""The cosine of the angle between two Gram matrices.

    $$
    A(K, L) = \frac{\langle K, L \rangle_F}{\lVert K \rVert_F \lVert L \rVert_F}
    $$

    It is 1 for matrices that differ only by a positive factor. With ``centered``, the means of rows
    and columns are subtracted first, $H K H$ with $H = I - 1 1^T / n$, so that a constant shared by
    all examples has no effect. The drift of a tangent kernel is one minus its alignment with the
    kernel at the start of training; its alignment with $y y^T$ says how well it fits the labels.

    Args:
      first: $K$, of shape (n, n), real and symmetric, such as `ntk_gram` returns.
      second: $L$, of the same shape.
      centered: whether to center both matrices.

    Returns:
      The alignment, from -1 to 1, and at least 0 for positive semi-definite matrices.

    Raises:
      ValueError: if the matrices are not square, not of the same shape or not finite, or one of
        them is zero (after centering, if ``centered``).

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> labels = jnp.array([1.0, 1.0, -1.0, -1.0])
      >>> kernel = jnp.eye(4) + jnp.outer(labels, labels)
      >>> round(spectrum.kernel_alignment(kernel, jnp.outer(labels, labels)), 4)
      0.9623

    References:
      Cristianini et al., [On kernel-target
      alignment](https://papers.nips.cc/paper/1946-on-kernel-target-alignment), 2001. Cortes, Mohri
      and Rostamizadeh, [Algorithms for learning kernels based on centered
      alignment](https://arxiv.org/abs/1203.0550), 2012, Definition 4.
    """
    matrices = [np.asarray(matrix, np.float64) for matrix in (first, second)]
    shapes = [matrix.shape for matrix in matrices]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        raise ValueError(f"the matrices must be square and of the same shape, got {shapes}.")
    if not all(np.isfinite(matrix).all() for matrix in matrices):
        raise ValueError("the matrices must be finite.")
    units = [_in_unit(matrix) for matrix in matrices]
    if centered:
        units = [_centered(matrix) for matrix in units]
    norms = [np.linalg.norm(matrix) for matrix in units]
    if not min(norms) > 1e-13:  # of matrices whose largest entry is one
        raise ValueError("a matrix is zero (after centering, if centered): its angle is undefined.")
    return float(np.sum(units[0] / norms[0] * (units[1] / norms[1])))


def _in_unit(matrix: np.ndarray) -> np.ndarray:
    """Divided by its largest entry, so that no square overflows."""
    largest = np.max(np.abs(matrix), initial=0.0)
    return matrix / largest if largest else matrix


def _centered(matrix: np.ndarray) -> np.ndarray:
    rows = matrix - matrix.mean(axis=0, keepdims=True)
    return rows - rows.mean(axis=1, keepdims=True)
