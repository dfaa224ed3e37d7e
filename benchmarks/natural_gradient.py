"""A natural gradient step of a batch: curvax against NetKet's stochastic reconfiguration.

    PYTHONPATH=. python benchmarks/natural_gradient.py
    PYTHONPATH=. python benchmarks/natural_gradient.py --examples 4096 --parameters 1000000

The update of log-amplitudes of spin configurations, real or complex, by a network with two hidden
layers and real parameters, in float32. Both get the same parameters, samples and local energies.
NetKet's functions are those that its driver ``VMC_SR`` calls, with the driver's solver: ``srt``
keeps the Jacobian, ``srt_onthefly`` contracts it, ``sr`` solves for the parameters. Contestants
take turns in one process; ratios are of medians. Memory is the temporary memory of the compiled
step. Errors are of the update, against float64. Without NetKet, only curvax is measured.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import timing

import curvax

# NetKet makes float64 the default as it is imported, unless the variable says no.
os.environ.setdefault("NETKET_ENABLE_X64", "0")
try:
    import netket as nk
    from netket._src.ngd.sr_srt_common import _sr_srt_common
    from netket._src.ngd.srt_onthefly import srt_onthefly

    NETKETS = {
        "sr": (_sr_srt_common, {"use_ntk": False}),
        "srt": (_sr_srt_common, {"use_ntk": True}),
        "srt_onthefly": (srt_onthefly, {}),
    }
except ImportError:
    nk = None

PyTree = Any
Row = dict[str, Any]

SPINS = 64
DAMPINGS = (1e-4, 1e-6)
NO_NETKET = "NetKet is not installed (pip install netket), so curvax is measured alone."


class Network(nn.Module):
    """The log-amplitudes of spin configurations, of shape (n,)."""

    width: int
    is_complex: bool

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(self.width)(spins))
        x = nn.tanh(nn.Dense(self.width)(x))
        if not self.is_complex:
            return nn.Dense(1)(x)[:, 0]
        outputs = nn.Dense(2)(x)
        return jax.lax.complex(outputs[:, 0], outputs[:, 1])


class Problem(NamedTuple):
    """A network's parameters, samples and local energies."""

    network: Network
    params: PyTree
    spins: jax.Array
    energies: jax.Array

    @classmethod
    def of(cls, examples: int, parameters: int, *, is_complex: bool) -> "Problem":
        # width^2 + (SPINS + 3) width is about the number of parameters.
        width = round(np.sqrt(parameters + (SPINS + 3) ** 2 / 4) - (SPINS + 3) / 2)
        network = Network(width, is_complex)
        keys = jax.random.split(jax.random.key(0), 3)
        spins = jax.random.rademacher(keys[0], (examples, SPINS), jnp.float32)
        noise = jax.random.normal(keys[1], (2, examples))
        energies = jax.lax.complex(noise[0] - SPINS, noise[1]) if is_complex else noise[0] - SPINS
        return cls(network, network.init(keys[2], spins)["params"], spins, energies)

    @property
    def arrays(self) -> tuple[PyTree, jax.Array, jax.Array]:
        return self.params, self.spins, self.energies

    def log_amplitude(self, params: PyTree, spins: jax.Array) -> jax.Array:
        return self.network.apply({"params": params}, spins)


class Contestant(NamedTuple):
    """A compiled step ``(params, spins, energies, damping) -> update``, and its memory."""

    step: Callable[..., PyTree]
    memory: dict[str, int]


def ours(problem: Problem, micro_batch_size: int | None) -> Contestant:
    compiled = jax.jit(step_of(problem, micro_batch_size)).lower(*problem.arrays, 1e-4).compile()
    return Contestant(compiled, timing.memory_of(compiled))


def step_of(problem: Problem, micro_batch_size: int | None) -> Callable[..., PyTree]:
    def step(params: PyTree, spins: jax.Array, energies: jax.Array, damping: jax.Array) -> PyTree:
        tx = curvax.scale_by_natural_gradient(
            damping, centered=True, micro_batch_size=micro_batch_size
        )
        updates, _ = tx.update(
            None,
            tx.init(params),
            params,
            outputs_fn=problem.log_amplitude,
            batch=(spins,),
            cotangents=2 * energies,  # as in NetKet's gradient of the energy
        )
        return updates

    return step


def netkets(problem: Problem, name: str, chunk_size: int | None) -> Contestant:
    def log_psi(variables: PyTree, spins: jax.Array) -> jax.Array:
        return problem.network.apply(variables, spins)

    function, extra = NETKETS[name]
    options = {
        "solver_fn": nk.optimizer.solver.cholesky_with_fallback,
        "mode": "complex" if problem.network.is_complex else "real",
        "chunk_size": chunk_size,
        **extra,
    }
    params, spins, energies = problem.arrays
    # A jitted function, within a timer of NetKet's.
    lowered = function.__wrapped__.lower(
        log_psi, energies, params, {}, spins, diag_shift=1e-4, **options
    )
    compiled = lowered.compile()

    def step(params: PyTree, spins: jax.Array, energies: jax.Array, damping: float) -> PyTree:
        return compiled(energies, params, {}, spins, diag_shift=damping)[0]

    return Contestant(step, timing.memory_of(compiled))


def contestants(problem: Problem, args: argparse.Namespace) -> dict[str, Callable[[], Contestant]]:
    """Functions that compile."""
    makers: dict[str, Callable[[], Contestant]] = {}
    sizes = [None, *(size for size in args.micro_batch_sizes if size < len(problem.spins))]
    for size in sizes:
        label = f", micro-batches of {size}" if size else ""
        makers[f"curvax{label}"] = partial(ours, problem, size)
    if nk is None:
        return makers
    for size in sizes:
        label = f", chunks of {size}" if size else ""
        for name in ("srt", "srt_onthefly"):
            makers[f"NetKet {name}{label}"] = partial(netkets, problem, name, size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    if parameters <= args.largest_dense:
        makers["NetKet sr"] = partial(netkets, problem, "sr", None)
    return makers


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one case, by contestant."""
    exact = references(problem, args.reference_size)
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[..., PyTree]] = {}
    for name, make in contestants(problem, args).items():
        try:
            contestant = make()
            errors = {
                f"{damping:g}": reference.error_of(contestant.step(*problem.arrays, damping))
                for damping, reference in exact.items()
            }
        except Exception as error:  # such as a card without memory
            rows[name] = timing.failed(error)
            continue
        steps[name] = contestant.step
        rows[name] = {**contestant.memory, "errors": errors}
    loops = {
        name: timing.repeated(lambda step=step: step(*problem.arrays, DAMPINGS[0]))
        for name, step in steps.items()
    }
    for name, times in timing.time_loops(loops, seconds=0.0, cycle=1, blocks=args.blocks).items():
        rows[name] |= times
    timing.add_ratios(rows, "curvax")
    bounds = {f"{damping:g}": reference.bound for damping, reference in exact.items()}
    return {"reference": bounds, "rows": rows}


class Reference(NamedTuple):
    r"""The update in float64, and a bound on its relative error.

    With the residual $r$ of $(S + \lambda) d = F$, computed by products with the Jacobian, the
    error of $d$ is at most $\lVert r \rVert / \lambda$.
    """

    update: np.ndarray
    bound: float

    def error_of(self, update: PyTree) -> float:
        difference = np.linalg.norm(flat(update) - self.update)
        return float(difference / np.linalg.norm(self.update))


def references(problem: Problem, micro_batch_size: int) -> dict[float, Reference]:
    """The update for each damping."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(as_float64, problem.arrays)
        step = jax.jit(step_of(problem, micro_batch_size))
        rest = jax.jit(partial(residual, problem))
        found = {}
        for damping in DAMPINGS:
            update = step(*arrays, damping)
            exact = flat(update)
            bound = np.linalg.norm(flat(rest(*arrays, update, damping))) / damping
            found[damping] = Reference(exact, float(bound / np.linalg.norm(exact)))
    return found


def residual(
    problem: Problem,
    params: PyTree,
    spins: jax.Array,
    energies: jax.Array,
    update: PyTree,
    damping: float,
) -> PyTree:
    r"""$(S + \lambda) d - F$, without curvax."""

    def outputs(params: PyTree) -> jax.Array:
        return as_columns(problem.log_amplitude(params, spins))

    def centered(values: jax.Array) -> jax.Array:
        return (values - values.mean(axis=0)) / len(spins)

    _, pullback = jax.vjp(outputs, params)
    images = jax.jvp(outputs, (params,), (update,))[1]
    (rest,) = pullback(centered(images - as_columns(2 * energies)))
    return jax.tree.map(lambda leaf, d: leaf + damping * d, rest, update)


def as_columns(values: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(values):
        return values[:, jnp.newaxis]
    return jnp.stack([values.real, values.imag], axis=1)


def as_float64(array: jax.Array) -> jax.Array:
    return jnp.asarray(np.asarray(array), complex if jnp.iscomplexobj(array) else float)


def flat(tree: PyTree) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(tree))
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


def table(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"Measured on {results['name']} by `python benchmarks/natural_gradient.py`.",
        "",
        f"A step on a batch of {SPINS} spins and about {settings['parameters']:,} parameters, in "
        "float32. Memory is the compiled step's temporary memory; errors are of the update, at two "
        "dampings, against float64.",
    ]
    if not results["netket"]:
        lines += ["", NO_NETKET]
    for name, case in results["cases"].items():
        lines += [
            "",
            f"{name}:",
            "",
            "| contestant | seconds | over curvax | MB | "
            + " | ".join(f"error, {damping:g}" for damping in DAMPINGS)
            + " |",
            "| --- | ---: | ---: | ---: |" + " ---: |" * len(DAMPINGS),
        ]
        lines += [line_of(contestant, row) for contestant, row in case["rows"].items()]
    return "\n".join(lines) + "\n"


def line_of(name: str, row: Row) -> str:
    if "error" in row:
        return f"| {name} | {row['error'][:80].replace('|', ' ')} |"
    errors = " | ".join(f"{error:.1e}" for error in row["errors"].values())
    memory = row["temporary_bytes"] / 1e6
    return f"| {name} | {row['median_s']:.3g} | {row['ratio']:.2f} | {memory:.0f} | {errors} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--outputs", nargs="+", choices=("real", "complex"), default=["real"])
    parser.add_argument("--micro-batch-sizes", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--reference-size", type=int, default=128, help="its micro-batch")
    parser.add_argument(
        "--largest-dense", type=int, default=5000, help="the most parameters that `sr` solves for"
    )
    parser.add_argument("--matmul-precision", help="JAX's default for matrix products")
    parser.add_argument("--blocks", type=int, default=5, help="turns of each, at least 2")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    if nk is None:
        print(NO_NETKET)
    cases = {}
    for outputs in args.outputs:
        for examples in args.examples:
            problem = Problem.of(examples, args.parameters, is_complex=outputs == "complex")
            cases[f"{examples} examples, {outputs} outputs"] = measure(problem, args)
    results = {
        **timing.environment(("curvax", "flax", "jax", "netket", "numpy", "optax")),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "netket": nk is not None,
        "cases": cases,
    }
    timing.write(results, table(results), "natural_gradient", args.output)


if __name__ == "__main__":
    main()
