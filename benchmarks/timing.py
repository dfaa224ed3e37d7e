"""Steady loops, alternated in blocks within one run; medians and quartiles of a step's time."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

Loop = Callable[[int], None]  # runs so many steps and waits for the last


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
    for name, loop in tqdm(loops.items(), desc="warm up", leave=False):
        loop(cycle)  # compiles
        start = time.perf_counter()
        loop(cycle)
        elapsed = time.perf_counter() - start
        steps[name] = cycle * max(1, round(seconds / elapsed))
    samples: dict[str, list[float]] = {name: [] for name in loops}
    turns = [name for _ in range(blocks) for name in loops]
    for name in tqdm(turns, desc="blocks", leave=False):
        start = time.perf_counter()
        loops[name](steps[name])
        samples[name].append((time.perf_counter() - start) / steps[name])
    return {name: _summary(samples[name], steps[name]) for name in loops}


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
