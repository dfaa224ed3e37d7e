"""Gradients in memory-mapped files, one per leaf, which a marker file ties together.

No file is ever overwritten: leaves get names that are free in the folder, and the marker of a
finished collection is replaced in one step, once all gradients are written. Until then another
marker records what has been written, so that an interrupted call can resume.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from curvax._trees import PyTree, Tree, named_leaves, shape_of, wide_dtype

FINISHED = "gradients.json"
UNFINISHED = "unfinished.json"
_CONTENT = "gradients collected by curvax"
_CANNOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP)  # of some network file systems

Marker = dict[str, Any]


def load_gradients(folder: Path | str, params: Tree) -> Tree:
    """Loads the gradients that `collect_gradients` wrote to a folder.

    Args:
      folder: the ``storage`` passed to `collect_gradients`.
      params: the parameters, or a tree of ``jax.ShapeDtypeStruct``.

    Returns:
      A tree like ``params`` with leaves of shape ``(m, *leaf.shape)``, mapped from the files and
      read-only.

    Raises:
      FileNotFoundError: if the folder has no finished collection.
      ValueError: if the collection belongs to other parameters, or a file is damaged.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from curvax import pruning
      >>> folder, weights = pathlib.Path(tempfile.mkdtemp()), jnp.ones(2)
      >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])]
      >>> _ = pruning.collect_gradients(jnp.vdot, weights, batches, 2, storage=folder)
      >>> print(pruning.load_gradients(folder, weights))
      [[1. 2.]
       [3. 4.]]
    """
    folder = Path(folder)
    marker = _read(folder / FINISHED)
    if marker is None:
        raise FileNotFoundError(_why_none(folder))
    difference = _differing_leaf(marker["leaves"], _describe_leaves(params))
    if difference:
        raise ValueError(f"the gradients in {folder} belong to other params: {difference}.")
    rows = _map(folder, marker, params, "r")
    return jax.tree.unflatten(jax.tree.structure(params), rows)


class GradientFiles:
    """A collection that is being written, from its start or from where a call stopped.

    Attributes:
      written: the number of gradients that are complete.
    """

    def __init__(
        self, folder: Path, params: PyTree, num_grads: int, mask: PyTree | None, per_example: bool
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _read(folder / FINISHED)  # a foreign file of that name is an error now, not in the end
        wanted = {
            "content": _CONTENT,
            "num_grads": num_grads,
            "per_example": per_example,
            "params": _digest(params),
            "mask": _digest(mask),
            "leaves": _describe_leaves(params),
        }
        marker = _read(folder / UNFINISHED)
        if marker is not None and marker["written"] == 0:
            _remove(folder, marker)
            marker = None
        if marker is None:
            marker = _begin(folder, params, wanted)
        else:
            _check_same(folder, marker, wanted)
        self._folder, self._params, self._marker = folder, params, marker
        self._rows = _map(folder, marker, params, "r+")

    @property
    def written(self) -> int:
        return int(self._marker["written"])

    def insert(self, gradient: PyTree) -> None:
        """Writes the next gradient. A process that is killed loses nothing that is written."""
        for rows, leaf in zip(self._rows, jax.tree.leaves(gradient), strict=True):
            rows[self.written] = leaf
        self._marker["written"] += 1
        _write(self._folder / UNFINISHED, self._marker)

    def finish(self) -> PyTree:
        """Replaces the earlier collection by this one, and returns its rows."""
        for rows in self._rows:
            rows.flush()
        earlier = _read(self._folder / FINISHED)
        (self._folder / UNFINISHED).replace(self._folder / FINISHED)
        for name in earlier["files"] if earlier else ():
            with contextlib.suppress(OSError):  # Windows keeps files that are still mapped
                (self._folder / name).unlink()
        return load_gradients(self._folder, self._params)


def _begin(folder: Path, params: PyTree, description: Marker) -> Marker:
    """The marker and the files of a new collection, with their space on the disk."""
    number, leaves = description["num_grads"], named_leaves(params)
    needed = number * sum(
        math.prod(shape_of(leaf)) * np.dtype(wide_dtype(leaf)).itemsize for _, leaf in leaves
    )
    free = shutil.disk_usage(folder).free
    lack = OSError(
        errno.ENOSPC,
        f"{number} gradients take {needed:,} bytes, and {free:,} are free in {folder}: lower "
        "num_grads, choose a folder on another disk, or make room",
    )
    if needed > free:
        raise lack
    names = _free_names(folder, (path for path, _ in leaves))
    marker = {**description, "files": names, "written": 0}
    _write(folder / UNFINISHED, marker)
    try:
        for name, (_, leaf) in zip(names, leaves, strict=True):
            _create(folder / name, (number, *shape_of(leaf)), np.dtype(wide_dtype(leaf)))
    except OSError as error:
        _remove(folder, marker)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise lack from error
        raise
    return marker


def _free_names(folder: Path, paths: Iterable[str]) -> list[str]:
    """A name for each leaf that reads like its path and that nothing in the folder has."""
    taken = {file.name.casefold() for file in folder.iterdir()}
    names = []
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_.() -]", "_", path.replace("/", "."))[-100:]
        numbered = (f"{stem}.{number}.npy" for number in itertools.count(1))
        candidates = itertools.chain([f"{stem}.npy"], numbered)
        names.append(next(name for name in candidates if name.casefold() not in taken))
        taken.add(names[-1].casefold())
    return names


def _create(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """A ``.npy`` file of zeros. Its blocks are reserved: a map of a full disk is a bus error."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with file.open("xb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        size = stream.tell() + math.prod(shape) * dtype.itemsize
        stream.truncate(size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise


def _map(folder: Path, marker: Marker, params: PyTree, mode: Any) -> list[np.memmap[Any, Any]]:
    """The files of the leaves, each checked to be what the marker says."""
    maps = []
    for name, (_, leaf) in zip(marker["files"], named_leaves(params), strict=True):
        file, dtype = folder / name, np.dtype(wide_dtype(leaf))
        shape = (marker["num_grads"], *shape_of(leaf))
        try:
            rows = np.lib.format.open_memmap(file, mode="r")  # "r+" would lengthen a short file
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged, collect the gradients again: {error}") from error
        if rows.shape != shape or rows.dtype != dtype:
            raise ValueError(
                f"{file} must hold {dtype} of shape {shape}, but holds {rows.dtype} of shape "
                f"{rows.shape}: collect the gradients again."
            )
        maps.append(rows if mode == "r" else np.lib.format.open_memmap(file, mode=mode))
    return maps


def _describe_leaves(params: PyTree) -> list[str]:
    return [
        f"{path}: {np.dtype(wide_dtype(leaf))}{list(shape_of(leaf))}"
        for path, leaf in named_leaves(params)
    ]


def _digest(tree: PyTree) -> str:
    """A checksum of the leaves' values."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _check_same(folder: Path, found: Marker, wanted: Marker) -> None:
    """Raises if a folder holds a part of another collection than the one that is wanted."""
    differences = [
        f"{option} is {found[option]} there and {wanted[option]} here"
        for option in ("num_grads", "per_example")
        if found[option] != wanted[option]
    ]
    leaf = _differing_leaf(found["leaves"], wanted["leaves"])
    differences += [leaf] if leaf else []
    differences += [
        f"{tree} has other values" for tree in ("params", "mask") if found[tree] != wanted[tree]
    ]
    if differences:
        raise ValueError(
            f"{folder} holds {found['written']} of {found['num_grads']} gradients of another "
            f"collection: {'; '.join(differences)}. Finish it with the call that began it, choose "
            f"another folder, or discard it: remove {UNFINISHED} and the files that it names."
        )


def _differing_leaf(found: list[str], wanted: list[str]) -> str:
    for there, here in itertools.zip_longest(found, wanted, fillvalue="no leaf"):
        if there != here:
            return f"{there} there, {here} here"
    return ""


def _why_none(folder: Path) -> str:
    marker = _read(folder / UNFINISHED)
    if marker is None:
        return f"{folder} holds no gradients: pass the storage of a collect_gradients call."
    return (
        f"{folder} holds {marker['written']} of {marker['num_grads']} gradients: call "
        "collect_gradients again with the same arguments to finish."
    )


def _remove(folder: Path, marker: Marker) -> None:
    """Removes an unfinished collection."""
    for name in marker["files"]:
        (folder / name).unlink(missing_ok=True)
    (folder / UNFINISHED).unlink()


def _read(file: Path) -> Marker | None:
    try:
        marker = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        marker = None
    if not isinstance(marker, dict) or marker.get("content") != _CONTENT:
        raise ValueError(f"{file} is damaged or not from collect_gradients: choose another folder.")
    # They are opened, and removed: a marker from elsewhere must not reach outside its folder.
    if any(name in ("", "..") or Path(name).name != name for name in marker["files"]):
        raise ValueError(f"{file} names files outside its folder: choose another folder.")
    return marker


def _write(file: Path, marker: Marker) -> None:
    aside = file.with_name(f"{file.name}.new")
    aside.write_text(json.dumps(marker, indent=1))
    aside.replace(file)
