"""Tables and plots of the recorded runs, generated and never typed."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from training import recipes
from training.candidates import CANDIDATES, recipe_of
from training.comparison import (
    BASE,
    TARGET_FAMILY,
    Row,
    deviations_ahead,
    profile,
    rows_of,
    target_of,
)
from training.experiment import TRIALS
from training.optimizers import CONTESTANTS, Contestant
from training.published import PUBLISHED
from training.records import Records
from training.search import rounded
from training.tasks import TASKS

SUMMARY = (
    "SGD",
    "AdamW",
    "NAdamW",
    "Muon",
    "AdaHessian",
    "AdaHessian, Nesterov",
    "AdaHessian, Nesterov, zeros skipped",
    "Gauss-Newton diagonal, Nesterov, zeros skipped",
    "M-FAC",
    "M-FAC, relative, Nesterov",
)
MARKS = "<!-- training: made by make bench-training -->", "<!-- training: end -->"
Rows = dict[str, dict[str, Row]]  # by task, then by contestant
COMMAND = 'make bench-training ARGS="--data-dir DIR'


def write(records: Records, folder: Path, pictures: Path) -> list[Path]:
    """Writes what there is of each size: tables, which are returned, and the profiles."""
    written = []
    for size in sorted({key.size for key in records.lines}):
        rows = _rows(records, size, {**CONTESTANTS, **CANDIDATES})
        machines = {
            line["machine"]["name"] for key, line in records.lines.items() if key.size == size
        }
        path = folder / f"{size}.md"
        published = rows_of(records, "cifar-resnet", size, PUBLISHED)
        path.write_text("\n".join(_page(rows, published, size, sorted(machines))))
        if rows:
            plot_profiles(rows, pictures / f"training_{size}_profiles.png")
        written.append(path)
    short, checked = folder / "summary.md", folder / "recipes.md"
    short.write_text(summary(records) + "\n")
    checked.write_text("\n".join(recipes.table(_rows(records, "cpu", CONTESTANTS))) + "\n")
    return [*written, short, checked]


def update_summary(records: Records, path: Path) -> None:
    """Replaces the short table of a page, between its marks."""
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{summary(records)}\n{MARKS[1]}{after}")


def summary(records: Records) -> str:
    """The test metrics of a few contestants on the tasks of a CPU's size."""
    names = {name: CONTESTANTS[name] for name in SUMMARY}
    return "\n".join(metric_table(_rows(records, "cpu", CONTESTANTS), names))


def _rows(records: Records, size: str, contestants: dict[str, Contestant]) -> Rows:
    rows = {task: rows_of(records, task, size, contestants) for task in TASKS}
    return {task: of_task for task, of_task in rows.items() if of_task}


def _page(rows: Rows, published: dict[str, Row], size: str, machines: list[str]) -> Iterator[str]:
    command = f'{COMMAND} --size {size}"' if size != "cpu" else f'{COMMAND}"'
    yield f"`{command}`; {TRIALS} trials of the rate for each optimizer on each task, the best by"
    yield f"validation data, then {_seeds(rows, CONTESTANTS)}; machines: {', '.join(machines)}."
    yield "\n#### Test metric at the end\n"
    yield from metric_table(rows, CONTESTANTS)
    yield "\n#### Its median, and means of the other test numbers\n"
    yield from numbers_table(rows, CONTESTANTS)
    yield f"\n#### Deviations ahead of {BASE}\n"
    yield from ahead_table(rows, CONTESTANTS, lambda _: BASE)
    yield "\n#### Steps to the target, and seconds, over those of the best of Adam's family\n"
    yield from target_table(rows, CONTESTANTS)
    yield "\n#### Learning rates, and milliseconds per step\n"
    yield from rate_table(rows, CONTESTANTS)
    yield "\n#### What the first learning rate loses against the best of the trials\n"
    yield "The first rate is the same on all tasks; on validation data, in percent.\n"
    yield from start_table(rows, CONTESTANTS)
    if published:
        yield "\n#### At published settings, without trials\n"
        yield from metric_table({"cifar-resnet": published}, PUBLISHED)
    if any(name in of_task for of_task in rows.values() for name in CANDIDATES):
        yield "\n#### Variants: deviations ahead of their recipe\n"
        yield f"Each with {_seeds(rows, CANDIDATES)} (`--candidates --seeds 3`).\n"
        yield from ahead_table(rows, CANDIDATES, recipe_of)
        yield "\n#### Variants: test metric at the end\n"
        yield from metric_table(rows, CANDIDATES)
        yield "\n#### Variants: its median, and means of the other test numbers\n"
        yield from numbers_table(rows, CANDIDATES)
        yield "\n#### Variants: steps to the target, and seconds\n"
        yield from target_table(rows, CANDIDATES)
        yield "\n#### Variants: learning rates, and milliseconds per step\n"
        yield from rate_table(rows, CANDIDATES)
    yield ""


def _seeds(rows: Rows, names: dict[str, Contestant]) -> str:
    """The numbers of seeds that the contestants have."""
    numbers = [
        len(row.test) for part in rows.values() for name, row in part.items() if name in names
    ]
    few, many = min(numbers, default=0), max(numbers, default=0)
    return f"{few} seeds" if few == many else f"{few} to {many} seeds"


def metric_table(rows: Rows, names: dict[str, Contestant]) -> Iterator[str]:
    """Means and deviations of the test metric; the best of all contestants is bold."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        row = of_task[name]
        diverged = sum(map(math.isinf, row.test))
        if diverged:
            return f"{diverged} of {len(row.test)} diverged"
        text = f"{row.mean:.4g} ± {row.deviation:.1g}"
        best = min(of_task[other].mean for other in of_task if other in CONTESTANTS)
        return f"**{text}**" if row.mean == best else text

    yield from _table(rows, names, cell)


def numbers_table(rows: Rows, names: dict[str, Contestant]) -> Iterator[str]:
    """The median of the test metric, and what else test data was judged by."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        row = of_task[name]
        numbers = [f"{key} {value:.3g}" for key, value in row.also.items()]
        return ", ".join([f"{row.median:.4g}", *numbers])

    yield from _table(rows, names, cell)


def ahead_table(
    rows: Rows, names: dict[str, Contestant], base_of: Callable[[str], str]
) -> Iterator[str]:
    """How many pooled deviations each mean is better than that of the contestant's base."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        row, base = of_task[name], of_task.get(base_of(name))
        if base is None or row is base or min(len(row.test), len(base.test)) < 2:
            return "" if row is not base else "0"
        return f"{deviations_ahead(row, base):+.1f}"

    yield from _table(rows, names, cell)


def target_table(rows: Rows, names: dict[str, Contestant]) -> Iterator[str]:
    """Steps and seconds to the target over those of the quickest of Adam's family."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        steps, seconds = (_costs(of_task, kind) for kind in ("steps", "seconds"))
        if not math.isfinite(steps[name]):
            return "-"
        parts = [
            cost[name] / min(cost[adam] for adam in TARGET_FAMILY if adam in cost)
            for cost in (steps, seconds)
        ]
        return ", ".join(f"{part:.2f}" for part in parts)

    yield from _table(rows, names, cell)


def rate_table(rows: Rows, names: dict[str, Contestant]) -> Iterator[str]:
    """The best rate of the trials, marked where it is the largest or smallest, and the time."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        row = of_task[name]
        return f"{row.rate:.3g}{' (edge)' * row.is_edge}, {row.milliseconds:.3g} ms"

    yield from _table(rows, names, cell)


def start_table(rows: Rows, names: dict[str, Contestant]) -> Iterator[str]:
    """The metric at the rate that the search starts from, over that of the best trial."""

    def cell(of_task: dict[str, Row], name: str) -> str:
        row = of_task[name]
        first, best = row.trials[rounded(names[name].start)], row.trials[row.rate]
        return f"{100 * (first / best - 1):.3g}" if math.isfinite(first) else "diverged"

    yield from _table(rows, names, cell)


def plot_profiles(rows: Rows, path: Path) -> None:
    """The part of the tasks that each of a few solves within a factor of the best of them."""
    import matplotlib.pyplot as plt  # the tests of the oldest versions go without

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    factors = np.geomspace(1, 8, 200)
    for axis, kind in zip(axes, ("steps", "seconds"), strict=True):
        costs: dict[str, dict[str, float]] = {name: {} for name in SUMMARY}
        for task, of_task in rows.items():
            for name, cost in _costs(of_task, kind).items():
                if name in costs:
                    costs[name][task] = cost
        for number, (name, parts) in enumerate(profile(costs, factors).items()):
            axis.step(factors, parts, where="post", label=name, ls=("-", "--", ":")[number // 10])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=f"{kind} to the target, over the best optimizer's")
    axes[0].set(ylabel="part of the tasks", ylim=(0, 1.02))
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _costs(of_task: dict[str, Row], kind: str) -> dict[str, float]:
    target = target_of(of_task)
    if target is None:
        return dict.fromkeys(of_task, math.inf)
    unit = {
        name: row.milliseconds / 1e3 if kind == "seconds" else 1 for name, row in of_task.items()
    }
    return {name: row.steps_to(target) * unit[name] for name, row in of_task.items()}


def _table(
    rows: Rows, names: dict[str, Contestant], cell: Callable[[dict[str, Row], str], str]
) -> Iterator[str]:
    yield f"| | {' | '.join(rows)} |"
    yield f"| --- |{' ---: |' * len(rows)}"
    for name in names:
        if any(name in of_task for of_task in rows.values()):
            cells = [cell(of_task, name) if name in of_task else "" for of_task in rows.values()]
            yield f"| {name} | {' | '.join(cells)} |"
