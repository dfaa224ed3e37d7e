"""What curvax does on an accelerator, in the minutes that there are.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python benchmarks/accelerator.py --minutes 9

The most valuable cases come first. JSON and a table are written as each ends, so the run may be
stopped; the next one goes on with the cases that have no numbers yet. The tests run beside it on
the host's processors. It needs JAX, Optax, Flax, SciPy and tqdm, and no installed curvax: put the
repository on the PYTHONPATH. ``--tiny`` runs all cases at sizes for a test.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerator_cases
import jax
import timing

ROOT = Path(__file__).parents[1]
TESTS = ("tests/golden", "tests/contract", "tests/optimizers", "tests/fisher")


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    command = "python benchmarks/accelerator.py"
    lines = [f"Measured on {results['name']} by `{command}` ({versions}, {results['date']})."]
    copied = results["cases"].get("copy", {}).get("copy", {}).get("gigabytes_per_s")
    for case, rows in results["cases"].items():
        lines += ["", f"### {case}", ""]
        if "error" in rows:
            lines.append(rows["error"])
            continue
        lines += ["| | ms | over Adam's | GB/s | of the copy | temporary MB |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        lines += [_line(name, row, copied) for name, row in rows.items()]
    if "tests" in results:
        lines += ["", f"Tests on the host, `{' '.join(TESTS)}`: {results['tests']}"]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any], copied: float | None) -> str:
    if "error" in row:
        return f"| {name} | {row['error'].splitlines()[0]} | | | | |"
    if "relative_error" in row:
        return f"| {name} | error {row['relative_error']:.1e} | | | | |"
    speed, share = row.get("gigabytes_per_s"), ""
    if speed and copied:
        share = f"{speed / copied:.2f}"
    cells = [
        f"{row['median_s'] * 1e3:.3g}",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{speed:.0f}" if speed else "",
        share,
        f"{row['temporary_bytes'] / 1e6:.1f}" if row.get("temporary_bytes") is not None else "",
    ]
    return f"| {name} | {' | '.join(cells)} |"


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
    parser.add_argument("--tiny", action="store_true", help="small sizes, without the tests")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    end = time.monotonic() + 60 * args.minutes
    results = {
        **timing.environment(("jax", "jaxlib", "optax", "flax")),
        "cases": {},
    }
    path = timing.results_path(results, "accelerator", args.output)
    if path.with_suffix(".json").exists():
        results["cases"] = json.loads(path.with_suffix(".json").read_text())["cases"]
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_name(path.name + "_tests.log")
    tests = None if args.tiny or args.no_tests else start_tests(log)
    for name, case in accelerator_cases.all_cases(args.tiny).items():
        if "error" not in results["cases"].get(name, {"error": ""}) or args.only not in name:
            continue
        if time.monotonic() > end:
            break
        start = time.monotonic()
        try:
            results["cases"][name] = case()
        except Exception as error:  # such as a card without memory: the others go on
            results["cases"][name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        jax.clear_caches()
        timing.save(results, table(results), path)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if tests is not None:
        results["tests"] = _end_of_tests(tests, log, end)
        timing.save(results, table(results), path)
    print(table(results))


def _end_of_tests(tests: subprocess.Popen[bytes], log: Path, end: float) -> str:
    try:
        tests.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        tests.kill()
        return "not finished; " + log.read_text().strip().splitlines()[-1]
    return log.read_text().strip().splitlines()[-1]


if __name__ == "__main__":
    main()
