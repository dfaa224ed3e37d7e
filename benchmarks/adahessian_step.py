"""What a step of AdaHessian costs, against Adam, Sophia and the PyTorch implementations.

    python benchmarks/adahessian_step.py

ResNet-20 on 32x32x3 images (batch 32) and a 4-layer transformer (width 128, 8 x 128 tokens), all
contestants alternating in one run. Ratios are within that run. Writes JSON and a table to
benchmarks/results/ under the hardware's name.
"""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import models_flax
import optax
import timing

import curvax

PyTree = Any
Carry = tuple[PyTree, PyTree, PyTree]  # params, optimizer state, batch statistics
CYCLE = 10  # a multiple of every refresh interval below
BASE = "optax.adam"
TORCH_BASE = "torch.optim.SGD"


def train_step(tx: Any, gradient: Callable[..., Any]) -> Callable[..., Carry]:
    """A step that updates by what ``gradient`` returns: statistics, gradient, extra arguments."""

    def step(carry: Carry, inputs: jax.Array, targets: jax.Array, *, refresh: Any = None) -> Carry:
        params, state, statistics = carry
        statistics, grads, extra = gradient(params, state, inputs, targets, statistics, refresh)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, statistics

    return step


def plain(problem: models_flax.Problem) -> Callable[..., Any]:
    """The gradient alone; the optimizer gets ``obj_fn``, which Adam ignores."""

    def gradient(params, state, inputs, targets, statistics, refresh):
        del state, refresh
        value_and_grad = jax.value_and_grad(problem.loss, has_aux=True)
        (_, new), grads = value_and_grad(params, inputs, targets, statistics)
        obj_fn = lambda p: problem.loss(p, inputs, targets, statistics)[0]  # noqa: E731
        return new, grads, {"obj_fn": obj_fn}

    return gradient


def one_pass(problem: models_flax.Problem) -> Callable[..., Any]:
    """Gradient and curvature in one pass, the key and the interval from the state."""
    from_state = curvax.value_grad_and_hessian_diag_from_state(problem.loss, has_aux=True)

    def gradient(params, state, inputs, targets, statistics, refresh):
        (_, new), grads, diag = from_state(
            params, inputs, targets, statistics, state=state, refresh=refresh
        )
        return new, grads, {"hessian_diag": diag, "refresh": refresh}

    return gradient


def part_of_batch(problem: models_flax.Problem) -> Callable[..., Any]:
    """The gradient of the batch with the curvature of its first quarter."""
    of_part = curvax.value_grad_and_hessian_diag(problem.loss, has_aux=True)

    def gradient(params, state, inputs, targets, statistics, refresh):
        del refresh
        value_and_grad = jax.value_and_grad(problem.loss, has_aux=True)
        (_, new), grads = value_and_grad(params, inputs, targets, statistics)
        part, key = len(inputs) // 4, jax.random.fold_in(jax.random.key(0), _count(state))
        diag = of_part(params, inputs[:part], targets[:part], statistics, key=key)[2]
        return new, grads, {"hessian_diag": diag, "refresh": True}

    return gradient


def gauss_newton(
    one_pass_of: Callable[..., Any], problem: models_flax.Problem
) -> Callable[..., Any]:
    """Gradient and a Gauss-Newton diagonal from one linearization of the network."""
    estimate = one_pass_of(problem.network, "softmax_cross_entropy", has_aux=True)

    def gradient(params, state, inputs, targets, statistics, refresh):
        del refresh
        key = jax.random.fold_in(jax.random.key(0), _count(state))
        (_, new), grads, diag = estimate(params, inputs, targets, key=key, statistics=statistics)
        return new, grads, {"hessian_diag": diag, "refresh": True}

    return gradient


def _count(state: PyTree) -> jax.Array:
    return optax.tree.get(state, "count")


def contestants(problem: models_flax.Problem) -> dict[str, tuple[Any, Any, Any]]:
    """Name -> optimizer, gradient, and the refresh flags over a cycle (None: in the graph)."""
    ada = functools.partial(curvax.adahessian, 1e-3)
    host = [step % 5 == 0 for step in range(CYCLE)]
    signed = functools.partial(gauss_newton, curvax.value_grad_and_ggn_diag)
    outputs = functools.partial(gauss_newton, curvax.value_grad_and_ggn_diag_from_outputs)
    always, in_graph = [True] * CYCLE, [None] * CYCLE
    return {
        BASE: (optax.adam(1e-3), plain(problem), in_graph),
        "AdaHessian, one pass": (ada(), one_pass(problem), always),
        "AdaHessian, every 5th step, host": (ada(update_interval=5), one_pass(problem), host),
        "AdaHessian, every 5th step, graph": (ada(update_interval=5), one_pass(problem), in_graph),
        "AdaHessian, obj_fn": (ada(), plain(problem), in_graph),
        "AdaHessian, quarter of the batch": (ada(), part_of_batch(problem), always),
        "AdaHessian, Gauss-Newton z * Gz": (ada(), signed(problem), always),
        "AdaHessian, Gauss-Newton outputs": (ada(), outputs(problem), always),
        "optax.contrib.sophia, every 10th": (optax.contrib.sophia(1e-3), plain(problem), in_graph),
    }


def compiled_loop(
    problem: models_flax.Problem, tx: Any, gradient: Any, flags: list[Any]
) -> tuple[timing.Loop, dict[str, int]]:
    """A steady loop with donated buffers, and the largest memory of its steps."""
    step = jax.jit(train_step(tx, gradient), donate_argnums=0, static_argnames="refresh")
    carry = jax.tree.map(
        jax.numpy.copy, (problem.params, tx.init(problem.params), problem.statistics)
    )
    batch = problem.inputs, problem.targets
    compiled = {flag: step.lower(carry, *batch, refresh=flag).compile() for flag in set(flags)}
    memories = [timing.memory_of(c) for c in compiled.values()]
    memory = {key: max(m[key] for m in memories) for key in memories[0]}

    def loop(steps: int) -> None:
        nonlocal carry
        for index in range(steps):
            carry = compiled[flags[index % len(flags)]](carry, *batch)
        jax.block_until_ready(carry)

    return loop, memory


def torch_loops(model: str) -> dict[str, timing.Loop]:
    try:
        import models_torch
        import torch
    except ImportError:
        print("PyTorch is not installed: its rows are left out.")
        return {}
    torch.set_num_threads(timing.hardware()["cpu_cores"])

    def loop_of(contestant: str) -> timing.Loop:
        step = models_torch.training_step(model, contestant)

        def loop(steps: int) -> None:
            for _ in range(steps):
                step()

        return loop

    return {name: loop_of(name) for name in models_torch.CONTESTANTS}


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    problem = models_flax.PROBLEMS[model]()
    loops: dict[str, timing.Loop] = {}
    memory: dict[str, dict[str, int]] = {}
    for name, entry in contestants(problem).items():
        if re.search(args.only, name) or name == BASE:
            loops[name], memory[name] = compiled_loop(problem, *entry)
    if not args.no_torch:
        loops |= torch_loops(model)
    rows = timing.time_loops(loops, seconds=args.seconds, cycle=CYCLE, blocks=args.blocks)
    for name, row in rows.items():
        base = BASE if name in memory else TORCH_BASE
        row["base"], row["ratio"] = base, row["median_s"] / rows[base]["median_s"]
        if name in memory:
            row |= memory[name]
            row["memory_ratio"] = row["temporary_bytes"] / memory[BASE]["temporary_bytes"]
    return {"parameters": sum(p.size for p in jax.tree.leaves(problem.params)), "steps": rows}


def table(results: dict[str, Any]) -> str:
    lines = [f"Measured on {results['name']} by `python benchmarks/adahessian_step.py`."]
    for model, result in results["models"].items():
        lines += ["", f"### {model}, {result['parameters']:,} parameters", ""]
        lines += ["| step | ms | over its base | temporary memory over Adam's |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for name, row in result["steps"].items():
            memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
            ratio = f"{row['ratio']:.2f} x {row['base']}"
            lines.append(f"| {name} | {row['median_s'] * 1e3:.1f} | {ratio} | {memory} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models_flax.PROBLEMS))
    parser.add_argument("--blocks", type=int, default=5, help="blocks for each contestant")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a block lasts")
    parser.add_argument("--only", default="", help="regular expression of contestants to keep")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    packages = ("curvax", "jax", "jaxlib", "optax", "flax", "torch", "torch-optimizer")
    results = {
        **timing.environment((*packages, "pytorch-optimizer")),
        "settings": {"blocks": args.blocks, "seconds": args.seconds, "cycle": CYCLE},
        "models": {model: measure(model, args) for model in args.models},
    }
    timing.write(results, table(results), "adahessian_step", args.output)


if __name__ == "__main__":
    main()
