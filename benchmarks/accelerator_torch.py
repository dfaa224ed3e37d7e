"""Steps of the PyTorch optimizers on the same device, in a process of their own.

JAX keeps most of a card's memory while it lives. Of an H100's, a fraction of 0.92 leaves 6 GB to
PyTorch, which is more than a ResNet-20 needs.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import timing

Rows = dict[str, dict[str, Any]]
BASE = "torch.optim.Adam"
CYCLE = 2
SECONDS = 240  # after which the process is stopped


def rows(model: str, batch_size: int, measure: timing.Measure) -> Rows:
    """A row for each optimizer, its time over that of PyTorch's Adam."""
    options = [model, batch_size, jax.default_backend(), measure.seconds, measure.blocks]
    command = [sys.executable, __file__, *map(str, options)]
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return {"PyTorch": {"error": f"exit status {error.returncode}: {last}"}}
    except subprocess.TimeoutExpired as error:
        return {"PyTorch": timing.failed(error)}
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(model: str, batch_size: int, backend: str, measure: timing.Measure) -> Rows:
    try:
        import models_torch
        import torch
    except ImportError as error:
        return {"PyTorch": {"skipped": f"PyTorch cannot be imported: {error}"}}
    device = {"gpu": "cuda", "cpu": "cpu"}.get(backend)
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        return {"PyTorch": {"skipped": f"PyTorch {torch.__version__} sees no {backend.upper()}"}}
    loops: dict[str, timing.Loop] = {}
    memory: dict[str, dict[str, int]] = {}
    others: Rows = {}
    for name in models_torch.CONTESTANTS:
        make = functools.partial(models_torch.training_step, model, name, batch_size, device)
        try:
            loops[name], memory[name] = _warm_loop(make, torch.cuda if device == "cuda" else None)
        except ImportError as error:
            others[name] = {"skipped": str(error)}
        except Exception as error:  # such as a card without memory
            others[name] = timing.failed(error)
    timed = measure.together(loops, cycle=CYCLE)
    for name, found in memory.items():
        timed[name] |= found
    timing.add_ratios(timed, BASE)
    return timed | others


def _warm_loop(
    make: Callable[[], Callable[[], None]], cuda: Any | None
) -> tuple[timing.Loop, dict[str, int]]:
    """A loop that has run, and what it took of the card's memory."""
    if cuda:
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
    step = make()

    def loop(steps: int) -> None:
        for _ in range(steps):
            step()
        if cuda:
            cuda.synchronize()

    loop(CYCLE)
    return loop, {"peak_bytes": cuda.max_memory_allocated() - before} if cuda else {}


def main() -> None:
    model, batch_size, backend, seconds, blocks = sys.argv[1:]
    measure = timing.Measure(float(seconds), int(blocks))
    print(json.dumps(measure_here(model, int(batch_size), backend, measure)))


if __name__ == "__main__":
    main()
