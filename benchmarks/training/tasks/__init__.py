"""The tasks, by name, each in a size for a CPU and in one for an accelerator."""

from collections.abc import Callable
from pathlib import Path

from training.tasks.clicks import clicks
from training.tasks.images import cifar_resnet, fashion_cnn, fashion_mlp
from training.tasks.language import shakespeare
from training.tasks.physics import burgers, poisson
from training.tasks.task import Task
from training.tasks.translation import multi30k

TASKS: dict[str, Callable[[str, Path], Task]] = {
    "cifar-resnet": cifar_resnet,
    "fashion-mlp": fashion_mlp,
    "fashion-cnn": fashion_cnn,
    "shakespeare": shakespeare,
    "multi30k": multi30k,
    "clicks": clicks,
    "poisson": poisson,
    "burgers": burgers,
}
