"""The table and the plot of the pruning benchmark."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def table(results: dict[str, Any]) -> str:
    parts = results["parts"]
    lines = [f"Measured on {results['name']} by `python benchmarks/pruning.py`.", ""]
    if dense := results.get("dense"):
        mean = np.mean([run["accuracy"] for run in dense])
        lines += [
            f"ResNet-20 on Fashion-MNIST, {results['settings']['epochs']:g} epochs; the dense "
            f"networks have a test accuracy of {mean:.2%} ({len(dense)} seeds).",
            "",
        ]
    if rows := parts.get("one-shot"):
        sparsities = sorted({s for row in rows.values() for s in row}, key=float)
        lines += [
            "Test accuracy in % after one-shot pruning, mean ± deviation over seeds, without ± of "
            "one; the number behind a method is that of recomputations.",
            "",
            "| method | " + " | ".join(f"{float(s):.0%}" for s in sparsities) + " |",
            "| --- |" + " ---: |" * len(sparsities),
        ]
        for name, row in rows.items():
            cells = [_cell(row.get(s)) for s in sparsities]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if rows := parts.get("gradual"):
        finals = sorted({s for row in rows.values() for s in row}, key=float)
        settings = results["settings"]
        lines += [
            "",
            "Test accuracy in % after gradual pruning from 50 % in "
            f"{settings['gradual_steps']} steps with {settings['fine_tuning_epochs']:g} epochs of "
            "fine-tuning after each.",
            "",
            "| method | " + " | ".join(f"{float(s):.0%}" for s in finals) + " |",
            "| --- |" + " ---: |" * len(finals),
        ]
        for name, row in rows.items():
            cells = [_cell(row.get(s)) for s in finals]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if rows := parts.get("prediction"):
        lines += [
            "",
            "Predicted against measured change of the loss on 2000 training images, from their "
            "gradients; one leaf pruned at a time, 20 leaves, blocks of 128:",
            "",
            "| method, sparsity of the leaf | correlation | measured over predicted (slope) "
            "| largest change |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {row['correlation']:.3f} | {row['slope']:.2f} | {row['largest']:.1e} |"
            for name, row in rows.items()
        ]
    if rows := parts.get("gradients"):
        lines += [
            "",
            "Milliseconds for gradients of ResNet-20 in evaluation mode: the mean over a batch, "
            "and those of its examples, under a vmap and one after the other.",
            "",
            "| examples | mean | examples together | one by one |",
            "| ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {size} | " + " | ".join(f"{1000 * time:.0f}" for time in row.values()) + " |"
            for size, row in rows.items()
        ]
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict[str, float]] | None) -> str:
    if not runs:
        return ""
    values = 100 * np.array([run["accuracy"] for run in runs])
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def plot(rows: dict[str, Any], path: Path) -> None:
    """Accuracy over sparsity of a few methods."""
    shown = {
        "magnitude": "#d55e00",
        "diagonal Fisher, 16": "#e69f00",
        "saliency alone, 1": "#999999",
        "M-FAC independent, 16": "#56b4e9",
        "M-FAC joint, 1": "#009e73",
        "M-FAC joint, 16": "#0072b2",
        "M-FAC joint, blocks 128, 16": "#cc79a7",
    }
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        label = name.split(";")[0]
        if label in shown and row is not None and name.endswith(next(iter(rows)).split(";")[1]):
            means = [np.mean([run["accuracy"] for run in runs]) for runs in row.values()]
            places = [100 * float(s) for s in row]
            axes.plot(places, means, "o-", color=shown[label], label=label)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("test accuracy")
    axes.set_title("ResNet-20 on Fashion-MNIST, one-shot", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
