"""The cases of `accelerator.py`: functions that return rows of numbers, by name."""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerator_torch
import adahessian_step
import jax
import jax.numpy as jnp
import mfac_contestants
import mfac_step
import models_flax
import models_large
import timing
from adahessian_step import BASE
from mfac_contestants import DAMPING, Published

import curvax
from curvax import spectrum
from curvax.fisher import DenseWindow, SparseWindow, solve_damped_gram

PyTree = Any
Rows = dict[str, dict[str, Any]]
Case = Callable[[], Rows]
CYCLE = 4


def all_cases(args: argparse.Namespace) -> dict[str, Case]:
    """Cases by name, the most valuable ones first."""
    tiny = args.tiny
    measure = timing.Measure(0.01, blocks=2) if tiny else timing.Measure(0.2, blocks=5)
    mfac = {
        f"M-FAC, {number} gradients of {name}": functools.partial(mfac_case, number, like, measure)
        for name, like, numbers in (_tiny_trees() if tiny else _trees())
        for number in numbers
    }
    steps = {
        f"AdaHessian, {name}": functools.partial(adahessian_case, make, kept, in_torch, measure)
        for name, make, kept, in_torch in (_tiny_models() if tiny else _models())
    }
    number, size, order = (4, 300, 4) if tiny else (1024, 1_000_000, 40)
    models = list(steps.items())
    others = {
        **dict(models[:2]),
        "inverse Fisher": functools.partial(inverse_case, number, size, measure),
        "spectrum": functools.partial(spectrum_case, order, tiny),
        **dict(models[2:]),
    }
    return {
        "copy": functools.partial(copy_case, 2**12 if tiny else 2**30, measure),
        "M-FAC, digits": functools.partial(digits_case, tiny),
        **dict(_alternate(mfac, others)),
    }


def _alternate(mfac: dict[str, Case], others: dict[str, Case]) -> Iterator[tuple[str, Case]]:
    """Two of M-FAC, then one of the others, and so on."""
    left = list(mfac.items())
    for case in others.items():
        yield from left[:2]
        yield case
        left = left[2:]
    yield from left


# --- The card ---


def copy_case(size: int, measure: timing.Measure) -> Rows:
    """Bytes a second, read and written, of an array's increment in place."""
    make = functools.partial(timing.Streaming, _increment, jnp.zeros(size), [()])
    row = measure.alone(make, cycle=CYCLE)
    if "median_s" in row:
        row["gigabytes_per_s"] = 8e-9 * size / row["median_s"]
    return {"copy": row}


def _increment(array: jax.Array) -> tuple[jax.Array, None]:
    return array + 1, None


# --- M-FAC ---


def _trees() -> list[tuple[str, PyTree, tuple[int, ...]]]:
    resnet20 = jax.tree.leaves(jax.eval_shape(lambda: models_flax.resnet20().params))
    bert = mfac_contestants.bert_shapes()
    return [
        ("10 M parameters", transformer_shapes(2000, 256, 12), (512, 1024, 128)),
        ("ResNet-20", resnet20, (512,)),
        ("110 M parameters", bert, (128,)),
        ("25 M parameters", transformer_shapes(12000, 512, 6), (512,)),
        ("ResNet-20", resnet20, (1024, 128)),
        ("110 M parameters", bert, (1024,)),
    ]


def _tiny_trees() -> list[tuple[str, PyTree, tuple[int, ...]]]:
    return [("1 k parameters", transformer_shapes(8, 8, 1), (4,))]


def transformer_shapes(vocabulary: int, width: int, layers: int) -> PyTree:
    """Shapes of a transformer's parameters."""
    layer = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (width,)]
    shapes = [(vocabulary, width), *layer * layers]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def mfac_case(number: int, like: PyTree, measure: timing.Measure) -> Rows:
    """An update of M-FAC with a full window, what it is made of, and what it is compared with."""
    timed = functools.partial(measure.alone, cycle=CYCLE)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    pool = [(_random(like, seed),) for seed in range(2)]
    dense = functools.partial(random_rows, like, number)
    rows: Rows = {}
    for name, options in {
        "update, float32": {},
        "update, bfloat16": {"window_dtype": "bfloat16"},
        "update, density 0.01": {"density": 0.01},
    }.items():
        tx = curvax.scale_by_mfac(number, DAMPING, **options)
        step = mfac_contestants.curvax_step(tx)
        make = functools.partial(_full_state, tx, like, number)
        rows[name] = timed(lambda step=step, make=make: timing.Streaming(step, make(), pool))
    rows["two bare products"] = timed(
        lambda: timing.Streaming(mfac_contestants.bare_step, (dense(), jnp.zeros(number)), pool)
    )
    rows["published order, one flat leaf"] = timed(lambda: _published(number, size))
    for name, step in _WINDOW_STEPS.items():
        rows[name] = timed(
            lambda step=step: timing.Streaming(step, (DenseWindow(dense()), _zeros(like)), pool)
        )
    gram = _gram(number, size)
    for name, step in {
        "small solve": _small_solve,
        "cho_factor, cho_solve": _library_solve,
    }.items():
        rows[name] = timed(lambda step=step: timing.Streaming(step, jnp.ones(number), [(gram,)]))
    for name, passed in _BYTES_PASSED.items():
        if "median_s" in rows[name]:
            rows[name]["gigabytes_per_s"] = 1e-9 * passed * number * size / rows[name]["median_s"]
    return rows


_BYTES_PASSED = {  # an entry of the window, at least
    "update, float32": 8,
    "update, bfloat16": 4,
    "two bare products": 8,
    "published order, one flat leaf": 8,
    "dots": 4,
    "combine": 4,
}


def random_rows(like: PyTree, number: int, dtype: Any = jnp.float32, seed: int = 0) -> PyTree:
    """Standard normal rows, drawn one by one: a window may fill half of a card."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        _normal_rows(key, leaf.shape, number, dtype) for key, leaf in zip(keys, leaves, strict=True)
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal_rows(key: jax.Array, shape: tuple[int, ...], number: int, dtype: Any) -> jax.Array:
    def draw(index: Any, rows: jax.Array) -> jax.Array:
        return rows.at[index].set(jax.random.normal(jax.random.fold_in(key, index), shape, dtype))

    return jax.lax.fori_loop(0, number, draw, jnp.zeros((number, *shape), dtype))


def _random(like: PyTree, seed: int) -> PyTree:
    return jax.tree.map(lambda rows: rows[0], random_rows(like, 1, seed=seed))


def _zeros(like: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _gram(number: int, size: int) -> jax.Array:
    """Of random rows, all but orthogonal."""
    return size * jnp.eye(number)


def _full_state(tx: Any, like: PyTree, number: int) -> Any:
    """The state after many steps, made without them."""
    state = jax.eval_shape(tx.init, like)
    if isinstance(state.window, SparseWindow):
        return mfac_contestants.large_state(tx, like)
    dtype = jax.tree.leaves(state.window)[0].dtype
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    rest = _zeros(state._replace(window=None))
    return rest._replace(
        window=DenseWindow(random_rows(like, number, dtype)),
        gram=_gram(number, size),
        count=jnp.asarray(number, jnp.int32),
    )


def _published(number: int, size: int) -> timing.Streaming:
    flat = jax.ShapeDtypeStruct((size,), jnp.float32)
    state = Published(random_rows(flat, number), _gram(number, size), jnp.zeros((), jnp.int32))
    return timing.Streaming(mfac_contestants.published_step, state, [(_random(flat, 1),)])


def _dots(state: Any, grad: PyTree) -> Any:
    return state, state[0].dots(grad, jnp.float32)


def _combine(state: Any, grad: PyTree) -> Any:
    window, _ = state
    number = len(jax.tree.leaves(window)[0])
    return (window, window.combine(jnp.full(number, 1e-3), grad)), None


def _push(state: Any, grad: PyTree) -> Any:
    window, last = state
    return (window.push(window.compress(grad)[0], jnp.int32(1)), last), None


_WINDOW_STEPS = {"dots": _dots, "combine": _combine, "push": _push}


def _small_solve(vector: jax.Array, gram: jax.Array) -> Any:
    return vector + 1e-6 * solve_damped_gram(gram, jnp.float32(1e-3), vector).x, None


def _library_solve(vector: jax.Array, gram: jax.Array) -> Any:
    factor = jax.scipy.linalg.cho_factor(gram + 1e-3 * jnp.eye(len(gram)))
    return vector + 1e-6 * jax.scipy.linalg.cho_solve(factor, vector), None


def digits_case(tiny: bool) -> Rows:
    """Errors of float32 updates, relative to float64: are products taken at full precision?"""
    mean = _random(transformer_shapes(8, 8, 1), 0) if tiny else mfac_step.resnet20_gradient()
    return {
        f"{entry['form']}, noise {entry['noise']}, damping {entry['damping']:.0e}": {
            "relative_error": entry["median"]
        }
        for entry in mfac_step.accuracy(mean, 8 if tiny else 256, seeds=1)
    }


# --- AdaHessian ---

FEW = (
    BASE,
    "AdaHessian, one pass",
    "AdaHessian, every 5th step, graph",
    "AdaHessian, Gauss-Newton outputs",
)


Model = tuple[str, Callable[[], Any], Any, tuple[str, int] | None]


def _models() -> list[Model]:
    """Name, problem, the forms to measure (None: all), model and batch size in PyTorch."""
    return [
        ("GPT of 163 M, bfloat16, 8 x 1024 tokens", models_large.gpt, FEW, None),
        ("ResNet-20, batch 128", lambda: models_flax.resnet20(128), None, ("resnet20", 128)),
        ("ResNet-50, bfloat16, batch 64", models_large.resnet50, FEW[:3], None),
    ]


def _tiny_models() -> list[Model]:
    gpt = functools.partial(models_large.gpt, tiny=True)
    return [("a tiny GPT", gpt, FEW[:2], ("transformer", 1))]


def adahessian_case(
    make: Callable[[], Any], kept: Any, in_torch: tuple[str, int] | None, measure: timing.Measure
) -> Rows:
    """Training steps of AdaHessian's forms, over Adam's: time and memory."""
    problem = make()
    entries = adahessian_step.contestants(problem)
    entries = {name: entry for name, entry in entries.items() if kept is None or name in kept}
    with ThreadPoolExecutor(4) as pool:  # most of a short run is compilation
        futures = {
            name: pool.submit(adahessian_step.compiled_loop, problem, *entry)
            for name, entry in entries.items()
        }
    errors = {name: future.exception() for name, future in futures.items()}
    done = {name: futures[name].result() for name, error in errors.items() if error is None}
    loops = {name: loop for name, (loop, _) in done.items()}
    rows = measure.together(loops, cycle=adahessian_step.CYCLE)
    for name, (_, memory) in done.items():
        rows[name] |= memory
    rows |= {name: timing.failed(error) for name, error in errors.items() if error}
    timing.add_ratios(rows, BASE)
    return rows | (accelerator_torch.rows(*in_torch, measure) if in_torch else {})


# --- Inverse Fisher, spectrum ---


def inverse_case(number: int, size: int, measure: timing.Measure) -> Rows:
    """The inverse's diagonal of a million parameters, whole and in blocks."""
    rows = random_rows(jax.ShapeDtypeStruct((size,), jnp.float32), number)

    def diagonal(block_size: int | None) -> jax.Array:
        return curvax.inverse_fisher(rows, DAMPING, block_size=block_size).diagonal()

    return {
        f"blocks of {block_size}" if block_size else "full": measure.alone(
            functools.partial(timing.repeated, functools.partial(diagonal, block_size)),
            cycle=CYCLE,
        )
        for block_size in (None, 2000, 128)
    }


def spectrum_case(order: int, tiny: bool) -> Rows:
    """Eigenpairs and density of a network's Hessian; second runs."""
    problem = models_large.gpt(tiny=True) if tiny else models_flax.resnet20(512)
    batch = problem.inputs, problem.targets

    def loss(params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return problem.loss(params, inputs, targets, problem.statistics)[0]

    hessian = spectrum.hessian_operator(loss, problem.params, [batch])
    key = jax.random.key(0)
    runs = {
        "five largest eigenpairs": lambda: spectrum.top_eigenpairs(
            hessian, 1 if tiny else 5, key=key
        ),
        "density": lambda: spectrum.spectral_density(hessian, key=key, order=order, num_probes=1),
    }
    return {name: _second_run(run) for name, run in runs.items()}


def _second_run(run: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    run()
    middle = time.perf_counter()
    found = run()
    end = time.perf_counter()
    return {
        "median_s": end - middle,
        "first_s": middle - start,
        "num_matvecs": int(found.num_matvecs),
    }
