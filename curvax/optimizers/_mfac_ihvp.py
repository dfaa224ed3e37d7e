"""Products of any vector with the inverse Fisher matrix that M-FAC's state holds."""

from typing import Any

import jax
import optax

from curvax._checks import check_like
from curvax._find import find_mfac
from curvax._trees import Tree, widen
from curvax.fisher._damped_gram import solve_damped_gram
from curvax.optimizers._mfac import ScaleByMfacState, gradient_shapes


def mfac_ihvp(state: Any, vector: Tree) -> Tree:
    r"""Multiplies any vector by M-FAC's inverse Fisher matrix.

    With the window $G$, the damping $\lambda$ and the normalizer $n$ of the last step,

    $$
    F^{-1} v = n\, G^T K^{-1} c + \frac1\lambda \left(r - G^T K^{-1} G r\right),
    \qquad F = \lambda I + \frac1n G^T G
    $$

    where $v = G^T c + r$ with $c = K^{-1} G v$, $K = n \lambda I + G G^T$: neither the part in the
    span of the window nor its errors are divided by $\lambda$. The rounding error of $v$ itself
    remains: outside the span it is multiplied by $1 / \lambda$. For the newest gradient, the
    optimizer's own update is $F^{-1} g$ without that loss.

    Args:
      state: the state of `curvax.mfac` or `curvax.scale_by_mfac`, found inside chains and
        wrappers as `curvax.value_grad_and_hessian_diag_from_state` finds AdaHessian's.
      vector: a tree like the parameters.

    Returns:
      $F^{-1} v$, a tree like ``vector`` with its dtypes. Before the first step, $v / \lambda$.

    Raises:
      ValueError: if the state holds no M-FAC state or several, or the vector does not match the
        window.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.mfac(num_grads=4, damping=0.5)
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([2.0, 0.0]), tx.init(params), params)
      >>> # F = diag(0.5 + 4 / 4, 0.5)
      >>> print(curvax.mfac_ihvp(state, jnp.ones(2)).round(3))
      [0.667 2.   ]

    References:
      Frantar et al., [M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information](https://arxiv.org/abs/2107.03356), 2021, Section 4.
    """
    node = find_mfac(state)
    plain = _with_leaf_lists(node)
    leaves, treedef = jax.tree.flatten(vector)
    check_like("the vector", leaves, gradient_shapes(plain))
    wide_leaves = list(map(widen, leaves))
    gram, damping, normalizer = plain.gram, plain.damping, plain.normalizer

    def solve(rhs: jax.Array) -> jax.Array:
        return solve_damped_gram(gram, normalizer * damping, rhs).x

    inside = solve(plain.window.dots(wide_leaves, gram.dtype))
    rest = optax.tree.sub(wide_leaves, plain.window.combine(inside, wide_leaves))
    products = plain.window.dots(rest, gram.dtype)
    weights = solve(normalizer * inside - products / damping)
    spanned = plain.window.combine(weights, wide_leaves)
    products_with_inverse = [
        (leaf / damping + part).astype(given.dtype)
        for leaf, part, given in zip(rest, spanned, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, products_with_inverse)


def _with_leaf_lists(node: Any) -> ScaleByMfacState:
    """The state with lists of arrays in place of trees with holes or NNX variables."""
    scalars = {name: jax.tree.leaves(getattr(node, name))[0] for name in _SCALARS}
    feedback = None if node.feedback is None else jax.tree.leaves(node.feedback)
    window = type(node.window)(*map(jax.tree.leaves, node.window))
    return node._replace(window=window, feedback=feedback, **scalars)


_SCALARS = ("gram", "damping", "normalizer")
