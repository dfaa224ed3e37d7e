"""Scores of training examples that rank and plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from curvax._checks import check_count, check_index
from curvax._extras import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, GRAY = "#0072b2", "#d55e00", "0.5"


class SelfInfluence(NamedTuple):
    r"""The self-influence of training examples.

    Attributes:
      values: $\frac1n \nabla \ell_i^T F^{-1} \nabla \ell_i$, of shape (num_train,), at least 0.
    """

    values: np.ndarray

    def top(self, k: int) -> np.ndarray:
        """The ``k`` examples with the largest values, in descending order: the first to check."""
        return _largest(self.values, k)

    def found(self, wrong: np.ndarray, k: int) -> float:
        """The share of examples known to be wrong that is among the top ``k``.

        Args:
          wrong: of shape (num_train,), bool, with at least one True.
          k: how many examples are checked.

        Returns:
          A number from 0 to 1.

        Raises:
          ValueError: if ``wrong`` has another shape or dtype, or is nowhere True.
        """
        wrong = _checked_mask(wrong, len(self.values))
        return float(np.mean(np.isin(np.flatnonzero(wrong), self.top(k))))

    def plot(self, *, wrong: np.ndarray | None = None, ax: "Axes | None" = None) -> "Axes":
        """Plots the values in descending order, or what checking in that order finds.

        Args:
          wrong: a mask as in `found`, to plot the share that is found over the share of examples
            that is checked.
          ax: axes of matplotlib; by default those of a new figure.

        Returns:
          The axes.
        """
        order = np.argsort(-self.values, kind="stable")
        ax = ax or new_axes()
        if wrong is None:
            ax.plot(np.arange(1, len(order) + 1), self.values[order], color=BLUE)
            ax.set_yscale("log")
            ax.set_xlabel("rank of the training example")
            ax.set_ylabel("self-influence")
        else:
            wrong = _checked_mask(wrong, len(order))
            checked = np.arange(len(order) + 1) / len(order)
            found = np.concatenate([[0], np.cumsum(wrong[order])]) / wrong.sum()
            ax.plot(checked, found, color=BLUE, label="by self-influence")
            ax.plot([0, 1], [0, 1], color=GRAY, linestyle=":", label="at random")
            ax.set_xlabel("share of examples checked")
            ax.set_ylabel("share of wrong ones found")
            ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        return ax


class InfluenceScores(NamedTuple):
    """The influence of training examples on test examples.

    Attributes:
      scores: of shape (num_test, num_train). Positive ones help: the measure, by default minus the
        loss of the test example, would increase by about the score if the training example counted
        once more, and decrease by it if the example were left out.
    """

    scores: np.ndarray

    def top(self, k: int) -> np.ndarray:
        """The ``k`` most helpful training examples for each test example, best first."""
        return _largest(self.scores, k)

    def bottom(self, k: int) -> np.ndarray:
        """The ``k`` most harmful training examples for each test example, worst first."""
        return _largest(-self.scores, k)

    def relative(self, self_influence: SelfInfluence) -> "InfluenceScores":
        r"""Scores over the square roots of self-influences, so that outliers do not lead each list.

        Args:
          self_influence: of the same training examples, from the same influence function.

        Returns:
          Scores of the same shape; 0 where the self-influence is.

        Raises:
          ValueError: if the numbers of training examples differ.

        References:
          Barshan, Brunet and Dziugaite, [RelatIF: identifying explanatory training examples via
          relative influence](https://arxiv.org/abs/2003.11630), 2020.
        """
        values = self_influence.values
        if values.shape != self.scores.shape[1:]:
            raise ValueError(
                f"self_influence must have one value for each of the {self.scores.shape[1]} "
                f"training examples, got shape {values.shape}."
            )
        roots = np.sqrt(values)
        return InfluenceScores(self.scores / np.where(roots > 0, roots, np.inf))

    def plot(
        self,
        test: int = 0,
        *,
        k: int = 8,
        names: Sequence[str] | None = None,
        ax: "Axes | None" = None,
    ) -> "Axes":
        """Plots the most helpful and the most harmful training examples of one test example.

        Args:
          test: which test example.
          k: how many training examples of either kind, at most half of all.
          names: of the training examples; by default their numbers.
          ax: axes of matplotlib; by default those of a new figure.

        Returns:
          The axes.

        Raises:
          ValueError: if there is no such test example, or ``names`` are not one for each training
            example.
        """
        number, total = self.scores.shape
        check_index("test", test, f"there are {number} test examples")
        if test >= number:
            raise ValueError(f"test must be below {number}, the number of test examples: {test}.")
        if names is not None and len(names) != total:
            raise ValueError(f"names must be {total}, one per training example, got {len(names)}.")
        k = max(1, min(k, total // 2))
        chosen = np.concatenate([self.top(k)[test], self.bottom(k)[test][::-1]])
        values = self.scores[test, chosen]
        labels = [names[i] if names is not None else str(i) for i in chosen]
        ax = ax or new_axes(height=0.6 + 0.22 * len(chosen))
        ax.barh(np.arange(len(chosen)), values, color=[BLUE if v > 0 else RED for v in values])
        ax.set_yticks(np.arange(len(chosen)), labels)
        ax.invert_yaxis()
        ax.set_xlabel("influence score")
        ax.set_ylabel("training example")
        return ax


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Where the ``k`` largest values of the last axis are; of equal ones, the first."""
    check_count("k", k)
    if k > values.shape[-1]:
        raise ValueError(f"k must be at most the {values.shape[-1]} training examples, got {k}.")
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def _checked_mask(wrong: np.ndarray, number: int) -> np.ndarray:
    mask = np.asarray(wrong)
    if mask.shape != (number,) or mask.dtype != bool or not mask.any():
        raise ValueError(
            f"wrong must be a bool array of shape ({number},) with at least one True, got "
            f"{mask.dtype} of shape {mask.shape} with {np.count_nonzero(mask)} that are not zero."
        )
    return mask
