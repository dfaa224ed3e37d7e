"""Steady loops, alternated in blocks within one run; medians and quartiles of a step's time.

Also what else a file of results holds: versions, hardware, names.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

try:
    from tqdm import tqdm
except ImportError:  # a bar is all that is missing then

    def tqdm(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items


PyTree = Any
Row = dict[str, Any]
Loop = Callable[[int], None]  # runs so many steps and waits for the last

_PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: 5 sets the peak to what is in use


def time_loops(
    loops: dict[str, Loop], *, seconds: float, cycle: int, blocks: int
) -> dict[str, Any]:
    """Times every loop ``blocks`` times in turn.

    A block is a steady loop of a whole number of cycles: single calls that alternate would
    pay for each other's page faults.

    Args:
      loops: the contestants.
      seconds: about how long a block lasts.
      cycle: the number of steps after which a contestant repeats itself.
      blocks: how many blocks each gets.

    Returns:
      For each contestant: median and quartiles of the seconds a step, and the step's number.
    """
    steps = {}
    for name, loop in tqdm(loops.items(), desc="warm up", leave=False, disable=None):
        loop(cycle)  # compiles
        start = time.perf_counter()
        loop(cycle)
        elapsed = time.perf_counter() - start
        steps[name] = cycle * max(1, round(seconds / elapsed))
    samples: dict[str, list[float]] = {name: [] for name in loops}
    turns = [name for _ in range(blocks) for name in loops]
    for name in tqdm(turns, desc="blocks", leave=False, disable=None):
        start = time.perf_counter()
        loops[name](steps[name])
        samples[name].append((time.perf_counter() - start) / steps[name])
    return {name: _summary(samples[name], steps[name]) for name in loops}


def repeated(function: Callable[[], Any]) -> Loop:
    """A call, as a loop to time."""

    def loop(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(function())

    return loop


class Streaming:
    """A step with donated state that goes through a pool of inputs, as a loop to time."""

    def __init__(self, step: Callable[..., Any], state: PyTree, pool: list[Any]):
        compiled = jax.jit(step, donate_argnums=0).lower(state, *pool[0]).compile()
        self.memory = memory_of(compiled)
        self.state = state
        self._step, self._pool = compiled, itertools.cycle(pool)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.state, output = self._step(self.state, *next(self._pool))
        jax.block_until_ready((self.state, output))


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled step: what is temporary, and the most that there is at once."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    temporary = found.temp_size_in_bytes
    return {"temporary_bytes": temporary, "peak_bytes": held + temporary}


@dataclasses.dataclass(frozen=True)
class Measure:
    """Times loops; one that fails is a row with its error, and the others go on."""

    seconds: float
    blocks: int

    def alone(self, make: Callable[[], Loop], *, cycle: int) -> Row:
        """A loop that is made for its turn, where two would not fit into memory."""
        try:
            loop = make()
            row = time_loops({"": loop}, cycle=cycle, **dataclasses.asdict(self))[""]
            return {**row, **getattr(loop, "memory", {})}
        except Exception as error:  # such as a card without memory
            return failed(error)

    def together(self, loops: dict[str, Loop], *, cycle: int) -> dict[str, Row]:
        rows, good = {}, {}
        for name, loop in loops.items():
            try:
                loop(cycle)
                good[name] = loop
            except Exception as error:
                rows[name] = failed(error)
        return {**time_loops(good, cycle=cycle, **dataclasses.asdict(self)), **rows}


def add_ratios(rows: dict[str, Row], base: str) -> None:
    """How long each step takes, relative to that of ``base``, where that was timed."""
    timed = [row for row in rows.values() if "median_s" in row]
    if "median_s" in rows.get(base, {}):
        for row in timed:
            row["ratio"] = row["median_s"] / rows[base]["median_s"]


def failed(error: BaseException) -> Row:
    """The row, or the case, that an error leaves."""
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _summary(samples: list[float], steps: int) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_s": median, "lower_quartile_s": low, "upper_quartile_s": high, "steps": steps}


def hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak_memory(*, reset: bool = False) -> int:
    """The largest resident memory in bytes so far, or since it was reset."""
    if reset and _PEAK_RESET.exists():
        _PEAK_RESET.write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """The head of a file of results: where, when and with what it was measured."""
    machine = hardware()
    device = machine["cpu"] if machine["platform"] == "cpu" else machine["device"]
    return {
        "name": f"{device}, {machine['cpu_cores']} cores",
        "hardware": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {package: _version(package) for package in packages},
    }


def write(results: dict[str, Any], table: str, script: str, output: Path) -> None:
    """Writes results as JSON and a table under the hardware's name, and prints the table."""
    path = results_path(results, script, output)
    save(results, table, path)
    print(table)
    print(f"Written to {path}.json and .md")


def results_path(results: dict[str, Any], script: str, output: Path) -> Path:
    """Where a script's results on this hardware go, without a suffix."""
    name = f"{results['hardware']['platform']} {results['name']}"
    return output / f"{script}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}"


def save(results: dict[str, Any], table: str, path: Path) -> None:
    """Writes the JSON and the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
