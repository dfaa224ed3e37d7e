"""What the TPU compiler makes of the kernels: cycles, temporary memory, gathers. Nothing runs.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/tpu_kernels.py

`make test-tpu` bounds these numbers and sets up what is needed (``.venv-tpu``).
"""

import jax.numpy as jnp

from curvax.fisher.inverse._gram import Cut, gram_of_cut, squares_of_cut
from tests.hlo import cycles
from tests.tpu import test_small_solve, test_training_step, test_window_memory
from tests.tpu.compiler import array, compiled, one_chip, trouble


def rows() -> dict[str, str]:
    found = {}
    for size in (128, 512, 1024):
        attempt = test_small_solve.ordinary_attempt(size)
        found[f"solve of {size} equations, cycles"] = f"{cycles(attempt):,.0f}"
    for window in test_window_memory.WINDOWS:
        memory, size = test_window_memory.memory_of_a_step(window)
        found[f"step, {window} window, temporary over window"] = _share(memory, size)
    for window in ("float32", "bfloat16"):
        memory, size = test_window_memory.memory_of_a_loop(window)
        found[f"scan of steps, {window} window, temporary over window"] = _share(memory, size)
    where, cut = one_chip(), Cut(local=True, axis=1)
    gradients, triangle = array((512, 2048, 512), where), array((512, 512), where)
    for name, program in {
        "Gram matrix": compiled(lambda g: gram_of_cut(g, cut=cut), gradients),
        "inverse's diagonal": compiled(
            lambda t, g: squares_of_cut(t, g, cut=cut), triangle, gradients
        ),
    }.items():
        memory = program.memory_analysis()
        found[f"{name} of 2.1 GB of rows, temporary over rows"] = _share(memory, 4 * 512 * 2**20)
    for mesh in test_training_step.MESHES:
        for dtype in (jnp.float32.dtype.name, jnp.bfloat16.dtype.name):
            adam = test_training_step.gathered(test_training_step.adam, mesh, dtype)
            ours = test_training_step.gathered(test_training_step.adahessian, mesh, dtype)
            ratio = f"{ours / adam:.2f}" if adam else "none"
            found[f"AdaHessian's gathers over Adam's, {mesh}, {dtype}"] = ratio
    return found


def _share(memory, size: int) -> str:
    return f"{memory.temp_size_in_bytes / size:.3f}"


def main() -> None:
    if reason := trouble():
        raise SystemExit(reason)
    print("| | |\n|---|---:|")
    for name, value in rows().items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
