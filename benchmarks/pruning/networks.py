"""The networks that are pruned: trained once for each seed, and kept in build/pruning."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models_flax import ResNet20
from timing import tqdm

from training.loop import order_of_examples
from training.tasks import images, language, translation
from training.tasks.task import Batch, Numbers, PyTree, Task, Variables, mean_loss

FOLDER = Path(__file__).parents[2] / "build" / "pruning"


class Recipe(NamedTuple):
    """How a network is made, and by which optimizer it is trained.

    Attributes:
      make: ``data directory -> Task``.
      rate: the peak of the learning rate.
      evaluated: ``params, statistics, inputs -> outputs`` in evaluation mode; None where that is
        the task's own ``apply`` without noise.
    """

    make: Callable[[Path], Task]
    rate: float
    evaluated: Callable[[PyTree, PyTree, Any], jax.Array] | None = None


def _resnet_evaluated(params: PyTree, statistics: PyTree, inputs: Any) -> jax.Array:
    variables = {"params": params, "batch_stats": statistics}
    outputs: jax.Array = ResNet20(train=False).apply(variables, inputs)
    return outputs


RECIPES = {
    "cifar-resnet": Recipe(partial(images.cifar_resnet, "pruning"), 3e-3, _resnet_evaluated),
    "fashion-resnet": Recipe(images.fashion_resnet, 3e-3, _resnet_evaluated),
    "shakespeare": Recipe(partial(language.shakespeare, "pruning"), 2e-3),
    "multi30k": Recipe(partial(translation.multi30k, "pruning"), 2e-3),
}


class Network:
    """A task's network, its training, and its loss in evaluation mode."""

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name, self.recipe = name, RECIPES[name]
        self.task = self.recipe.make(data_dir)

    def outputs(self, params: PyTree, statistics: PyTree, inputs: Any) -> jax.Array:
        """The outputs in evaluation mode."""
        if self.recipe.evaluated is not None:
            return self.recipe.evaluated(params, statistics, inputs)
        return self.task.apply(params, inputs, statistics, jax.random.key(0))[0]

    def loss(self, params: PyTree, statistics: PyTree, inputs: Any, targets: Any) -> jax.Array:
        """The mean loss of a batch in evaluation mode."""
        return mean_loss(self.task.loss, self.outputs(params, statistics, inputs), targets)

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """An endless stream of random training batches, not augmented."""
        task, key = self.task._replace(batch_size=size), jax.random.key(seed)
        for number, indices in enumerate(order_of_examples(task, seed)):
            if task.num_examples is None:  # windows of a text
                keys = jax.random.split(jax.random.fold_in(key, number), -(-size // task.batch_size))
                parts = [self.task.sample(task.data, indices, one) for one in keys]
                yield jax.tree.map(lambda *x: jnp.concatenate(x)[:size], *parts)
            elif self.name.endswith("resnet"):  # without augmentation
                yield tuple(array[indices] for array in task.data)
            else:
                yield task.sample(task.data, indices, key)

    def trained(self, seed: int) -> Variables:
        """The dense network of a seed, trained once with AdamW."""
        initial = jax.jit(self.task.init)(jax.random.key(seed))
        leaves, treedef = jax.tree.flatten(initial)
        path = FOLDER / f"{self.name}_{seed}.npz"
        if not path.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".new.npz")
            np.savez(aside, *jax.tree.leaves(self._train(initial, seed)))
            aside.replace(path)
        with np.load(path) as arrays:
            return treedef.unflatten(jnp.asarray(arrays[f"arr_{k}"]) for k in range(len(leaves)))

    def _train(self, variables: Variables, seed: int) -> Variables:
        task = self.task
        tx = optax.adamw(lambda count: self.recipe.rate * task.schedule(count, task.steps))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(variables: Variables, state: PyTree, indices: jax.Array, key: jax.Array) -> Any:
            sample_key, noise_key = jax.random.split(key)
            batch = task.sample(task.data, indices, sample_key)
            (loss, statistics), grads = jax.value_and_grad(task.mean_loss, has_aux=True)(
                variables.params, *batch, variables.statistics, noise_key
            )
            updates, state = tx.update(grads, state, variables.params)
            params = optax.apply_updates(variables.params, updates)
            return Variables(params, statistics), state, loss

        state, key = tx.init(variables.params), jax.random.key(seed)
        order = order_of_examples(task, seed)
        for number in tqdm(range(task.steps), desc=f"training {self.name}, seed {seed}"):
            variables, state, _ = step(
                variables, state, next(order), jax.random.fold_in(key, number)
            )
        return variables
