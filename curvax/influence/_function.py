r"""Scores from an inverse and the gradients of examples, with a bounded number in memory.

The parameters minimize $\frac1n \sum_i w_i \ell_i$, perhaps with a regularizer, at $w = 1$. There
$\nabla L = 0$ defines $\theta(w)$, and the implicit function theorem gives

$$
\frac{d\theta}{dw_i} = -\frac1n H^{-1} \nabla \ell_i, \qquad
\frac{dm_j}{dw_i} = -\frac1n \nabla m_j^T H^{-1} \nabla \ell_i
$$

for a measure $m_j$ of a test example. $H$ is replaced by $F$, which is positive definite.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax._progress import progress_bar
from curvax._settled import settled
from curvax._trees import Differentiable, Leaves
from curvax.curvature._compiled import compiled_once
from curvax.fisher.inverse import InverseFisher
from curvax.fisher.inverse._gram import row_products
from curvax.fisher.window._dense import replicated
from curvax.influence._examples import Examples, Part
from curvax.influence._gradients import Gradients, checked_finite, example_gradients
from curvax.influence._results import InfluenceScores, SelfInfluence


class Problem(NamedTuple):
    """A trained model and its examples.

    Attributes:
      gradients: of the loss on single examples.
      check: raises where a part of the examples does not fit the loss.
      part: the parameters, and which of their leaves take part.
      train: the training examples.
      micro_batch_size: how many gradients are in memory together.
      memory_bytes: about how much the gradients of test examples may take.
      progress: whether progress bars are shown.
      functions: what was compiled, kept alive as long as this is.
    """

    gradients: Gradients
    check: Callable[[Part], Any]
    part: Differentiable
    train: Examples
    micro_batch_size: int
    memory_bytes: int
    progress: bool
    functions: tuple[Any, ...]

    def gradients_of(self, examples: Examples, description: str) -> Iterator[tuple[Part, Leaves]]:
        """The gradients of the loss on the examples of each part."""
        size = self.micro_batch_size
        with progress_bar(examples.num_parts(size), description, self.progress) as advance:
            for some in examples.parts(size):
                rows = settled(self.gradients(self.part, some.arguments))
                yield some, checked_finite(rows, some, examples.kind)
                advance()


@dataclasses.dataclass(frozen=True)
class InfluenceFunction:
    r"""The influence of a model's training examples, made by `ggn_influence` or
    `empirical_fisher_influence`.

    Attributes:
      inverse: $F^{-1}$, over a list of the leaves that take part.
      damping: $\lambda$, as given or chosen.
      num_train: $n$, the number of training examples.
    """

    inverse: InverseFisher
    damping: float
    num_train: int
    _problem: Problem = dataclasses.field(repr=False)

    def scores(
        self, test: Any, *, measure: Callable[..., jax.Array] | None = None
    ) -> InfluenceScores:
        r"""Scores of all training examples for each test example.

        $$
        s_{ji} = -\frac1n \nabla m_j^T F^{-1} \nabla \ell_i
        $$

        is the first-order change of the measure $m_j$ if training example $i$ counts once more, and
        minus its change if $i$ is left out. The measure is something of which more is better, by
        default minus the loss: training examples with positive scores help, others do harm.

        The gradients of test examples are solved for and kept, as many as ``memory_bytes`` allows;
        for each group of them, the gradients of all training examples are computed once.

        Args:
          test: one batch or an iterable of batches, as the training examples were given.
          measure: ``measure(params, *arguments) -> scalar``, called on batches of one example, for
            example the margin of the right class; None for minus the training loss.

        Returns:
          The scores, of shape (num_test, num_train).

        Raises:
          ValueError: if there are no test examples, the measure is no real scalar, a gradient is
            not finite, or batches differ between passes.

        References:
          Koh and Liang, [Understanding black-box predictions via influence
          functions](https://arxiv.org/abs/1703.04730), 2017.
        """
        problem, examples = self._problem, Examples.of(test, "test")
        gradients = compiled_once(example_gradients, measure, has_aux=False) if measure else None
        groups = [
            self._scores_of(problem, solved)
            for solved in self._solved(problem, examples, gradients)
        ]
        return InfluenceScores(np.concatenate(groups))

    def self_influence(self) -> SelfInfluence:
        r"""The score of each training example for its own loss, with the opposite sign.

        $\frac1n \nabla \ell_i^T F^{-1} \nabla \ell_i$ is the first-order increase of the loss of
        example $i$ if it is left out of training. It is large where the model had to memorize the
        example, as it does with a wrong label.

        Returns:
          The values, of shape (num_train,).

        Raises:
          ValueError: if a gradient is not finite, or batches differ between passes.

        References:
          Koh and Liang, [Understanding black-box predictions via influence
          functions](https://arxiv.org/abs/1703.04730), 2017, Section 5.4.
        """
        problem = self._problem
        forms = [
            np.array(settled(_quadratic_forms(self.inverse, rows)))  # a copy frees the device
            for _, rows in problem.gradients_of(problem.train, "self-influence")
        ]
        return SelfInfluence(np.concatenate(forms) / self.num_train)

    def _scores_of(self, problem: Problem, solved: Leaves) -> np.ndarray:
        """The scores for a group of test examples, from one pass over the training examples."""
        products = [
            np.array(settled(_products(solved, rows)))  # a copy frees the device
            for _, rows in problem.gradients_of(problem.train, "scores")
        ]
        return -np.concatenate(products, axis=1) / self.num_train

    def _solved(
        self, problem: Problem, examples: Examples, gradients: Gradients | None
    ) -> Iterator[Leaves]:
        r"""$F^{-1} \nabla m_j$ for groups of test examples that fit in memory."""
        wanted = problem.part.select(problem.part.leaves)
        fits = problem.memory_bytes // (2 * sum(leaf.nbytes for leaf in wanted))
        group = max(1, min(fits, examples.number))
        kept: list[Leaves] = []
        number = 0
        for some in examples.parts(min(group, problem.micro_batch_size)):
            if number + some.size > group:
                yield _joined(kept)
                kept, number = [], 0
            kept.append(settled(_solve(self.inverse, self._measured(problem, some, gradients))))
            number += some.size
        yield _joined(kept)

    def _measured(self, problem: Problem, some: Part, gradients: Gradients | None) -> Leaves:
        """The gradients of the measure."""
        if gradients is not None:
            return checked_finite(gradients(problem.part, some.arguments), some, "test")
        problem.check(some)
        rows = checked_finite(problem.gradients(problem.part, some.arguments), some, "test")
        return [-leaf for leaf in rows]


@jax.jit
def _solve(inverse: InverseFisher, vectors: Leaves) -> Leaves:
    return _over_vectors(inverse.solve, vectors)


@jax.jit
def _quadratic_forms(inverse: InverseFisher, vectors: Leaves) -> jax.Array:
    return _over_vectors(inverse.quadratic_form, vectors)


def _over_vectors(fun: Callable[[Leaves], Any], vectors: Leaves) -> Any:
    """``fun`` of each vector: together, or one after the other on explicitly sharded axes.

    JAX cannot vectorize the contractions that state the sharding of their results.
    """
    explicit = any(replicated(leaf) is not None for leaf in vectors)
    return jax.lax.map(fun, vectors) if explicit else jax.vmap(fun)(vectors)


@jax.jit
def _products(vectors: Leaves, rows: Leaves) -> jax.Array:
    """The dot products of all vectors with all rows: shape (k, b)."""
    pairs = zip(vectors, rows, strict=True)
    products = [row_products(v.astype(leaf.dtype), leaf, replicated(leaf)) for v, leaf in pairs]
    return jax.tree.reduce(jnp.add, products)


@jax.jit
def _joined(chunks: list[Leaves]) -> Leaves:
    return [jnp.concatenate(leaves) for leaves in zip(*chunks, strict=True)]
