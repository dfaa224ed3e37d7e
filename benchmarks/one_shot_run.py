"""Seconds and memory of a whole one-shot pruning of ResNet-20, beside those of its gradients.

    PYTHONPATH=. python benchmarks/one_shot_run.py

Its options are those of earlier versions too: run it in a checkout of one to compare.
"""

import time

import jax
import optax
import timing
from models_flax import ResNet20

from curvax import pruning

STEPS, NUM_GRADS, BATCH = 4, 64, 16


def main() -> None:
    model = ResNet20(train=False)
    image_key, label_key, key = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(image_key, (NUM_GRADS, BATCH, 32, 32, 3))
    labels = jax.random.randint(label_key, (NUM_GRADS, BATCH), 0, 10)
    variables = model.init(key, images[0])

    def loss_fn(params, images, labels):
        logits = model.apply({**variables, "params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params, batches = variables["params"], list(zip(images, labels, strict=True))
    gradient = jax.jit(jax.grad(loss_fn))
    jax.block_until_ready(gradient(params, *batches[0]))
    start = time.perf_counter()
    for _ in range(STEPS):
        for batch in batches:
            jax.block_until_ready(gradient(params, *batch))
    print(f"gradients alone: {time.perf_counter() - start:.1f} s")
    for name in ("first run, which compiles", "second run"):
        start = time.perf_counter()
        pruning.prune_one_shot(
            loss_fn,
            params,
            batches,
            0.9,
            num_grads=NUM_GRADS,
            recomputations=STEPS,
            block_size=128,
        )
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s, peak of {timing.peak_memory() // 2**20} MiB")


if __name__ == "__main__":
    main()
