"""The recipes of docs/which-optimizer.md on tasks that were not used to find them."""

from collections.abc import Iterator
from typing import NamedTuple

from training.comparison import BASE, Row, deviations_ahead
from training.optimizers import CONTESTANTS
from training.search import rounded


class Recipe(NamedTuple):
    """A contestant for a kind of task.

    Attributes:
      kind: the kind of task, or of optimizer.
      contestant: its name in the tables.
      found: the tasks on whose validation data the options and the first rate were chosen.
      checked: other tasks of the kind.
    """

    kind: str
    contestant: str
    found: tuple[str, ...]
    checked: tuple[str, ...]


RECIPES = (
    Recipe(
        "CNN",
        "AdaHessian, Nesterov, zeros skipped, interval 10",
        ("fashion-mlp", "fashion-cnn"),
        ("cifar-resnet",),
    ),
    Recipe(
        "transformer",
        "AdaHessian, Nesterov, interval 10",
        ("multi30k",),
        ("shakespeare",),
    ),
    Recipe(
        "badly scaled",
        "Gauss-Newton diagonal, Nesterov, zeros skipped",
        ("clicks",),
        ("poisson", "burgers"),
    ),
    Recipe(
        "M-FAC",
        "M-FAC, relative, Nesterov",
        ("fashion-mlp",),
        ("fashion-cnn", "cifar-resnet", "poisson", "burgers"),
    ),
)


def table(rows: dict[str, dict[str, Row]]) -> Iterator[str]:
    """Each recipe against NAdamW: at the first rates of both, and at the best of six."""
    yield (
        f"| recipe for | contestant | task | found there | its loss, first rate | best rate "
        f"| {BASE}'s, first rate | best rate | deviations ahead |"
    )
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for recipe in RECIPES:
        for task in (*recipe.found, *recipe.checked):
            of_task = rows.get(task, {})
            if recipe.contestant in of_task and BASE in of_task:
                cells = [recipe.kind, recipe.contestant, task]
                cells.append("yes" if task in recipe.found else "no")
                yield f"| {' | '.join([*cells, *_numbers(of_task, recipe.contestant)])} |"


def _numbers(of_task: dict[str, Row], name: str) -> Iterator[str]:
    for contestant in (name, BASE):
        row = of_task[contestant]
        for rate in (rounded(CONTESTANTS[contestant].start), row.rate):
            yield f"{row.trials[rate]:.4g}"
    yield f"{deviations_ahead(of_task[name], of_task[BASE]):+.1f}"
