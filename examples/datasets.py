"""Reads the data sets of the examples: scikit-learn's digits, and IDX files such as MNIST's."""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

UNSIGNED_BYTE = 0x08


class DatasetError(Exception):
    """A data set that cannot be read; the message is a sentence for the user."""


class Dataset(NamedTuple):
    """Images of shape (number, height, width, 1) with values in [0, 1], and their labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> Dataset:
    """The 1797 images of 8x8 pixels that come with scikit-learn, a fifth of them for tests."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    split = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    train_images, test_images, train_labels, test_labels = split
    return Dataset(train_images, train_labels, test_images, test_labels)


def from_idx_files(folder: Path) -> Dataset:
    """A data set in the four files that MNIST and Fashion-MNIST come in."""
    return Dataset(
        _images(folder, "train-images-idx3-ubyte"),
        _labels(folder, "train-labels-idx1-ubyte"),
        _images(folder, "t10k-images-idx3-ubyte"),
        _labels(folder, "t10k-labels-idx1-ubyte"),
    )


def _images(folder: Path, name: str) -> np.ndarray:
    return (read_idx(_find(folder, name), rank=3) / np.float32(255))[..., np.newaxis]


def _labels(folder: Path, name: str) -> np.ndarray:
    return read_idx(_find(folder, name), rank=1).astype(np.int32)


def _find(folder: Path, name: str) -> Path:
    """The file, compressed or not."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DatasetError(
        f"{folder / name} is missing, and so is {name}.gz: install the Debian package "
        "dataset-fashion-mnist, or name the folder of the four IDX files with --data-dir."
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The array of bytes in an IDX file: a magic number, the sizes of its axes, the values."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); fetch it again.") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]):
        raise DatasetError(f"{path} is not an IDX file of bytes with {rank} axes; fetch it again.")
    shape = np.frombuffer(content, ">u4", count=rank, offset=4).tolist()
    if len(content) != header + math.prod(shape):
        raise DatasetError(f"{path} does not hold the {shape} bytes it promises; fetch it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
