"""Tables and plots of the spectrum benchmark."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from spectrum_contestants import TOP

from curvax import spectrum

NUM_OUTLIERS = 9  # the classes of Fashion-MNIST less one


def peers_table(rows: dict[str, Any], images: int) -> list[str]:
    lines = [
        f"Hessian of a network of {rows['parameters']:,} parameters on {images:,} images, float32. "
        "Seconds of a second run in the same process, over curvax's, of the first with what it "
        "compiles, and the memory of both beyond libraries and data.",
        "",
        "| task | library | seconds | over curvax | first run | memory, MB | result |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    titles = {
        "eigenvalues": f"{TOP} largest eigenvalues",
        "trace": "trace, 30 probes",
        "lanczos": "50 Lanczos steps",
    }
    for task, title in titles.items():
        for name, row in rows[task].items():
            ratio = row["seconds"] / rows[task]["curvax"]["seconds"]
            lines.append(
                f"| {title} | {name} | {row['seconds']:.2f} | {ratio:.2f} | "
                f"{row['first_seconds']:.2f} | {row['megabytes']:.0f} | {_result(row)} |"
            )
    return lines


def _result(row: dict[str, Any]) -> str:
    if "values" in row:
        products = f", {row['products']} products" if "products" in row else ""
        return f"largest {row['values'][0]:.4f}, error {row['error']:.0e}{products}"
    error = f" ± {row['standard_error']:.2f}" if "standard_error" in row else ""
    return f"{row['value']:.2f}{error}"


def plot_full(spectra: dict[int, Any], output: Path) -> None:
    figure = Figure(figsize=(10, 3.2 * len(spectra)), layout="constrained")
    for epochs, row in zip(spectra, figure.subplots(len(spectra), 2, squeeze=False), strict=True):
        density, pairs = spectra[epochs]
        spectrum.plot_density(density, outliers=pairs.values[:NUM_OUTLIERS], ax=row[0])
        title = f"epochs: {epochs}; density, nine largest eigenvalues"
        row[0].set_title(title, loc="left", fontsize="medium")
        row[1].plot(np.arange(1, len(pairs.values) + 1), pairs.values, "o", color="#0072b2")
        row[1].axvline(NUM_OUTLIERS + 0.5, color="0.5", linestyle=":")
        row[1].set(xlabel="number", yscale="log")
        row[1].xaxis.get_major_locator().set_params(integer=True)
        title = "largest eigenvalues; classes less one dotted"
        row[1].set_title(title, loc="left", fontsize="medium")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "spectrum_full.png", dpi=150)


def full_table(rows: dict[str, Any]) -> list[str]:
    one = next(iter(rows.values()))
    lines = [
        f"Hessian over {one['images']:,} images, streamed in batches of 2,000: the "
        f"{len(one['eigenvalues'])} largest eigenvalues to 1 %, and the density from 4 probes of "
        "order 80.",
        "",
        "| epochs of training | eigenvalues | density | nine largest eigenvalues | the next three "
        "| ninth over tenth | widest ratio after | within 1 % of the largest around zero | "
        "lowest node | error of the density |",
        "| ---: | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for epochs, row in rows.items():
        values = [f"{value:.3g}" for value in row["eigenvalues"]]
        number = NUM_OUTLIERS
        lines.append(
            f"| {epochs} "
            f"| {row['eigenvalue_seconds']:.0f} s, {row['eigenvalue_products']} products "
            f"| {row['density_seconds']:.0f} s, {row['density_products']} products "
            f"| {', '.join(values[:number])} | {', '.join(values[number : number + 3])} "
            f"| {row['ninth_over_tenth']:.2f} | {row['widest_of_the_next']:.2f} "
            f"| {row['share_near_zero']:.2%} | {row['lowest_node']:.2g} "
            f"| {row['wasserstein_error']:.2g} |"
        )
    return lines


def plot_edge(results: dict[str, Any], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for (rate, row), color in zip(results.items(), colors, strict=False):
        steps = 5 * np.arange(len(row["losses"]))
        left.semilogy(steps, row["losses"], color=color, label=f"rate {rate}")
        right.plot(steps, row["sharpness"], color=color)
        right.axhline(2 / float(rate), color=color, linestyle="--", linewidth=1)
    left.set(xlabel="step")
    left.set_title("training loss", loc="left", fontsize="medium")
    left.legend(frameon=False)
    right.set(xlabel="step")
    right.set_title("sharpness; 2 / rate dashed", loc="left", fontsize="medium")
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "spectrum_edge_of_stability.png", dpi=150)


def edge_table(rows: dict[str, Any], args: argparse.Namespace) -> list[str]:
    lines = [
        f"Gradient descent on the squared error of {args.edge_images:,} centered images, a "
        f"network of two hidden layers of 32, {args.edge_steps:,} steps. Sharpness over 2 / rate "
        "is that of the last quarter.",
        "",
        "| rate | 2 / rate | sharpness at the start | lowest | median over 2 / rate | range | "
        "last loss |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rate, row in rows.items():
        low, high = row["late_range_over_edge"]
        lines.append(
            f"| {rate} | {2 / float(rate):.0f} | {row['first_sharpness']:.1f} | "
            f"{row['lowest_sharpness']:.1f} | "
            f"{row['late_median_over_edge']:.3f} | {low:.3f} to {high:.3f} | "
            f"{row['last_loss']:.4f} |"
        )
    return lines


def table(results: dict[str, Any], args: argparse.Namespace) -> str:
    parts = results["parts"]
    lines = [f"Measured on {results['name']} by `python benchmarks/spectrum.py`."]
    if "peers" in parts:
        lines += ["", *peers_table(parts["peers"], args.peer_images)]
    if "full" in parts:
        lines += ["", *full_table(parts["full"])]
    if "edge" in parts:
        lines += ["", *edge_table(parts["edge"], args)]
    return "\n".join(lines) + "\n"
