"""Classification of images: Fashion-MNIST by an MLP and a CNN, CIFAR-10 by a ResNet."""

import functools
import io
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models_flax import ResNet20

import curvax
from training.tasks.task import DataError, Numbers, Task, Variables, mean_of_parts, warmup_cosine

PyTree = Any
Images = tuple[jax.Array, jax.Array]  # with their labels

ROOT = Path(__file__).parents[3]
VALIDATION = 5000
DECODED = ROOT / "build" / "training" / "cifar10_jpeg.npz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class MLP(nn.Module):
    """Two hidden layers with ReLU."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Strided convolutions with ReLU, and a hidden dense layer."""

    filters: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for filters in self.filters:
            x = nn.relu(nn.Conv(filters, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def fashion_mlp(size: str, data_dir: Path) -> Task:
    """Fashion-MNIST, an MLP."""
    model = MLP((64, 32) if size == "cpu" else (1024, 1024))
    words = f"Fashion-MNIST, MLP of {', '.join(map(str, model.widths))} units"
    steps, evaluations = (1290, 10) if size == "cpu" else (8600, 20)
    task = _classification(model, _fashion(data_dir), batch_size=128, steps=steps)
    return task._replace(name="fashion-mlp", words=words, evaluations=evaluations)


def fashion_cnn(size: str, data_dir: Path) -> Task:
    """Fashion-MNIST, a CNN."""
    model = CNN((8, 16) if size == "cpu" else (32, 64, 128))
    words = f"Fashion-MNIST, CNN with {', '.join(map(str, model.filters))} filters"
    steps, evaluations = (860, 10) if size == "cpu" else (8600, 20)
    task = _classification(model, _fashion(data_dir), batch_size=128, steps=steps)
    return task._replace(
        name="fashion-cnn", words=words, evaluations=evaluations, scannable=size != "cpu"
    )


def fashion_resnet(data_dir: Path) -> Task:
    """Fashion-MNIST, a ResNet with batch normalization."""
    task = _classification(
        ResNet20(), _fashion(data_dir), batch_size=16, steps=3437, model_evaluated=ResNet20
    )
    return task._replace(name="fashion-resnet", words="Fashion-MNIST, ResNet-20, one epoch")


def cifar_resnet(size: str, data_dir: Path) -> Task:
    """CIFAR-10, a ResNet with batch normalization and the standard augmentation.

    On an accelerator the published run: ResNet-20, 160 epochs in batches of 256, a tenth of the
    rate after 80 and after 120. ``"tiny"`` is a few steps on noise, for tests.
    """
    splits = _random_images() if size == "tiny" else _cifar(data_dir)
    if size in ("cpu", "tiny"):
        model = functools.partial(ResNet20, blocks=1, width=8)
        steps = 300 if size == "cpu" else 10
        task = _classification(model(), splits, batch_size=32, steps=steps, model_evaluated=model)
        return task._replace(
            name="cifar-resnet",
            evaluations=5,
            words="CIFAR-10, ResNet-8 with 8, 16 and 32 filters, batch normalization, augmentation",
            sample=augmented,
            scannable=False,
        )
    if size == "pruning":
        task = _classification(
            ResNet20(), splits, batch_size=32, steps=5600, model_evaluated=ResNet20
        )
        return task._replace(
            name="cifar-resnet",
            words="CIFAR-10, ResNet-20, 4 epochs with the standard augmentation",
            sample=augmented,
        )
    task = _classification(
        ResNet20(), splits, batch_size=256, steps=28_000, model_evaluated=ResNet20
    )
    return task._replace(
        name="cifar-resnet",
        words="CIFAR-10, ResNet-20, 160 epochs, the published schedule and augmentation",
        metric="error",
        sample=augmented,
        schedule=step_schedule,
        evaluations=40,
    )


def step_schedule(count: jax.Array, steps: int) -> jax.Array:
    """A tenth after half of the run, and again after three quarters: epochs 80 and 120 of 160."""
    return jnp.where(count < steps // 2, 1.0, jnp.where(count < 3 * steps // 4, 0.1, 0.01))


def augmented(data: Images, indices: jax.Array, key: jax.Array) -> Images:
    """Images that are shifted by up to four pixels, and half of them mirrored."""
    images, labels = data[0][indices], data[1][indices]
    shift_key, flip_key = jax.random.split(key)
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifts = jax.random.randint(shift_key, (len(images), 2), 0, 9)

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*shift, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, shifts)
    mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped), labels


def _classification(
    model: nn.Module,
    splits: dict[str, Images],
    *,
    batch_size: int,
    steps: int,
    model_evaluated: Callable[..., nn.Module] | None = None,
) -> Task:
    evaluated = model if model_evaluated is None else model_evaluated(train=False)
    example = splits["train"][0][:1]

    def init(key: jax.Array) -> Variables:
        variables = model.init(key, example)
        return Variables(variables["params"], variables.get("batch_stats", {}))

    def apply(params: PyTree, images: jax.Array, statistics: PyTree, _: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        logits, changed = model.apply(variables, images, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    @jax.jit
    def numbers(variables: Variables, images_and_labels: Images) -> dict[str, jax.Array]:
        images, labels = images_and_labels
        collections = {"params": variables.params, "batch_stats": variables.statistics}
        logits = evaluated.apply(collections, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"loss": losses.mean(), "error": (logits.argmax(axis=-1) != labels).mean()}

    def evaluate(variables: Variables, split: str) -> Numbers:
        return mean_of_parts(numbers, variables, splits[split], 1000)

    return Task(
        name="",
        words="",
        metric="loss",
        data=splits["train"],
        num_examples=len(splits["train"][0]),
        batch_size=batch_size,
        steps=steps,
        evaluations=10,
        init=init,
        apply=apply,
        loss=curvax.softmax_cross_entropy,
        sample=lambda data, indices, _: (data[0][indices], data[1][indices]),
        evaluate=evaluate,
        model=evaluated,
        schedule=warmup_cosine,
    )


def _splits(images: np.ndarray, labels: np.ndarray, *test: np.ndarray) -> dict[str, Images]:
    """On the device, the last training images held out."""
    train, held_out = slice(None, -VALIDATION), slice(-VALIDATION, None)
    parts = {
        "train": (images[train], labels[train]),
        "validation": (images[held_out], labels[held_out]),
        "test": tuple(test),
    }
    return jax.device_put(parts)


def _random_images() -> dict[str, Images]:
    generator = np.random.default_rng(0)
    sizes = {"train": 100, "validation": 1000, "test": 1000}
    return {
        split: (
            jnp.asarray(generator.normal(size=(number, 32, 32, 3)), jnp.float32),
            jnp.asarray(generator.integers(10, size=number), jnp.int32),
        )
        for split, number in sizes.items()
    }


@functools.cache
def _fashion(data_dir: Path) -> dict[str, Images]:
    sys.path.insert(0, str(ROOT / "examples"))
    from datasets import DatasetError, from_idx_files  # needs scikit-learn

    for folder in (data_dir / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist")):
        if folder.is_dir():
            break
    try:
        data = from_idx_files(folder)
    except DatasetError as error:
        raise DataError(f"Fashion-MNIST: {error} --data-dir names a folder with it.") from error
    return _splits(*data)


@functools.cache
def _cifar(data_dir: Path) -> dict[str, Images]:
    """Normalized by the mean and deviation of each channel of the training images."""
    pickles, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar10_jpeg.tar.xz"
    if pickles.is_dir():
        arrays = _from_pickles(pickles)
    elif archive.is_file():
        arrays = _from_archive(archive)
    else:
        raise DataError(
            f"CIFAR-10: neither {pickles} nor {archive} exists; --data-dir names the folder that "
            "holds cifar-10-batches-py, as the data set is distributed, or the archive of JPEGs."
        )
    images, labels, test_images, test_labels = arrays
    images, test_images = images / np.float32(255), test_images / np.float32(255)
    mean, deviation = images.mean((0, 1, 2)), images.std((0, 1, 2))
    images, test_images = ((x - mean) / deviation for x in (images, test_images))
    return _splits(images, labels, test_images, test_labels)


def _from_pickles(folder: Path) -> tuple[np.ndarray, ...]:
    def read(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, np.concatenate([batch[b"labels"] for batch in batches]).astype(np.int32)

    return *read([f"data_batch_{number}" for number in range(1, 6)]), *read(["test_batch"])


def _from_archive(archive: Path) -> tuple[np.ndarray, ...]:
    """Images in a fixed random order, since the archive is sorted by classes; kept decoded."""
    DECODED.parent.mkdir(parents=True, exist_ok=True)
    if not DECODED.exists():
        np.savez(DECODED, *_decoded(archive))
    with np.load(DECODED) as arrays:
        return tuple(arrays[f"arr_{number}"] for number in range(4))


def _decoded(archive: Path) -> Iterator[np.ndarray]:
    from PIL import Image  # only the archive needs it

    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    with tarfile.open(archive) as files:
        for member in files:
            if not member.name.endswith(".jpg"):
                continue
            split, label, _ = Path(member.name).parts[-3:]
            picture = Image.open(io.BytesIO(files.extractfile(member).read()))
            images[split].append(np.asarray(picture.convert("RGB")))
            labels[split].append(CLASSES.index(label))
    for split in ("train", "test"):
        order = np.random.default_rng(0).permutation(len(labels[split]))
        yield np.stack(images[split])[order]
        yield np.array(labels[split], np.int32)[order]
