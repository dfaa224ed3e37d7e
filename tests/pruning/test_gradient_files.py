"""Gradients in files: finished or resumable, never overwritten, and refused where they differ."""

import collections
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning
from curvax.pruning import _gradient_files

from . import problems

loss_fn = problems.regression_loss


def collect(folder, batches=None, num_grads=5, params=None, **options):
    tree, data = problems.regression(num_batches=5)
    return pruning.collect_gradients(
        loss_fn,
        tree if params is None else params,
        data if batches is None else batches,
        num_grads,
        storage=folder,
        **options,
    )


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def killed_after(number):
    yield from problems.regression(num_batches=5)[1][:number]
    raise KeyboardInterrupt


def interrupt(folder, number=2, **options):
    with pytest.raises(KeyboardInterrupt):
        collect(folder, killed_after(number), **options)


def weighted(params, x):
    """A loss whose gradient is ``x`` times 1, 2, ... at the leaves in turn."""
    return sum(k * x * jnp.sum(leaf) for k, leaf in enumerate(jax.tree.leaves(params), start=1))


class TestFinished:
    def test_they_are_what_the_host_would_hold_and_are_loaded_again(self, tmp_path):
        rows = collect(tmp_path)
        assert_trees_equal(rows, collect("host"))
        assert_trees_equal(pruning.load_gradients(tmp_path, problems.regression()[0]), rows)

    def test_placeholders_of_the_params_suffice_to_load(self, tmp_path):
        rows = collect(tmp_path)
        like = jax.eval_shape(lambda: problems.regression()[0])
        assert_trees_equal(pruning.load_gradients(tmp_path, like), rows)

    def test_they_are_read_only(self, tmp_path):
        rows = collect(tmp_path)
        with pytest.raises(ValueError, match="read-only"):
            rows["first"]["bias"][0] = 0

    def test_numpy_reads_the_file_of_a_leaf(self, tmp_path):
        rows = collect(tmp_path)
        np.testing.assert_array_equal(
            np.load(tmp_path / "first.kernel.npy"), rows["first"]["kernel"]
        )

    def test_new_ones_replace_them_and_rows_that_are_mapped_stay(self, tmp_path):
        first = collect(tmp_path)
        double = jax.tree.map(lambda x: 2 * x, problems.regression()[0])
        second = collect(tmp_path, params=double)
        assert_trees_equal(first, collect("host"))
        assert_trees_equal(second, collect("host", params=double))
        assert len(list(tmp_path.glob("*.npy"))) == 3

    def test_a_run_that_fails_leaves_them(self, tmp_path):
        rows = collect(tmp_path)
        with pytest.raises(TypeError):
            collect(tmp_path, [(jnp.ones((4, 99)), jnp.ones((4, 2)))] * 5)
        assert_trees_equal(pruning.load_gradients(tmp_path, problems.regression()[0]), rows)

    def test_a_run_that_is_killed_leaves_them(self, tmp_path):
        rows = collect(tmp_path)
        interrupt(tmp_path)
        assert_trees_equal(pruning.load_gradients(tmp_path, problems.regression()[0]), rows)

    def test_the_disk_holds_no_more_than_they_take(self, tmp_path):
        interrupt(tmp_path, 0)
        collect(tmp_path)
        collect(tmp_path)
        names = sorted(path.name for path in tmp_path.iterdir())
        listed = json.loads((tmp_path / "gradients.json").read_text())["files"]
        assert names == sorted([*listed, "gradients.json"])


class TestResumed:
    @pytest.mark.parametrize("number", [1, 4])
    def test_the_same_call_goes_on_at_the_first_that_is_missing(self, tmp_path, number):
        interrupt(tmp_path, number)
        _, batches = problems.regression(num_batches=5)
        # Were the first ones differentiated again, they would not be finite.
        passed = [jax.tree.map(lambda x: x * np.nan, batch) for batch in batches[:number]]
        rows = collect(tmp_path, iter([*passed, *batches[number:]]))
        assert_trees_equal(rows, collect("host"))

    @pytest.mark.parametrize("micro_batch_size", [None, 3, 8])
    def test_gradients_of_examples_too(self, tmp_path, micro_batch_size):
        options = {"num_grads": 21, "per_example": True, "micro_batch_size": micro_batch_size}
        interrupt(tmp_path, 1, **options)
        with pytest.raises(ValueError, match="batches gave 16 gradients"):
            collect(tmp_path, problems.regression(num_batches=5)[1][:2], **options)
        rows = collect(tmp_path, **options)
        assert_trees_equal(rows, collect("host", **options))

    def test_a_stop_just_before_the_end_needs_no_batch(self, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(_gradient_files.GradientFiles, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path)
        monkeypatch.undo()
        assert_trees_equal(collect(tmp_path, []), collect("host"))

    def test_a_stop_before_the_first_gradient_leaves_no_claim(self, tmp_path):
        interrupt(tmp_path, 0)
        assert jax.tree.leaves(collect(tmp_path, num_grads=3))[0].shape[0] == 3

    def test_after_the_process_was_killed(self, tmp_path):
        program = f"""
import os, pathlib, signal
import jax.numpy as jnp
from curvax import pruning
def batches():
    yield jnp.array([1.0, 2.0])
    yield jnp.array([3.0, 4.0])
    os.kill(os.getpid(), signal.SIGKILL)
pruning.collect_gradients(
    jnp.vdot, jnp.ones(2), batches(), 3, storage=pathlib.Path({str(tmp_path)!r}))
"""
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        nothing = jnp.full(2, jnp.nan)
        rows = pruning.collect_gradients(
            jnp.vdot, jnp.ones(2), [nothing, nothing, jnp.array([5.0, 6.0])], 3, storage=tmp_path
        )
        np.testing.assert_array_equal(rows, [[1, 2], [3, 4], [5, 6]])


class TestAnotherCollectionIsUnfinished:
    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            ({"num_grads": 4}, "num_grads is 5 there and 4 here"),
            ({"per_example": True}, "per_example is False there and True here"),
            ({"params": problems.regression(seed=1)[0]}, "params has other values"),
            (
                {"mask": jax.tree.map(lambda x: x > 0, problems.regression()[0])},
                "mask has other values",
            ),
            (
                {"params": {**problems.regression()[0], "third": jnp.ones(2)}},
                r"no leaf there, third: float32\[2\] here",
            ),
        ],
    )
    def test_the_error_says_in_what_it_differs_and_what_to_do(self, tmp_path, options, difference):
        interrupt(tmp_path)
        with pytest.raises(ValueError, match=rf"2 of 5 gradients.*{difference}.*another folder"):
            collect(tmp_path, **options)
        assert_trees_equal(collect(tmp_path), collect("host"))

    @pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "inner/victim", "..", ""])
    def test_a_marker_cannot_reach_outside_its_folder(self, tmp_path, name):
        victim, folder = tmp_path / "victim", tmp_path / "gradients"
        victim.write_text("precious")
        collect(folder)
        marker = json.loads((folder / "gradients.json").read_text())
        marker |= {"written": 0, "files": [name] * len(marker["files"])}
        for file in ("gradients.json", "unfinished.json"):
            (folder / file).write_text(json.dumps(marker))
            with pytest.raises(ValueError, match="names files outside its folder"):
                collect(folder)
            (folder / file).unlink()
        assert victim.read_text() == "precious"

    def test_a_foreign_marker_is_an_error(self, tmp_path):
        for name in ("gradients.json", "unfinished.json"):
            (tmp_path / name).write_text("{}")
            with pytest.raises(ValueError, match=rf"{name} is damaged or not from"):
                collect(tmp_path)
            (tmp_path / name).unlink()


class TestDisk:
    def test_too_little_space_is_a_sentence_with_both_numbers(self, tmp_path, monkeypatch):
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, 1000))
        with pytest.raises(OSError, match=r"5 gradients take 1,800 bytes, and 1,000 are free"):
            collect(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_fills_meanwhile_leaves_nothing_behind(self, tmp_path, monkeypatch):
        rows = collect(tmp_path)
        before = sorted(tmp_path.iterdir())

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(OSError, match=r"5 gradients take 1,800 bytes.*make room"):
            collect(tmp_path)
        assert sorted(tmp_path.iterdir()) == before
        assert_trees_equal(pruning.load_gradients(tmp_path, problems.regression()[0]), rows)

    def test_a_file_system_that_cannot_reserve_is_used_without(self, tmp_path, monkeypatch):
        def unsupported(*_):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
        assert_trees_equal(collect(tmp_path), collect("host"))

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing to reserve with")
    def test_blocks_are_reserved_before_a_gradient_is_written(self, tmp_path):
        wide = jnp.ones(10_000)
        with pytest.raises(ValueError, match="batches gave 0"):
            pruning.collect_gradients(jnp.vdot, wide, [], 10, storage=tmp_path)
        (file,) = tmp_path.glob("*.npy")
        assert file.stat().st_blocks * 512 >= 400_000


class TestNames:
    @pytest.mark.parametrize(
        "params",
        [
            {"a.b": jnp.ones(1), "a": {"b": jnp.ones(2)}},
            {"a/b": jnp.ones(1), "a": {"b": jnp.ones(2)}},
            {"Kernel": jnp.ones(1), "kernel": jnp.ones(2)},
            {"(the root)": jnp.ones(1), "\u00e4": jnp.ones(2), "\u00f6": jnp.ones(3)},
            {
                "..": jnp.ones(1),
                "../up": jnp.ones(2),
                'a\\:*?"<>|\n\0': jnp.ones(3),
                "": jnp.ones(4),
            },
            {"long " * 100 + "kernel": jnp.ones(1), "long " * 100 + "bias": jnp.ones(2)},
            {"very long " * 100: {"kernel " * 30: jnp.ones(1), "the kernel " * 30: jnp.ones(2)}},
        ],
    )
    def test_leaves_whose_paths_look_alike_or_are_no_file_names(self, tmp_path, params):
        folder = tmp_path / "rows"
        rows = pruning.collect_gradients(weighted, params, [1.0, 3.0], 2, storage=folder)
        expected = pruning.collect_gradients(weighted, params, [1.0, 3.0], 2, storage="host")
        assert_trees_equal(rows, expected)
        names = [file.name.casefold() for file in folder.glob("*.npy")]
        assert len(set(names)) == len(jax.tree.leaves(params))
        assert [path.name for path in tmp_path.iterdir()] == ["rows"]

    def test_a_foreign_file_in_the_folder_stays(self, tmp_path):
        (tmp_path / "FIRST.kernel.npy").write_text("mine")
        assert_trees_equal(collect(tmp_path), collect("host"))
        assert (tmp_path / "FIRST.kernel.npy").read_text() == "mine"

    def test_scalars_integers_and_empty_leaves_have_files_too(self, tmp_path):
        params = {"count": jnp.array(3), "empty": jnp.zeros((0, 3)), "w": jnp.float32(1)}
        rows = pruning.collect_gradients(weighted, params, [1.0, 3.0], 2, storage=tmp_path)
        np.testing.assert_array_equal(rows["w"], [3, 9])
        np.testing.assert_array_equal(rows["count"], [0, 0])
        assert rows["empty"].shape == (2, 0, 3)


class TestDamage:
    def damage(self, file, how):
        if how == "truncated":
            os.truncate(file, file.stat().st_size - 4)
        elif how == "emptied":
            file.write_bytes(b"")
        elif how == "removed":
            file.unlink()
        else:
            np.save(file, np.ones((5, 10), how))

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("truncated", "is damaged"),
            ("emptied", "is damaged"),
            ("removed", "is damaged"),
            ("float64", r"must hold float32 of shape \(5, 10\), but holds float64"),
        ],
    )
    @pytest.mark.parametrize("finished", [True, False])
    def test_a_damaged_file_is_named(self, tmp_path, how, message, finished):
        if finished:
            collect(tmp_path)
        else:
            interrupt(tmp_path)
        self.damage(tmp_path / "first.bias.npy", how)
        read = pruning.load_gradients if finished else collect
        with pytest.raises(ValueError, match=rf"first\.bias\.npy {message}"):
            read(tmp_path, params=problems.regression()[0])

    def test_nothing_to_load(self, tmp_path):
        params = problems.regression()[0]
        with pytest.raises(FileNotFoundError, match="holds no gradients"):
            pruning.load_gradients(tmp_path, params)
        interrupt(tmp_path)
        with pytest.raises(FileNotFoundError, match="holds 2 of 5 gradients: call"):
            pruning.load_gradients(tmp_path, params)

    def test_gradients_of_other_params_are_not_loaded(self, tmp_path):
        collect(tmp_path)
        with pytest.raises(
            ValueError, match=r"first/bias: float32\[10\] there, w: float32\[2\] he"
        ):
            pruning.load_gradients(tmp_path, {"w": jnp.ones(2)})
