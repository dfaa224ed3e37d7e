"""Tables and a picture of all finished runs."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsity.experiment import Cell
from sparsity.methods import METHODS, SETTINGS, Target
from sparsity.networks import RECIPES

RESULTS = Path(__file__).parents[1] / "results" / "sparsity"
DOCS = Path(__file__).parents[2] / "docs"
MARKS = "<!-- tables of make bench-pruning -->", "<!-- end of the tables -->"


class Metric(NamedTuple):
    """What a table shows of a run, and the title of its picture."""

    title: str
    words: str
    of: Any  # a run's numbers -> a number
    digits: int


METRICS = {
    "cifar-resnet": Metric(
        "ResNet-20 on CIFAR-10", "Test accuracy, %", lambda run: 100 * (1 - run["error"]), 1
    ),
    "fashion-resnet": Metric(
        "ResNet-20 on Fashion-MNIST", "Test accuracy, %", lambda run: 100 * (1 - run["error"]), 1
    ),
    "shakespeare": Metric(
        "Character model of Shakespeare",
        "Test perplexity of a character",
        lambda run: np.exp(run["loss"]),
        3,
    ),
    "multi30k": Metric("Translation of Multi30k", "Test BLEU", lambda run: run["bleu"], 1),
}
SHOWN = {  # in the picture
    "magnitude": "#d55e00",
    "diagonal Fisher": "#e69f00",
    "M-FAC as published": "#56b4e9",
    "SparseGPT": "#999999",
    "layer by layer": "#009e73",
    "OBS, 4 steps": "#0072b2",
    "OBS, 4 steps, then layer by layer": "#cc79a7",
}

_FEWEST = 3  # sparsities that make a curve

Runs = dict[Cell, dict[str, Any]]


def read_runs(folder: Path = RESULTS) -> Runs:
    """The runs of all machines."""
    runs: Runs = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            runs.setdefault(Cell(*line["key"]), line["run"])
    return runs


def write_report() -> None:
    """Tables in the results' folder and in the documentation, and its picture."""
    runs = read_runs()
    (RESULTS / "tables.md").write_text("\n".join(page(runs)) + "\n")
    document = DOCS / "pruning.md"
    document.write_text(with_tables(document.read_text(), runs))
    if figure := plot(runs):
        figure.savefig(DOCS / "images" / "pruning.png", dpi=150)


def with_tables(text: str, runs: Runs) -> str:
    """A page with the tables of the metrics between its marks."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    tables = [
        "\n".join(metric_table(own))
        for network in RECIPES
        if (own := {cell: run for cell, run in runs.items() if cell.network == network})
    ]
    return before + "\n\n".join([MARKS[0], *tables, MARKS[1]]) + after


def page(runs: Runs) -> Iterator[str]:
    """All tables."""
    yield "`cd benchmarks; python -m sparsity --data-dir DIR`"
    for network in RECIPES:
        own = {cell: run for cell, run in runs.items() if cell.network == network}
        if own:
            yield ""
            yield from metric_table(own)
            yield "\nSeconds, with compilations, and MiB beyond those of the start:\n"
            yield from cost_table(own)


def metric_table(runs: Runs) -> Iterator[str]:
    """A row for each method, a column for each target."""
    (network,) = {cell.network for cell in runs}
    metric = METRICS[network]
    values = _values(runs, network)
    targets, dense = _targets(runs), values["dense", ""]
    whole = _cell(dense, metric.digits, {})
    seeds = f"{len(dense)} seed{'s' * (len(dense) != 1)}"
    yield f"**{network}.** {metric.words}; of the dense networks {whole}, {seeds}.\n"
    yield "| method | " + " | ".join(Target.of(target).name for target in targets) + " |"
    yield "| --- |" + " ---: |" * len(targets)
    for method in (*METHODS, *SETTINGS):
        cells = [_cell(values[method, target], metric.digits, dense) for target in targets]
        if any(cells):
            yield f"| {method} | " + " | ".join(cells) + " |"


def cost_table(runs: Runs) -> Iterator[str]:
    """The median seconds and the largest memory of each method."""
    yield "| method | s | MiB |"
    yield "| --- | ---: | ---: |"
    for method in (*METHODS, *SETTINGS):
        own = [run for cell, run in runs.items() if cell.method == method]
        if own:
            seconds = np.median([run["seconds"] for run in own])
            memory = max(run["bytes"] for run in own) / 2**20
            yield f"| {method} | {seconds:.0f} | {memory:.0f} |"


def _targets(runs: Runs) -> list[str]:
    """Shares first, then N:M."""
    names = {cell.target for cell in runs if cell.method != "dense"}
    return sorted(names, key=lambda name: (":" in name, name))


def _values(runs: Runs, network: str) -> dict[tuple[str, str], dict[int, float]]:
    """The metric for each method and target, by seed; the dense networks have the target ""."""
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for cell, run in sorted(runs.items()):
        if cell.network == network:
            target = "" if cell.method == "dense" else cell.target
            values[cell.method, target][cell.seed] = METRICS[network].of(run)
    return values


def _cell(values: dict[int, float], digits: int, dense: dict[int, float]) -> str:
    """The mean, and the deviation of what is lost against the same seed's network."""
    if not values:
        return ""
    lost = [value - dense.get(seed, 0.0) for seed, value in values.items()]
    spread = f" ± {np.std(lost, ddof=1):.{digits}f}" if len(lost) > 1 else ""
    few = f" ({len(lost)} seed{'s' * (len(lost) > 1)})" if len(lost) < len(dense) else ""
    return f"{_mean(values, dense):.{digits}f}{spread}{few}"


def _mean(values: dict[int, float], dense: dict[int, float]) -> float:
    """The mean network's value, of all seeds, plus what is lost by those that were pruned."""
    lost = np.mean([value - dense.get(seed, 0.0) for seed, value in values.items()])
    return float(lost + (np.mean(list(dense.values())) if dense else 0))


def plot(runs: Runs) -> Any:
    """The metric over sparsity, a panel for each network with enough of them: a figure, or None."""
    from matplotlib.figure import Figure  # where it is drawn

    panels = {
        network: curves
        for network in RECIPES
        if (curves := curves_of(runs, network)) and max(map(len, curves.values())) >= _FEWEST
    }
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 3.2 * rows + 0.6), layout="constrained")
    drawn = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (network, curves) in zip(drawn, panels.items(), strict=False):
        for method, curve in curves.items():
            style = {"color": SHOWN[method], "label": method, "markersize": 3}
            axes.plot(list(curve), list(curve.values()), "o-", **style)
        if dense := _values(runs, network)["dense", ""]:
            mean = np.mean(list(dense.values()))
            axes.axhline(mean, color="black", linestyle=":", linewidth=1, label="dense")
        axes.set_title(METRICS[network].title, loc="left", fontsize="medium")
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(METRICS[network].words)
        if network == "shakespeare":
            axes.set_yscale("log", subs=[1, 2, 4, 6])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in drawn:  # what is left of the grid
        axes.set_axis_off()
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
    )
    return figure


def curves_of(runs: Runs, network: str) -> dict[str, dict[float, float]]:
    """For each method of the picture the mean over seeds, by the sparsity in percent."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    values = _values(runs, network)
    for method in SHOWN:
        for target in sorted(target for own, target in values if own == method):
            if ":" not in target:
                mean = _mean(values[method, target], values["dense", ""])
                curves[method][100 * float(target)] = mean
    return curves
