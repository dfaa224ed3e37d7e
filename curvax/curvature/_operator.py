"""Symmetric operators on trees, and conversions to other libraries."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from curvax._checks import as_key, check_count, check_like, check_range
from curvax._extras import from_extra
from curvax._trees import PyTree, Tree, named_leaves, tree_dot, tree_norm, widen
from curvax.curvature._probes import Distribution, random_probe

if TYPE_CHECKING:
    from lineax import FunctionLinearOperator
    from scipy.sparse.linalg import LinearOperator


class ById:
    """A part of a tree's structure that is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@jax.tree_util.register_pytree_node_class
class Operator:
    r"""A symmetric matrix $A$ known by its products with trees.

    Made by `hessian_operator` and its relatives, or from any symmetric product. An operator is a
    pytree and may be an argument of a jitted function. Its arrays are ``like`` and those of
    ``product`` if that is a pytree, such as `jax.tree_util.Partial`; values that a plain function
    closes over are constants.

    Args:
      product: ``vector -> A vector``, on trees like ``like``.
      like: a tree of real floating-point arrays: the shapes, dtypes and shardings of vectors.
      products: ``vectors -> [A vector for each]``, for several vectors at once; by default the
        method ``products`` of ``product``, or one product at a time if it has none.

    Attributes:
      like: that tree, in float32 or wider.

    Raises:
      ValueError: if ``like`` has no entries, or leaves that are not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import spectrum
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> operator = spectrum.Operator(lambda vector: matrix @ vector, jnp.zeros(2))
      >>> print(operator(jnp.array([1.0, 0.0])), operator.size)
      [2. 1.] 2
    """

    def __init__(
        self,
        product: Callable[[PyTree], PyTree],
        like: PyTree,
        *,
        products: Callable[[Sequence[PyTree]], list[PyTree]] | None = None,
    ) -> None:
        for name, leaf in named_leaves(like):
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"an operator's vectors must be real floating-point, got {dtype} at "
                    f"{name}: exclude the leaf, with select if the function takes it."
                )
        self.like = jax.tree.map(widen, like)
        self._product = product
        self._products = products or getattr(product, "products", None)
        if not self.size:
            raise ValueError("an operator needs vectors with at least one entry.")

    @property
    def size(self) -> int:
        """The number of rows of $A$."""
        return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(self.like))

    def tree_flatten(self) -> tuple[tuple[object, object], object]:
        """The operator as a tree: ``like``, and the product where it has arrays."""
        if jax.tree_util.all_leaves([self._product]):
            return (self.like, None), (ById(self._product), ById(self._products))
        return (self.like, self._product), None

    @classmethod
    def tree_unflatten(cls, functions: Any, children: tuple[Any, ...]) -> "Operator":
        """The operator again, unchecked: the arrays may be traced."""
        operator = object.__new__(cls)
        operator.like, operator._product = children
        if functions is None:
            operator._products = getattr(operator._product, "products", None)
        else:
            operator._product, operator._products = (one.value for one in functions)
        return operator

    def __call__(self, vector: Tree) -> Tree:
        """$A v$, in float32 or wider."""
        check_like("the vector", vector, self.like, "operator.like")
        return self._cast(self._product(self._cast(vector)))

    def products(self, vectors: Sequence[Tree]) -> list[Tree]:
        """$A v$ for several vectors, together where the operator can."""
        if len(vectors) == 1 or self._products is None:
            return [self(vector) for vector in vectors]
        for vector in vectors:
            check_like("a vector", vector, self.like, "operator.like")
        images = self._products([self._cast(vector) for vector in vectors])
        return [self._cast(image) for image in images]

    def _cast(self, vector: Tree) -> Tree:
        return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), vector, self.like)

    def random_vector(self, key: jax.Array | int, distribution: Distribution = "normal") -> PyTree:
        """A tree of independent entries of mean zero and variance one."""
        leaves, treedef = jax.tree.flatten(self.like)
        shardings = tuple(_named_sharding(leaf) for leaf in leaves)
        return jax.tree.unflatten(treedef, _drawer(shardings)(as_key(key), leaves, distribution))

    def flat_product(self) -> Callable[[jax.Array], jax.Array]:
        """The product on flat vectors of JAX, as matfree's functions take it."""
        _, unravel = ravel_pytree(self.like)
        return lambda vector: ravel_pytree(self(unravel(vector)))[0]

    def to_scipy(self) -> "LinearOperator":
        """``scipy.sparse.linalg.LinearOperator`` on flat vectors of NumPy; needs SciPy."""
        with from_extra("spectrum"):
            from scipy.sparse.linalg import LinearOperator

        flat, _ = ravel_pytree(self.like)
        product = self.flat_product()

        def matvec(vector: np.ndarray) -> np.ndarray:
            return np.asarray(product(jnp.asarray(vector.reshape(-1), flat.dtype)))

        shape, dtype = (self.size, self.size), np.dtype(flat.dtype)
        return LinearOperator(shape=shape, dtype=dtype, matvec=matvec, rmatvec=matvec)

    def to_lineax(self) -> "FunctionLinearOperator":
        """``lineax.FunctionLinearOperator`` on trees, tagged symmetric; needs lineax.

        Under lineax the product is traced, so the batches of a data set are unrolled.
        """
        with from_extra("spectrum"):
            import lineax

        structure = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.like
        )
        return lineax.FunctionLinearOperator(self, structure, lineax.symmetric_tag)


def check_symmetric(
    operator: Operator, *, key: jax.Array | int, num_probes: int = 3, tolerance: float = 1e-3
) -> None:
    r"""Raises unless $u^T A v = v^T A u$ for random vectors.

    Args:
      operator: $A$.
      key: a PRNG key for the vectors, or an integer seed.
      num_probes: the number of pairs.
      tolerance: bound on the difference relative to $\lVert A u \rVert + \lVert A v \rVert$. For
        random vectors the difference is of the order of $\lVert A - A^T \rVert_F$, the sum of the
        order of $\lVert A \rVert_F$.

    Returns:
      Nothing.

    Raises:
      ValueError: if a pair differs by more.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax import spectrum
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> operator = spectrum.Operator(lambda vector: matrix @ vector, jnp.zeros(2))
      >>> spectrum.check_symmetric(operator, key=jax.random.key(0))
    """
    check_count("num_probes", num_probes)
    check_range("tolerance", tolerance, low=0.0)
    for pair in jax.random.split(as_key(key), num_probes):
        u, v = (operator.random_vector(part) for part in jax.random.split(pair))
        image_u, image_v = operator(u), operator(v)
        difference = abs(float(tree_dot(u, image_v) - tree_dot(v, image_u)))
        scale = float(tree_norm(image_u) + tree_norm(image_v))
        if not difference <= tolerance * scale:
            raise ValueError(
                f"the operator is not symmetric: u'Av and v'Au differ by {difference:.2e}, "
                f"relative to {scale:.2e}, with a tolerance of {tolerance}."
            )


def in_groups(items: jax.Array, size: int) -> Iterator[jax.Array]:
    """Consecutive groups of ``size`` items; the last may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))


@functools.lru_cache(maxsize=64)
def _drawer(shardings: tuple[Any, ...]) -> Callable[..., list[jax.Array]]:
    """`random_probe`, compiled with shardings, which automatic axes of a mesh would lose."""
    return jax.jit(random_probe, static_argnums=2, out_shardings=list(shardings))


def _named_sharding(leaf: Any) -> jax.sharding.NamedSharding | None:
    # Under a caller's jit the compiler decides.
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
