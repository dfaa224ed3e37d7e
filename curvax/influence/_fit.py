"""Influence functions of a network's outputs, and of any loss."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax._checks import (
    as_key,
    check_arrays,
    check_count,
    check_range,
    check_real,
    warn_of_batch_stats,
)
from curvax._progress import progress_bar
from curvax._settled import settled
from curvax._trees import Differentiable, Leaves, PyTree, Select, widen
from curvax.curvature._compiled import compiled_once
from curvax.curvature._jacobian import Network
from curvax.curvature._losses import Loss
from curvax.influence._checked import checked_outputs
from curvax.influence._examples import Examples, Part
from curvax.influence._function import InfluenceFunction, Problem
from curvax.influence._gradients import (
    check_depends_on_examples,
    checked_finite,
    example_gradients,
    gauss_newton_rows,
    network_gradients,
)
from curvax.influence._inverse import Options, Size, check_memory, inverse_of_rows

_RowsOfPart = Callable[[Part], Leaves]


def ggn_influence(
    network: Network,
    loss: Loss,
    params: PyTree,
    batches: Any,
    *,
    damping: float | None = None,
    block_size: int | None = None,
    num_directions: int | None = None,
    key: jax.Array | int | None = None,
    select: Select | None = None,
    micro_batch_size: int = 128,
    memory_bytes: int = 2**32,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> InfluenceFunction:
    r"""The influence function with the Gauss-Newton matrix, the Fisher matrix of a likelihood.

    $$
    F = \lambda I + \frac1n \sum_i J_i^T B_i B_i^T J_i
    $$

    with the Jacobians $J_i$ of the outputs, and $B_i B_i^T$ the Hessian of the loss in them. Each
    example gives a row $b^T J_i$ for each output. Rows are kept if there are fewer than parameters,
    and otherwise added to $F$ and discarded, as they are to blocks: memory does then not depend on
    the number of examples.

    Args:
      network: ``network(params, inputs) -> outputs`` of shape (n, ..., C), in evaluation mode; it
        is called on batches of one example.
      loss: as in `curvax.ggn_vp`, for example ``"softmax_cross_entropy"``.
      params: the trained parameters, real; integer and bool leaves are held constant.
      batches: one batch ``(inputs, targets)``, or an iterable of them that holds the same examples
        in the same order at each pass; those of an iterator are kept.
      damping: $\lambda$. None for the mean of the diagonal of the matrix without it. Unless rows
        are kept, that costs another pass, with one row from a random combination of the outputs of
        each example. Training with a weight decay of $\frac\lambda2 \lVert \theta
        \rVert^2$ has that $\lambda$ in its Hessian; the default predicted retraining better.
      block_size: the number of parameters in a block of a block-diagonal matrix; None for the full
        matrix.
      num_directions: the number of rows of each example, from random combinations of the outputs
        with the same expectation; None for all outputs, which is exact.
      key: a PRNG key or an integer seed for random combinations; 0 by default.
      select: ``(path, leaf) -> bool``, the leaves that take part, such as those of the last layers;
        the others are held constant.
      micro_batch_size: the number of gradients or rows in memory together, at least those of one
        example.
      memory_bytes: about how much memory the inverse may take while it is made, and the solved
        gradients of test examples later.
      mesh: the devices over which to spread blocks. Without it, parameters keep their shardings.
      progress: whether progress bars are shown, by tqdm where that is installed.

    Returns:
      The influence function, with ``.scores(test)`` and ``.self_influence()``.

    Raises:
      ValueError: if batches are empty, are not pairs, or hold labels that are out of range or of
        another dtype; outputs do not have the examples along their first axis; parameters are
        complex; rows are not finite; an option is out of range; or the inverse would take more than
        ``memory_bytes``.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import influence
      >>> def network(params, inputs):
      ...     return inputs @ params
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
      >>> targets = jnp.array([[0.0], [1.0], [-1.0]])  # fitted by zeros
      >>> function = influence.ggn_influence(
      ...     network,
      ...     "squared_error",
      ...     jnp.zeros((2, 1)),
      ...     (inputs, targets),
      ...     damping=1e-6,
      ... )
      >>> test = jnp.array([[0.0, 1.0]]), jnp.array([[2.0]])
      >>> print(function.scores(test).scores[0, 1:].round(3))  # the first helps
      [ 1. -1.]

    References:
      Koh and Liang, [Understanding black-box predictions via influence
      functions](https://arxiv.org/abs/1703.04730), 2017. Grosse et al., [Studying large language
      model generalization with influence functions](https://arxiv.org/abs/2308.03296), 2023, for
      the Gauss-Newton matrix in place of the Hessian.
    """
    if num_directions is not None:
        check_count("num_directions", num_directions)
    options = _checked_options(damping, block_size, memory_bytes, mesh, micro_batch_size)
    part, train = _checked_model(params, batches, select)
    whole = part.params(part.select(part.leaves))
    check = functools.partial(checked_outputs, network, loss, whole)
    shapes = [check(some) for some in train.parts(train.number)]
    num_rows = [shape[0] * (num_directions or int(np.prod(shape[1:]))) for shape in shapes]
    key = as_key(key)

    def rows_of(num_directions: int | None) -> _RowsOfPart:
        rows = compiled_once(gauss_newton_rows, network, loss, num_directions=num_directions)

        def of_part(some: Part) -> Leaves:
            numbers = jnp.arange(some.start, some.start + some.size)
            return rows(part, some.arguments, numbers, key)

        return of_part

    problem = Problem(
        gradients=compiled_once(network_gradients, network, loss),
        check=check,
        part=part,
        train=train,
        micro_batch_size=micro_batch_size,
        memory_bytes=memory_bytes,
        progress=progress,
        functions=(network, loss),
    )
    return _fitted(problem, rows_of(num_directions), rows_of(1), sum(num_rows), options)


def empirical_fisher_influence(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any,
    *,
    damping: float | None = None,
    block_size: int | None = None,
    has_aux: bool = False,
    select: Select | None = None,
    micro_batch_size: int = 128,
    memory_bytes: int = 2**32,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> InfluenceFunction:
    r"""The influence function with the empirical Fisher matrix, for any loss.

    $$
    F = \lambda I + \frac1n \sum_i \nabla \ell_i \nabla \ell_i^T
    $$

    Examples that the model fits have small gradients and hardly count in it: for a network whose
    outputs have a convex loss, scores of `ggn_influence` are better.

    Args:
      loss_fn: ``loss_fn(params, *arguments) -> loss``, the mean over a batch, in evaluation mode;
        it is called on batches of one example.
      params: as in `ggn_influence`.
      batches: one batch, a tuple of the further arguments of ``loss_fn`` or a single array or
        mapping, or an iterable of batches; otherwise as in `ggn_influence`.
      damping: as in `ggn_influence`; None takes another pass over the gradients.
      block_size: as in `ggn_influence`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; the aux is dropped.
      select: as in `ggn_influence`.
      micro_batch_size: as in `ggn_influence`.
      memory_bytes: as in `ggn_influence`.
      mesh: as in `ggn_influence`.
      progress: as in `ggn_influence`.

    Returns:
      The influence function. Its self-influence is a leverage score, at most 1.

    Raises:
      ValueError: if the loss is not a real scalar or does not depend on the examples it is given,
        or as in `ggn_influence`.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax import influence
      >>> def loss_fn(params, inputs, targets):
      ...     return jnp.mean((inputs @ params - targets) ** 2) / 2
      >>> batch = jnp.eye(2), jnp.array([1.0, -2.0])
      >>> function = influence.empirical_fisher_influence(
      ...     loss_fn, jnp.zeros(2), batch, damping=0.5
      ... )
      >>> print(function.self_influence().values.round(3))  # g^2 / (1 + g^2)
      [0.5 0.8]

    References:
      Schioppa et al., [Scaling up influence functions](https://arxiv.org/abs/2112.03052), 2022;
      Kunstner, Balles and Hennig, [Limitations of the empirical Fisher
      approximation](https://arxiv.org/abs/1905.12558), 2019.
    """
    options = _checked_options(damping, block_size, memory_bytes, mesh, micro_batch_size)
    part, train = _checked_model(params, batches, select)
    gradients = compiled_once(example_gradients, loss_fn, has_aux=has_aux)

    def rows(some: Part) -> Leaves:
        found = gradients(part, some.arguments)
        if some.start == 0:
            check_depends_on_examples(found, some)
        return found

    problem = Problem(
        gradients=gradients,
        check=lambda _: None,
        part=part,
        train=train,
        micro_batch_size=micro_batch_size,
        memory_bytes=memory_bytes,
        progress=progress,
        functions=(loss_fn,),
    )
    return _fitted(problem, rows, rows, train.number, options)


def _checked_options(
    damping: float | None,
    block_size: int | None,
    memory_bytes: int,
    mesh: jax.sharding.Mesh | None,
    micro_batch_size: int,
) -> Options:
    if damping is not None:
        check_range("damping", damping, low=0.0, open_low=True, open_high=True)
    if block_size is not None:
        check_count("block_size", block_size)
    elif mesh is not None:
        raise ValueError(
            "mesh spreads blocks over devices and needs a block_size; without one parameters keep "
            "their shardings, and no mesh is needed."
        )
    check_count("memory_bytes", memory_bytes)
    check_count("micro_batch_size", micro_batch_size)
    return Options(damping, block_size, memory_bytes, mesh)


def _checked_model(
    params: PyTree, batches: Any, select: Select | None
) -> tuple[Differentiable, Examples]:
    check_arrays(params)
    check_real("curvax.influence", params)
    warn_of_batch_stats(params)
    part = Differentiable.of(jax.tree.map(widen, params), select)
    if not part.chosen:
        raise ValueError("no leaf of params is real and selected, so nothing has an influence.")
    return part, Examples.of(batches, "training")


def _fitted(
    problem: Problem,
    rows: _RowsOfPart,
    few_rows: _RowsOfPart,
    num_rows: int,
    options: Options,
) -> InfluenceFunction:
    leaves = problem.part.select(problem.part.leaves)
    size = Size(
        examples=problem.train.number,
        rows=num_rows,
        columns=sum(leaf.size for leaf in leaves),
        itemsize=max(leaf.dtype.itemsize for leaf in leaves),
    )
    check_memory(size, options)
    micro_batch_size = problem.micro_batch_size

    def chunks(of_part: _RowsOfPart, together: int, description: str) -> Iterator[Leaves]:
        total = problem.train.num_parts(together)
        with progress_bar(total, description, problem.progress) as advance:
            for some in problem.train.parts(together):
                yield checked_finite(settled(of_part(some)), some, "training")
                advance()

    together = max(1, micro_batch_size * size.examples // size.rows)
    inverse, damping = inverse_of_rows(
        functools.partial(chunks, rows, together, "rows"),
        functools.partial(chunks, few_rows, micro_batch_size, "damping"),
        size,
        options,
    )
    return InfluenceFunction(inverse, damping, size.examples, problem)
