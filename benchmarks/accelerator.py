"""What curvax does on an accelerator, in the minutes that there are.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python benchmarks/accelerator.py --minutes 9

The most valuable cases come first. JSON and a table are written as each ends, so the run may be
stopped; the next one goes on with the cases that have no numbers yet. A case or a row that fails
is reported, and the others go on; the exit status is 1 then. The tests run beside it on the host's
processors, where pytest is. It needs JAX, Optax and Flax, and no installed curvax: put the
repository on the PYTHONPATH. The rows of PyTorch need PyTorch, torch-optimizer and
pytorch-optimizer. ``--tiny`` runs all cases at sizes for a test.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import timing

ROOT = Path(__file__).parents[1]
MEMORY = ("temporary_bytes", "peak_bytes")
TESTS = ("tests/golden", "tests/contract", "tests/optimizers", "tests/fisher")


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items() if found)
    command = "python benchmarks/accelerator.py"
    lines = [f"Measured on {results['name']} by `{command}` ({versions}, {results['date']})."]
    copied = results["cases"].get("copy", {}).get("copy", {}).get("gigabytes_per_s")
    for case, rows in results["cases"].items():
        lines += ["", f"### {case}", ""]
        if "error" in rows:
            lines.append(rows["error"])
            continue
        lines += ["| | ms | over Adam's | GB/s | of the copy | temporary MB | peak MB |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        lines += [_line(name, row, copied) for name, row in rows.items()]
    if "tests" in results:
        lines += ["", f"Tests on the host, `{' '.join(TESTS)}`: {results['tests']}"]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any], copied: float | None) -> str:
    if "median_s" not in row:
        text = row.get("error") or row.get("skipped") or _numbers(row)
        first_line, _, _ = text.partition("\n")
        return f"| {name} | {first_line} | | | | | |"
    speed = row.get("gigabytes_per_s")
    cells = [
        f"{row['median_s'] * 1e3:.3g}",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{speed:.0f}" if speed else "",
        f"{speed / copied:.2f}" if speed and copied else "",
        *(f"{row[key] / 1e6:.1f}" if row.get(key) is not None else "" for key in MEMORY),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _numbers(row: dict[str, Any]) -> str:
    """What a row that is no time holds, such as the results of a training run."""
    shown = {key: f"{x:.3g}" if isinstance(x, float) else x for key, x in row.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def start_tests(log: Path) -> subprocess.Popen[bytes]:
    """The tests on the host's processors, beside the accelerator's work."""
    workers = str(max(1, (os.cpu_count() or 2) // 2 - 1))
    options = ("--confcutdir=tests", "-p", "no:benchmark")  # less to install, less to warn about
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, *options, *TESTS]
    quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **quiet}
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no case starts after these")
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["accelerator_cases", "training.cases"],
        help="modules whose all_cases(args) returns cases by name",
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, without the tests")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="with CIFAR-10")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def cases_of(module: str, args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    try:
        return importlib.import_module(module).all_cases(args)
    except Exception as error:  # such as a library that is not installed
        rows = timing.failed(error)
        return {module: lambda: rows}


def run(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return case()
    except Exception as error:  # such as a card without memory: the others go on
        return timing.failed(error)
    finally:
        jax.clear_caches()


def failures(cases: dict[str, Any]) -> list[str]:
    """The cases that failed, and those in which a row did."""
    return [
        name
        for name, rows in cases.items()
        if "error" in rows or any("error" in row for row in rows.values())
    ]


def main() -> None:
    args = parse_args()
    end = time.monotonic() + 60 * args.minutes
    results = {**timing.environment(("jax", "jaxlib", "optax", "flax", "torch")), "cases": {}}
    path = timing.results_path(results, "accelerator", args.output)
    if path.with_suffix(".json").exists():
        earlier = json.loads(path.with_suffix(".json").read_text())["cases"]
        results["cases"] = {name: rows for name, rows in earlier.items() if "error" not in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_name(path.name + "_tests.log")
    tests = None if args.tiny or args.no_tests else start_tests(log)
    cases = {}
    for module in args.cases:
        cases |= cases_of(module, args)
    for name, case in cases.items():
        if name in results["cases"] or args.only not in name:
            continue
        if time.monotonic() > end:
            break
        start = time.monotonic()
        results["cases"][name] = run(case)
        timing.save(results, table(results), path)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if tests is not None:
        results["tests"] = _end_of_tests(tests, log, end)
        timing.save(results, table(results), path)
    print(table(results))
    failed = failures(results["cases"])
    if failed:
        sys.exit(f"Not all could be measured: {'; '.join(failed)}.")


def _end_of_tests(tests: subprocess.Popen[bytes], log: Path, end: float) -> str:
    prefix = ""
    try:
        tests.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        tests.kill()
        prefix = "not finished; "
    return prefix + (log.read_text().strip().splitlines() or ["no output"])[-1]


if __name__ == "__main__":
    main()
