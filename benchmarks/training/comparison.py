"""What the runs of a task say: medians and deviations, and the way to a target."""

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from training.optimizers import Contestant
from training.records import Records
from training.search import best_rate

Line = dict[str, Any]
BASE = "NAdamW"  # what deviations are counted from
TARGET_FAMILY = ("Adam", "AdamW", "NAdamW")


class Row(NamedTuple):
    """A contestant on a task.

    Attributes:
      rate: the best of the trials; without trials, the published one.
      is_edge: whether no higher or no lower rate was tried.
      test: the metric of each seed's test data; infinite where a run diverged.
      validation: the same at each judged step, of validation data, for each seed.
      steps: the judged steps.
      milliseconds: a step's time in the fastest run or trial: other programs ran beside some.
      also: the means of the other numbers of test data.
      trials: the metric by rate, infinite where a trial diverged.
    """

    rate: float
    is_edge: bool
    test: list[float]
    validation: list[list[float]]
    steps: list[int]
    milliseconds: float
    also: dict[str, float]
    trials: dict[float, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.test)

    @property
    def median(self) -> float:
        return statistics.median(self.test)

    @property
    def deviation(self) -> float:
        if len(self.test) < 2 or not all(map(math.isfinite, self.test)):
            return math.nan
        return statistics.stdev(self.test)

    def steps_to(self, target: float) -> float:
        """The first judged step at which the validation metric is at the target; a median."""
        reached = [
            next(
                (step for step, value in zip(self.steps, curve, strict=False) if value <= target),
                math.inf,
            )
            for curve in self.validation
        ]
        return statistics.median(reached)


def rows_of(
    records: Records, task: str, size: str, contestants: dict[str, Contestant]
) -> dict[str, Row]:
    """The contestants that have runs with their present settings."""
    found: dict[str, list[Line]] = {name: [] for name in contestants}
    for key, line in records.lines.items():
        known = contestants.get(key.optimizer)
        if known and (key.task, key.size, key.settings) == (task, size, known.words):
            found[key.optimizer].append(line)
    rows = {name: _row(lines) for name, lines in found.items() if lines}
    return {name: row for name, row in rows.items() if row is not None}


def _row(lines: list[Line]) -> Row | None:
    metric = lines[0]["metric"]
    trials = {line["rate"]: final(line) for line in lines if line["is_trial"]}
    runs = [line for line in lines if not line["is_trial"]]
    if trials:
        runs = [run for run in runs if run["rate"] == best_rate(trials)]
    if not runs:
        return None
    whole = [run for run in runs if run["diverged"] is None]
    also = {
        name: statistics.fmean(run["test"][name] for run in whole)
        for name in (whole[0]["test"] if whole else ())
        if name != metric
    }
    return Row(
        rate=runs[0]["rate"],
        is_edge=bool(trials) and runs[0]["rate"] in (min(trials), max(trials)),
        test=[math.inf if run["diverged"] else run["test"][metric] for run in runs],
        validation=[run["validation"].get(metric, []) for run in runs],
        steps=max((run["steps"] for run in runs), key=len),
        milliseconds=1e3 * min(line["seconds"] / line["steps"][-1] for line in lines),
        also=also,
        trials=trials,
    )


def final(line: Line) -> float:
    """The metric on validation data at the end; infinite if the run diverged."""
    if line["diverged"] is not None:
        return math.inf
    return line["validation"][line["metric"]][-1]


def target_of(rows: dict[str, Row]) -> float | None:
    """The median of the final validation metric of the best of Adam's family.

    Of an even number of seeds it is the higher of the middle two, so that most of them reach it.
    """
    finals = [
        statistics.median_high(curve[-1] for curve in rows[name].validation)
        for name in TARGET_FAMILY
        if name in rows and all(map(math.isfinite, rows[name].test))
    ]
    return min(finals, default=None)


def deviations_ahead(row: Row, base: Row) -> float:
    """How far the mean is below the other's, in pooled deviations; negative where it is above."""
    difference = base.mean - row.mean
    if not math.isfinite(difference):
        return difference
    pooled = math.sqrt((row.deviation**2 + base.deviation**2) / 2)
    return difference / pooled if pooled else math.copysign(math.inf, difference)


def profile(costs: dict[str, dict[str, float]], factors: Iterable[float]) -> dict[str, list[float]]:
    """For each contestant the part of the tasks that it solves within a factor of the best.

    Args:
      costs: of each contestant, the cost of each task, infinite where it was not solved.
      factors: the factors, at least 1.
    """
    tasks = {task for by_task in costs.values() for task in by_task}
    best = {task: min(by_task.get(task, math.inf) for by_task in costs.values()) for task in tasks}
    return {
        name: [
            sum(by_task.get(task, math.inf) <= factor * best[task] < math.inf for task in tasks)
            / len(tasks)
            for factor in factors
        ]
        for name, by_task in costs.items()
    }
