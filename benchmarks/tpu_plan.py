"""What a training step of seven billion parameters takes on TPU pods, as the TPU compiler plans it.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/tpu_plan.py

Nothing runs and no TPU is needed: the step is compiled for the chips of a pod, and its memory and
its communication are read from the program. `make bench-tpu` sets up what it needs.
Rows that are there already are kept: ``--only sparse`` compiles those whose name has the word anew.
The model's layers are one scan, so that their number makes little difference to the time.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import timing
from models_llama import Llama, num_params

import curvax
from tests.hlo import collectives
from tests.tpu.compiler import compiled, make_mesh, num_bytes, state_of, trouble

PyTree = Any
GIGABYTE = 1e9
# Value, gradient and what goes to the update beside it.
Gradient = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree, dict[str, Any]]]


class Pod(NamedTuple):
    """A topology, the parts of the batch, the parts of each matrix, sequences a part."""

    topology: str
    data: int
    tensor: int
    sequences: int
    memory: int  # of a chip, in gigabytes

    @property
    def name(self) -> str:
        return f"{self.topology}, {self.data} x {self.tensor}"


PODS = (
    Pod("v5e:16x16", 32, 8, 4, 16),
    Pod("v5e:16x16", 256, 1, 1, 16),
    Pod("v5p:4x4x4", 16, 4, 4, 95),
    Pod("v5p:8x8x8", 64, 8, 4, 95),
)
TINY = (Pod("v5e:2x4", 4, 2, 1, 16),)
ADAM, REFRESH, BETWEEN = "Adam", "AdaHessian, each step", "AdaHessian, between refreshes"
INTERVAL = 10


def contestants(model: Llama, mesh: jax.sharding.Mesh) -> dict[str, tuple[Any, Gradient]]:
    """An optimizer and its gradient, by name."""
    loss, network = model.loss(mesh), model.network(mesh)
    adahessian = curvax.adahessian(0.1)
    interval = curvax.adahessian(0.1, update_interval=INTERVAL)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
    outputs = curvax.from_state(
        curvax.value_grad_and_ggn_diag_from_outputs(network, "softmax_cross_entropy")
    )

    def plain(params: PyTree, _: PyTree, tokens: jax.Array) -> Any:
        return *jax.value_and_grad(loss)(params, tokens), {}

    def refresh(params: PyTree, state: PyTree, tokens: jax.Array) -> Any:
        value, grads, diag = one_pass(params, tokens, state=state)
        return value, grads, {"hessian_diag": diag}

    def between(params: PyTree, state: PyTree, tokens: jax.Array) -> Any:
        value, grads, _ = one_pass(params, tokens, state=state, refresh=False)
        return value, grads, {"refresh": False}

    def gauss_newton(params: PyTree, state: PyTree, tokens: jax.Array) -> Any:
        value, grads, diag = outputs(params, tokens[:, :-1], tokens[:, 1:], state=state)
        return value, grads, {"hessian_diag": diag}

    return {
        ADAM: (optax.adam(1e-3), plain),
        REFRESH: (adahessian, refresh),
        BETWEEN: (interval, between),
        "AdaHessian, Gauss-Newton from outputs": (adahessian, gauss_newton),
        "M-FAC, 32 gradients, bfloat16": (
            curvax.mfac(1e-3, num_grads=32, window_dtype="bfloat16"),
            plain,
        ),
        "M-FAC, 1024 gradients, sparse 0.01": (
            curvax.mfac(1e-3, num_grads=1024, density=0.01),
            plain,
        ),
    }


def plan(tx: Any, gradient: Gradient, params: PyTree, tokens: jax.ShapeDtypeStruct) -> dict:
    """Memory and communication of a training step on one chip, in bytes."""

    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
        value, grads, curvature = gradient(params, state, tokens)
        updates, state = tx.update(grads, state, params, **curvature)
        return optax.apply_updates(params, updates), state, value

    start = time.perf_counter()
    state = state_of(tx, params)
    program = compiled(step, params, state, tokens, donate=(0, 1))
    memory = program.memory_analysis()
    communication: dict[str, dict[str, int]] = {}
    for one in collectives(program.as_text()):
        kind = communication.setdefault(one.kind, {"number": 0, "bytes": 0})
        kind["number"] += one.runs
        kind["bytes"] += one.runs * one.num_bytes
    return {
        "state_bytes": num_bytes(state),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "communication": communication,
        "compile_s": round(time.perf_counter() - start, 1),
    }


def moved(row: dict[str, Any]) -> int:
    """Bytes that arrive at a chip where an array is gathered or shuffled."""
    kinds = row["communication"].items()
    return sum(kind["bytes"] for name, kind in kinds if name != "all-reduce")


def summed(row: dict[str, Any]) -> int:
    """Bytes that are summed over chips."""
    return row["communication"].get("all-reduce", {"bytes": 0})["bytes"]


def table(results: dict[str, Any]) -> str:
    size = f"{results['parameters'] / 1e9:.2f} billion parameters, {results['layers']} layers"
    lines = [
        f"A training step of {size}, compiled for pods by `make bench-tpu`. Gigabytes a chip and "
        "step; what is gathered or summed over Adam's in parentheses."
    ]
    for pod, entry in results["pods"].items():
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        lines += ["", f"### {pod} chips", ""]
        lines += [f"Sequences a part of the batch: {entry['sequences']}. {versions}.", ""]
        lines += ["| optimizer | state | arguments | temporary | gathered | summed | collectives |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        lines += [_line(name, row, entry["rows"].get(ADAM)) for name, row in entry["rows"].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any], adam: dict[str, Any] | None) -> str:
    if "error" in row:
        return f"| {name} | {row['error']} | | | | | |"

    def gigabytes(number: int, base: int | None = None) -> str:
        over = f" ({number / base:.2f})" if base else ""
        return f"{number / GIGABYTE:.2f}{over}"

    known = adam if adam and "error" not in adam else None
    cells = [
        gigabytes(row["state_bytes"]),
        gigabytes(row["argument_bytes"]),
        gigabytes(row["temporary_bytes"]),
        gigabytes(moved(row), moved(known) if known else None),
        gigabytes(summed(row), summed(known) if known else None),
        str(sum(kind["number"] for kind in row["communication"].values())),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="", help="optimizers or pods whose name has this, anew")
    parser.add_argument("--tiny", action="store_true", help="a small model on eight chips")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if reason := trouble():
        raise SystemExit(reason)
    model = Llama(2, 256, 8, 512, 1024, 64) if options.tiny else Llama(layers=options.layers)
    path = options.output / ("tpu_plan_tiny" if options.tiny else "tpu_plan")
    results: dict[str, Any] = {"layers": model.layers, "pods": {}}
    if path.with_suffix(".json").exists():
        results["pods"] = json.loads(path.with_suffix(".json").read_text())["pods"]
    for pod in TINY if options.tiny else PODS:
        mesh = make_mesh(pod.topology, (pod.data, pod.tensor), ("data", "tensor"))
        params, tokens = model.params(mesh), model.tokens(mesh, pod.sequences)
        results["parameters"] = num_params(params)
        entry = results["pods"].setdefault(pod.name, {"rows": {}})
        entry |= {"sequences": pod.sequences, "memory_gigabytes": pod.memory}
        for name, (tx, gradient) in contestants(model, mesh).items():
            anew = options.only and (options.only in name or options.only in pod.name)
            if anew or (name not in entry["rows"] and not options.only):
                print(f"{pod.name}: {name}", flush=True)
                entry["versions"] = timing.environment(("jax", "libtpu", "optax"))["versions"]
                entry["rows"][name] = _row(tx, gradient, params, tokens)
                timing.save(results, table(results), path)
    print(table(results))


def _row(tx: Any, gradient: Gradient, params: PyTree, tokens: jax.ShapeDtypeStruct) -> dict:
    """A plan; a program that the compiler refuses is a row too, and the others go on."""
    try:
        return plan(tx, gradient, params, tokens)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return {"error": _short(str(error))}


def _short(message: str) -> str:
    """What is wrong, where the compiler says how much memory it would take."""
    needed = re.search(
        r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message
    )
    if needed:
        return f"does not fit: {needed[1]} GiB of temporary memory, a chip has {needed[2]}"
    return message.splitlines()[0][:120]


if __name__ == "__main__":
    main()
