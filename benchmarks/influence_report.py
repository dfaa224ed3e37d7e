"""Tables of the benchmark of influence scores."""

from typing import Any


def table(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"# Influence scores: {results['name']}",
        "",
        f"Digits, {settings['train']} training and {settings['test']} test examples, "
        f"{settings['subsets']} random halves with {settings['seeds']} networks each; scores from "
        f"{settings['models']} networks, one at a time.",
    ]
    parts = results["parts"]
    for name, rows in parts.get("datamodel", {}).items():
        lines += ["", *_datamodel(name, rows)]
    if "labels" in parts:
        lines += ["", *_labels(parts["labels"])]
    return "\n".join(lines) + "\n"


def _datamodel(name: str, rows: dict[str, Any]) -> list[str]:
    lines = [
        f"## Linear datamodeling scores, {name}",
        "",
        f"{rows['parameters']:,} parameters, test accuracy {rows['accuracy']:.3f}. ± is the "
        "standard error by the bootstrap over subsets.",
        "",
        "| | loss | margin | above gradient products (loss) |",
        "|---|---:|---:|---:|",
    ]
    order = sorted(
        (method for method in rows["loss"] if method not in ("seeds agree", "above EK-FAC")),
        key=lambda method: -rows["loss"][method]["value"],
    )
    for method in order:
        loss, margin = rows["loss"][method], rows["margin"][method]
        lines.append(
            f"| {method} | {_pair(loss['value'], loss['standard_error'])} | "
            f"{_pair(margin['value'], margin['standard_error'])} | "
            f"{_pair(loss['margin'], loss['margin_error'])} |"
        )
    if "above EK-FAC" in rows["loss"]:
        found = [rows[measure]["above EK-FAC"] for measure in ("loss", "margin")]
        loss, margin = (_pair(x["value"], x["standard_error"]) for x in found)
        lines += [
            "",
            f"Gauss-Newton with its default damping, minus the best row of EK-FAC: {loss} (loss), "
            f"{margin} (margin).",
        ]
    agreement = rows["loss"]["seeds agree"]
    if agreement is not None:
        lines += ["", f"Means over either half of the seeds agree to {agreement:.3f}."]
    return lines


def _labels(parts: dict[str, Any]) -> list[str]:
    methods = next(iter(parts.values()))
    lines = [
        "## Wrong labels",
        "",
        "A tenth of the labels is wrong; the share of these among the tenth that is checked first.",
        "",
        f"| | {' | '.join(parts)} |",
        f"|---|{'---:|' * len(parts)}",
    ]
    for method in methods:
        cells = [_pair(p[method]["found"], p[method]["standard_error"]) for p in parts.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _pair(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
