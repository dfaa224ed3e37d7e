"""The picture of the README, from committed results: training, sharpness and pruning.

.venv/bin/python benchmarks/picture.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sparsity.report import curves_of, read_runs

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "curvax.png"

OURS, OTHERS = "#0072b2", ("#d55e00", "#009e73", "#e69f00")
TRAINED = {"AdaHessian, Nesterov": OURS, "NAdamW": OTHERS[0], "Muon": OTHERS[1]}
PRUNED = {
    "OBS, 4 steps, then layer by layer": (OURS, "Optimal Brain Surgeon"),
    "diagonal Fisher": (OTHERS[2], "diagonal Fisher"),
    "magnitude": (OTHERS[0], "magnitudes"),
    "SparseGPT": (OTHERS[1], "SparseGPT"),
}


def read_json(pattern: str) -> list[Any]:
    """Every line, or the one document, of the files that match."""
    return [
        json.loads(text)
        for path in sorted(RESULTS.glob(pattern))
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        )
    ]


def draw_training(ax: Axes) -> None:
    """The validation loss of a translation model, mean and range over seeds."""
    runs = [
        run
        for run in read_json("training/*.jsonl")
        if run["task"] == "multi30k" and run["size"] == "cpu" and not run["is_trial"]
    ]
    for name, color in TRAINED.items():
        of_name = [run for run in runs if run["optimizer"] == name]
        losses = np.array([run["validation"]["loss"] for run in of_name])
        steps = of_name[0]["steps"]
        ax.plot(steps, losses.mean(axis=0), color=color, label=name)
        ax.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.2)
    ax.set(xlabel="step", ylim=(2.7, 5))
    ax.set_title("Train: a translation model's loss", loc="left", fontsize="medium")


def draw_sharpness(ax: Axes) -> None:
    """The largest eigenvalue of the Hessian under gradient descent, for three learning rates."""
    (results,) = read_json("spectrum_cpu_*.json")
    for (rate, run), color in zip(
        results["parts"]["edge"].items(), (OURS, *OTHERS[:2]), strict=True
    ):
        steps = 5 * np.arange(len(run["sharpness"]))
        ax.plot(steps, run["sharpness"], color=color, label=f"rate {rate}")
        ax.axhline(2 / float(rate), color=color, linestyle="--", linewidth=1)
    ax.set(xlabel="step", ylim=(0, None))
    ax.set_title("Look: sharpness stops at 2 / rate", loc="left", fontsize="medium")


def draw_pruning(ax: Axes) -> None:
    """BLEU of the translation model, pruned without fine-tuning."""
    curves = curves_of(read_runs(), "multi30k")
    for method, (color, label) in PRUNED.items():
        ax.plot(list(curves[method]), list(curves[method].values()), "o-", color=color, label=label)
    ax.set(xlabel="sparsity, %", ylim=(0, None))
    ax.set_title("Prune: its BLEU, no fine-tuning", loc="left", fontsize="medium")


def main() -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for ax, draw in zip(
        figure.subplots(1, 3), (draw_training, draw_sharpness, draw_pruning), strict=True
    ):
        draw(ax)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small")
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
