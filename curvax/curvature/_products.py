r"""Hessian-vector products: value, gradient and product of a loss in one pass.

For a loss $f$ and a direction $t$, the product $H t$ is the derivative of
the gradient along $t$, so one forward-mode derivative of ``value_and_grad`` yields

$$
f(\theta),\quad g = \nabla f(\theta),\quad H t = \partial_t \nabla f(\theta)
$$

with one forward and one backward pass and their tangents: nothing is evaluated twice, the
same dropout key and batch statistics serve all three, and ``aux`` comes back once.

Only ``params`` gets a tangent; a batch among the other arguments never does. Integer and bool
leaves of ``params`` are held constant: their gradients and products are zeros.
"""

from collections.abc import Callable
from typing import Any, Concatenate, get_args

import jax
import jax.numpy as jnp

from curvax._checks import check_choice, check_keywords, check_like, scalar_loss
from curvax._trees import Differentiable, Leaves, Tree, tree_norm, varying_like, widen
from curvax.curvature._modes import Mode, check_graph, explained, through_graph
from curvax.curvature._one_pass import P, Value

__all__ = ["Mode", "hvp", "linearized_hvp", "value_grad_and_hvp"]

# (loss of leaves, leaves, tangents) -> value, aux, gradient leaves, product leaves
_OnePass = Callable[
    [Callable[[Leaves], tuple[jax.Array, Any]], Leaves, Leaves],
    tuple[jax.Array, Any, Leaves, Leaves],
]


def value_grad_and_hvp(
    fun: Callable[Concatenate[Tree, P], Value],
    *,
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
) -> Callable[Concatenate[Tree, Tree, P], tuple[Value, Tree, Tree]]:
    r"""Makes a function that returns a loss, its gradient and a Hessian-vector product.

    $$
    f(\theta),\quad \nabla f(\theta),\quad \nabla^2 f(\theta)\, t
    $$

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      has_aux: whether ``fun`` returns auxiliary data (new batch statistics, metrics).
      mode: how to compute the product.

        * ``"forward_over_reverse"``: one ``jvp`` of ``value_and_grad``. The fastest, with the least
          memory.
        * ``"reverse_over_reverse"``: a ``vjp`` of the gradient, for a loss with a kernel
          that has no forward-mode rule (some fused attention). About twice the memory.
        * ``"finite_differences"``: a central difference of two further gradients, for a
          kernel whose backward pass cannot be differentiated at all. Its relative error is
          about $\epsilon^{2/3}$: 2e-5 in float32, 4e-11 in float64; it is useless in bfloat16.

    Returns:
      A function ``(params, tangent, *args, **kwargs) -> (value, grads, hvp)``. ``tangent``
      is a tree like ``params``; ``grads`` and ``hvp`` have the shapes and dtypes of
      ``params``. With ``has_aux``, ``value`` is the pair ``(value, aux)``, as in
      ``jax.value_and_grad``. Complex leaves follow JAX's convention for gradients, the
      conjugate of the direction of steepest ascent.

    Raises:
      ValueError: if ``mode`` is unknown or an operation of the loss does not support it, the
        tangent does not match ``params``, or the loss is not a real scalar.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def loss(params, scale):
      ...     return scale * params["a"] ** 2 * params["b"]
      >>> params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
      >>> direction = {"a": jnp.array(1.0), "b": jnp.array(0.0)}
      >>> value, grads, product = curvax.value_grad_and_hvp(loss)(
      ...     params, direction, 1.0
      ... )
      >>> float(value), float(grads["a"]), float(product["a"]), float(product["b"])
      (12.0, 12.0, 6.0, 4.0)

    References:
      Pearlmutter, [Fast exact multiplication by the
      Hessian](https://doi.org/10.1162/neco.1994.6.1.147), 1994.
    """
    check_choice("mode", mode, get_args(Mode))
    check_keywords("value_grad_and_hvp", fun, ("tangent",))
    take = _ONE_PASS[mode]

    def value_grad_and_product(
        params: Tree, tangent: Tree, /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Value, Tree, Tree]:
        check_like("tangent", tangent, params)
        tree = Differentiable.of(params)
        leaves = tree.select(tree.leaves)
        tangents = cast_like(tree.select(jax.tree.leaves(tangent)), leaves)
        loss = loss_of_leaves(fun, tree, args, kwargs, has_aux=has_aux)
        with explained(mode):
            value, aux, grads, product = take(loss, leaves, tangents)
        output: Any = (value, aux) if has_aux else value
        return output, tree.tangent(grads), tree.tangent(product)

    return value_grad_and_product


def hvp(
    fun: Callable[..., Any],
    params: Tree,
    tangent: Tree,
    *args: Any,
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> Tree:
    r"""Multiplies a loss's Hessian by a vector, $\nabla^2 f(\theta)\, t$.

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      params: a tree of arrays, the point at which to evaluate the Hessian.
      tangent: a tree like ``params``, the vector.
      *args: further arguments of ``fun``, which are not differentiated.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A tree with the shapes and dtypes of ``params``.

    Raises:
      ValueError: as in `curvax.value_grad_and_hvp`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> curvax.hvp(lambda x: x @ matrix @ x / 2, jnp.ones(2), jnp.array([1.0, 0.0]))
      Array([2., 1.], dtype=float32)
    """
    check_keywords("hvp", fun, _RESERVED)
    one_pass = value_grad_and_hvp(fun, has_aux=has_aux, mode=mode)
    return one_pass(params, tangent, *args, **kwargs)[2]


def linearized_hvp(
    fun: Callable[..., Any],
    params: Tree,
    *args: Any,
    has_aux: bool = False,
    mode: Mode = "forward_over_reverse",
    **kwargs: Any,
) -> Callable[[Tree], Tree]:
    r"""Linearizes the gradient once, for many products at one point.

    The returned function evaluates $t \mapsto \nabla^2 f(\theta)\, t$ from the stored intermediate
    values of one forward and one backward pass. (``"finite_differences"`` stores nothing and takes
    two gradients per product.)

    Args:
      fun: a loss ``fun(params, *args, **kwargs)`` that returns a real scalar, or
        ``(scalar, aux)`` with ``has_aux``.
      params: a tree of arrays, the point at which to evaluate the Hessian.
      *args: further arguments of ``fun``.
      has_aux: whether ``fun`` returns auxiliary data, which is dropped.
      mode: see `curvax.value_grad_and_hvp`.
      **kwargs: keyword arguments of ``fun``.

    Returns:
      A linear function from a tree like ``params`` to a tree like ``params``.

    Raises:
      ValueError: as in `curvax.value_grad_and_hvp`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> product = curvax.linearized_hvp(
      ...     lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0])
      ... )
      >>> jax.vmap(product)(jnp.eye(2))
      Array([[ 6.,  0.],
             [ 0., 12.]], dtype=float32)
    """
    check_choice("mode", mode, get_args(Mode))
    check_keywords("linearized_hvp", fun, _RESERVED)
    tree = Differentiable.of(params)
    loss = loss_of_leaves(fun, tree, args, kwargs, has_aux=has_aux)
    leaves = tree.select(tree.leaves)

    def gradient(point: Leaves) -> Leaves:
        return jax.grad(loss, has_aux=True)(point)[0]

    with explained(mode):
        if mode == "forward_over_reverse":
            pushforward = jax.linearize(gradient, leaves)[1]
            check_graph(jax.make_jaxpr(pushforward)(leaves).jaxpr)
        elif mode == "reverse_over_reverse":
            pullback = jax.vjp(gradient, leaves)[1]

    def product(tangent: Tree) -> Tree:
        check_like("tangent", tangent, params)
        tangents = cast_like(tree.select(jax.tree.leaves(tangent)), leaves)
        if mode == "forward_over_reverse":
            return tree.tangent(pushforward(tangents))
        if mode == "reverse_over_reverse":
            return tree.tangent(pullback(tangents)[0])
        return tree.tangent(_finite_differences(loss, leaves, tangents)[3])

    return product


def cast_like(tangents: Leaves, leaves: Leaves) -> Leaves:
    """Each tangent of its leaf's type, as ``jvp`` requires."""
    pairs = zip(tangents, leaves, strict=True)
    return [varying_like(jnp.asarray(tangent, leaf.dtype), leaf) for tangent, leaf in pairs]


def loss_of_leaves(
    fun: Callable[..., Any],
    tree: Differentiable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
) -> Callable[[Leaves], tuple[jax.Array, Any]]:
    """The checked loss and aux as a function of the differentiated leaves alone."""
    loss = scalar_loss(fun, has_aux)
    return lambda leaves: loss(tree.params(leaves), *args, **kwargs)


def _forward_over_reverse(
    loss: Callable[[Leaves], tuple[jax.Array, Any]], leaves: Leaves, tangents: Leaves
) -> tuple[jax.Array, Any, Leaves, Leaves]:
    def value_and_grad(point: Leaves) -> tuple[tuple[jax.Array, Leaves], Any]:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(point)
        return (value, grads), aux

    def of_tangents(leaves: Leaves, tangents: Leaves) -> Any:
        return jax.jvp(value_and_grad, (leaves,), (tangents,), has_aux=True)

    (value, grads), (_, product), aux = through_graph(of_tangents, leaves, tangents)
    return value, aux, grads, product


def _reverse_over_reverse(
    loss: Callable[[Leaves], tuple[jax.Array, Any]], leaves: Leaves, tangents: Leaves
) -> tuple[jax.Array, Any, Leaves, Leaves]:
    def gradient(point: Leaves) -> tuple[Leaves, tuple[jax.Array, Any]]:
        value_and_aux, grads = jax.value_and_grad(loss, has_aux=True)(point)
        return grads, value_and_aux

    grads, pullback, (value, aux) = jax.vjp(gradient, leaves, has_aux=True)
    (product,) = pullback(tangents)  # the Hessian is symmetric
    return value, aux, grads, product


def _finite_differences(
    loss: Callable[[Leaves], tuple[jax.Array, Any]], leaves: Leaves, tangents: Leaves
) -> tuple[jax.Array, Any, Leaves, Leaves]:
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = value_and_grad(leaves)
    step = _difference_step(leaves, tangents)

    def gradient_at(sign: int) -> Leaves:
        return value_and_grad(
            [
                (leaf + sign * step * tangent).astype(leaf.dtype)
                for leaf, tangent in zip(leaves, tangents, strict=True)
            ]
        )[1]

    product = [
        ((plus - minus) / (2 * step)).astype(plus.dtype)
        for plus, minus in zip(gradient_at(1), gradient_at(-1), strict=True)
    ]
    return value, aux, grads, product


def _difference_step(leaves: Leaves, tangents: Leaves) -> jax.Array:
    """The step at which truncation and rounding balance: cbrt(eps) of the params' size."""
    if not leaves:
        return jnp.ones(())
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    size, length = (tree_norm([jnp.abs(widen(x)) for x in xs]) for xs in (leaves, tangents))
    ratio = jnp.where(size > 0, size, 1.0) / jnp.where(length > 0, length, 1.0)
    return eps ** (1 / 3) * ratio


_RESERVED = ("tangent", "has_aux", "mode")
_ONE_PASS: dict[Mode, _OnePass] = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_differences": _finite_differences,
}
