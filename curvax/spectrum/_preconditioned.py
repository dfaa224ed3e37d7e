r"""Operators as an optimizer sees them: $P^{-1/2} A P^{-1/2}$ where its update is $P^{-1} g$.

The eigenvalues are those of $P^{-1} A$, so a step of length $\eta$ along the optimizer's update is
stable on a quadratic up to $\eta = 2 / \lambda_{\max}$.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import check_like, check_range
from curvax._find import find_mfac, find_node
from curvax._trees import PyTree, Tree, path_name
from curvax.curvature._operator import Operator


def preconditioned(
    operator: Operator, inverse_root: PyTree | Callable[[PyTree], PyTree]
) -> Operator:
    r"""The operator $P^{-1/2} A P^{-1/2}$.

    Args:
      operator: $A$.
      inverse_root: $P^{-1/2}$, a tree of the diagonal's entries or a function of a vector; see
        `adam_inverse_root`, `adahessian_inverse_root` and `mfac_inverse_root`.

    Returns:
      The operator.

    Raises:
      ValueError: if a tree does not match the operator's vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> operator = spectrum.Operator(
      ...     lambda v: jnp.array([8.0, 2.0]) * v, jnp.zeros(2)
      ... )
      >>> scaled = spectrum.preconditioned(operator, jnp.array([0.5, 1.0]))
      >>> print(scaled(jnp.ones(2)))
      [2. 2.]
    """
    if callable(inverse_root):
        apply = inverse_root
    else:
        check_like("inverse_root", inverse_root, operator.like)
        factors = inverse_root

        def apply(vector: PyTree) -> PyTree:
            return jax.tree.map(jnp.multiply, factors, vector)

    def products(vectors: Sequence[PyTree]) -> list[PyTree]:
        images = operator.products([apply(vector) for vector in vectors])
        return [apply(image) for image in images]

    return Operator(lambda vector: products([vector])[0], operator.like, products=products)


def adam_inverse_root(state: Any, like: Tree, *, b2: float = 0.999, eps: float = 1e-8) -> Tree:
    r"""$P^{-1/2}$ of Adam, $P = \operatorname{diag}(\sqrt{\hat v} + \epsilon)$.

    Args:
      state: the state of ``optax.adam`` or a variant, found inside chains and wrappers;
        ``optax.amsgrad`` and ``optax.adamax`` are not supported.
      like: the operator's ``like``; for a restricted operator, only its leaves are used.
      b2: as the optimizer has it.
      eps: as the optimizer has it.

    Returns:
      The diagonal, a tree like ``like``.

    Raises:
      ValueError: if the state holds no such optimizer or several, or has taken no step.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax import spectrum
      >>> params, tx = jnp.zeros(2), optax.adam(0.1)
      >>> _, state = tx.update(jnp.array([4.0, 1.0]), tx.init(params), params)
      >>> print(spectrum.adam_inverse_root(state, params).round(3))  # 1 / sqrt(|g|)
      [0.5 1. ]
    """
    check_range("b2", b2, low=0.0, high=1.0, open_high=True)
    node = find_node(
        state,
        ("count", "mu", "nu"),
        one="Adam",
        several="optimizers with mu and nu",
        example="optax.adam",
    )
    if hasattr(node, "nu_max") or hasattr(node, "nu_weight"):
        raise ValueError(
            f"{type(node).__name__} does not divide by the root of nu as Adam does: use "
            "adahessian_inverse_root, or pass its own diagonal to preconditioned."
        )
    count = int(jax.tree.leaves(node.count)[0])
    _check_steps(count)
    corrected = 1 - b2**count
    return jax.tree.map(
        lambda nu: 1 / jnp.sqrt(jnp.sqrt(nu / corrected) + eps), _of_like(node.nu, like)
    )


def adahessian_inverse_root(
    state: Any, like: Tree, *, hessian_power: float = 1.0, eps: float = 1e-4
) -> Tree:
    r"""$P^{-1/2}$ of AdaHessian, $P = \operatorname{diag}(\hat v^{k/2} + \epsilon)$.

    Args:
      state: the state of `curvax.adahessian`, found inside chains and wrappers.
      like: as in `adam_inverse_root`.
      hessian_power: the optimizer's $k$.
      eps: as the optimizer has it.

    Returns:
      The diagonal, a tree like ``like``.

    Raises:
      ValueError: as in `adam_inverse_root`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax import spectrum
      >>> params, tx = jnp.zeros(2), curvax.adahessian(0.1, eps=1e-8)
      >>> diag = jnp.array([4.0, 1.0])
      >>> _, state = tx.update(params, tx.init(params), params, hessian_diag=diag)
      >>> print(spectrum.adahessian_inverse_root(state, params, eps=1e-8).round(3))
      [0.5 1. ]
    """
    node = find_node(
        state,
        ("mu", "nu", "nu_weight"),
        one="AdaHessian",
        several="AdaHessians",
        example="curvax.adahessian",
    )
    weight = float(jax.tree.leaves(node.nu_weight)[0])
    _check_steps(weight)
    return jax.tree.map(
        lambda nu: 1 / jnp.sqrt((nu / weight) ** (hessian_power / 2) + eps),
        _of_like(node.nu, like),
    )


def mfac_inverse_root(state: Any) -> Callable[[Tree], Tree]:
    r"""$F^{-1/2}$ of M-FAC's window, as a function of a vector.

    With the eigenvalues of the Gram matrix, $G G^T = V \Lambda V^T$, the damping $\lambda$, the
    normalizer $n$ and $a_i = \lambda + \Lambda_i / n$,

    $$
    F^{-1/2} v = \frac{v}{\sqrt\lambda} - G^T V \operatorname{diag}\left(
    \frac{1}{n \sqrt{a_i \lambda}\, (\sqrt{a_i} + \sqrt\lambda)} \right) V^T G v
    $$

    Args:
      state: the state of `curvax.mfac` with dense rows, found inside chains and wrappers.

    Returns:
      The function, for vectors like the whole params.

    Raises:
      ValueError: if the state holds no M-FAC state or several, or has taken no step.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax import spectrum
      >>> params, tx = jnp.zeros(2), curvax.mfac(num_grads=4, damping=0.25)
      >>> _, state = tx.update(jnp.array([2.0, 0.0]), tx.init(params), params)
      >>> # F = diag(0.25 + 4 / 4, 0.25)
      >>> print(spectrum.mfac_inverse_root(state)(jnp.ones(2)).round(3))
      [0.894 2.   ]
    """
    node = find_mfac(state)
    _check_steps(int(jax.tree.leaves(node.count)[0]))
    gram, damping, normalizer = (
        np.asarray(jax.tree.leaves(x)[0], np.float64)
        for x in (node.gram, node.damping, node.normalizer)
    )
    values, vectors = np.linalg.eigh(gram)
    root, damping_root = np.sqrt(damping + np.maximum(values, 0) / normalizer), np.sqrt(damping)
    # The division by the root of the damping comes last, as it could overflow here.
    factors = 1 / (normalizer * root * (root + damping_root))
    middle = jnp.asarray(vectors * factors @ vectors.T, jax.tree.leaves(node.gram)[0].dtype)

    def apply(vector: Tree) -> Tree:
        weights = middle @ node.window.dots(vector, middle.dtype)
        spanned = node.window.combine(weights, vector)
        weak = float(damping_root)  # vectors keep their dtype
        return jax.tree.map(lambda v, s: (v - s.astype(v.dtype)) / weak, vector, spanned)

    return apply


def _of_like(tree: PyTree, like: PyTree) -> PyTree:
    """The tree itself, or its leaves by path for vectors of a part of the params."""
    treedef: Any = jax.tree.structure(tree)
    if treedef == jax.tree.structure(like):
        return tree
    entries = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    missing = [path for path in like if path not in entries] if isinstance(like, dict) else [like]
    if missing:
        raise ValueError(
            f"the optimizer's state has no leaf for {missing[0]!r}; it has {', '.join(entries)}."
        )
    return {path: entries[path] for path in like}


def _check_steps(count: float) -> None:
    if not count > 0:
        raise ValueError("the optimizer has taken no step yet: its state has no preconditioner.")
