"""The demos and examples: what they print and save, and what a wrong file or option says."""

import gzip
import importlib
import re
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch):
    """A function that imports a script of the examples by its name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(ROOT / "examples" / f"{name}.py"):
            del sys.modules[name]


@pytest.fixture
def demo(example):
    return example("digits")


@pytest.fixture
def pruning_demo(example):
    return example("prune_digits")


def write_idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    """Forty images in the four files of Fashion-MNIST, one of them not compressed."""
    generator = np.random.default_rng(0)
    for name, size in (("train", 40), ("t10k", 8)):
        images = generator.integers(0, 256, (size, 28, 28))
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(40) % 10)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(8))
    return tmp_path


def test_every_contestant_learns_the_digits(demo, tmp_path, capsys):
    demo.main(["--epochs", "2", "--output", str(tmp_path / "plots")])
    output = capsys.readouterr().out
    for name in demo.CONTESTANTS:
        row = next(line for line in output.splitlines() if line.startswith(name))
        accuracy = float(row.split()[-2].rstrip("%"))
        assert accuracy > 80
    plot = Path(output.split("Loss curves: ")[1].strip())
    assert plot.parent == tmp_path / "plots"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_idx_files_are_read_compressed_or_not(demo, idx_folder, monkeypatch):
    dataset = demo.from_idx_files(idx_folder)
    assert dataset.train_images.shape == (40, 28, 28, 1)
    assert 0 <= dataset.train_images.min() < dataset.train_images.max() <= 1
    np.testing.assert_array_equal(dataset.test_labels, np.arange(8))
    # The fastest to compile in every place: here the images count.
    contestants = dict.fromkeys(demo.CONTESTANTS, demo.CONTESTANTS["Adam"])
    monkeypatch.setattr(demo, "CONTESTANTS", contestants)
    demo_args = ["--dataset", "fashion-mnist", "--data-dir", str(idx_folder)]
    demo.main([*demo_args, "--epochs", "1", "--batch-size", "16", "--output", str(idx_folder)])
    assert (idx_folder / "fashion-mnist.png").is_file()


def test_pruning_by_curvature_beats_magnitudes(pruning_demo, tmp_path, capsys):
    arguments = ["--epochs", "4", "--num-grads", "128", "--recomputations", "2"]
    pruning_demo.main([*arguments, "--output", str(tmp_path)])
    rows = {
        line[:18].strip(): [float(value.rstrip("%")) for value in line[18:].split()]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("magnitude", "OBS", "layer"))
    }
    at_80 = pruning_demo.SPARSITIES.index(0.8)
    for name in ("OBS, one step", "OBS, in steps", "OBS, then layers"):
        assert rows[name][at_80] > rows["magnitude"][at_80]
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_more_gradients_than_images_are_refused(pruning_demo, capsys):
    with pytest.raises(SystemExit):
        pruning_demo.main(["--num-grads", "5000"])
    assert "--num-grads is above the 1437 training images" in capsys.readouterr().err


def test_poissons_equation_has_an_error_for_each_optimizer(example, tmp_path, capsys):
    poisson = example("poisson")
    plot = tmp_path / "errors.png"
    poisson.main(["--seconds", "0.1", "--width", "8", "--output", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:-1]] == list(poisson.CONTESTANTS)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_natural_gradient_solves_poissons_equation_in_forty_steps(example):
    poisson = example("poisson")
    with jax.enable_x64(True):
        tx, step = poisson.natural_gradient()
        params = poisson.init(jax.random.key(0), width=16)
        keys = jax.random.split(jax.random.key(1), 40)
        step, state = jax.jit(step), tx.init(params)
        for key in keys:
            params, state, _ = step(params, state, key)
        assert poisson.relative_error(params) < 1e-3


def test_a_missing_file_is_one_sentence(demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main(["--dataset", "fashion-mnist", "--data-dir", str(tmp_path)])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "train-images-idx3-ubyte is missing" in message
    assert "--data-dir" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no IDX", "is not an IDX file of bytes with 3 axes"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28), "does not hold the"),
    ],
)
def test_a_damaged_file_is_named(demo, tmp_path, capsys, content, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(SystemExit):
        demo.main(["--dataset", "fashion-mnist", "--data-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(demo, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--batch-size", "5000"])
    assert "--batch-size is above the 1437 training images" in capsys.readouterr().err


@pytest.fixture
def transformer(example, monkeypatch):
    """The transformer with one layer on eight characters."""
    module = example("nnx_transformer")
    monkeypatch.setattr(module, "LAYERS", 1)
    monkeypatch.setattr(module, "CONTEXT", 8)
    return module


def test_a_transformer_resumes_as_if_it_had_never_stopped(transformer, tmp_path, capsys):
    def lines_of(steps, folder):
        arguments = ["--schedule-steps", "8", "--batch-size", "4", "--every", "2"]
        transformer.main([*arguments, "--steps", steps, "--output", str(tmp_path / folder)])
        return re.findall(r"^step.*", capsys.readouterr().out, flags=re.MULTILINE)

    whole = lines_of("4", folder="whole")
    assert [*lines_of("2", folder="parts"), *lines_of("4", folder="parts")] == whole
    assert "refreshes 4  refusals 0  clipped" in whole[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "mfac"])
def test_a_transformer_learns_its_text(transformer, tmp_path, capsys, optimizer):
    text = tmp_path / "text"
    text.write_text("abcdefgh" * 400)
    arguments = ["--text", str(text), "--steps", "40", "--every", "20", "--batch-size", "8"]
    output = ["--accumulate", "1", "--output", str(tmp_path)]
    transformer.main(["--optimizer", optimizer, *arguments, *output])
    losses = re.findall(r"validation (\d.\d+)", capsys.readouterr().out)
    assert float(losses[-1]) < 1.5 < np.log(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "5", "--accumulate", "2"], "must be a multiple of --accumulate, 2"),
        (["--text", "SHORT"], "the text has 3 characters"),
    ],
)
def test_a_transformer_refuses_what_it_cannot_train_on(
    transformer, tmp_path, capsys, arguments, message
):
    short = tmp_path / "short"
    short.write_text("abc")
    with pytest.raises(SystemExit):
        transformer.main([str(short) if a == "SHORT" else a for a in arguments])
    assert message in capsys.readouterr().err


def test_a_linen_network_is_trained_pruned_tuned_and_reloaded(example, tmp_path, capsys):
    arguments = ["--epochs", "3", "--num-grads", "64", "--output", str(tmp_path)]
    example("linen_cnn").main(arguments)
    rows = re.findall(
        r"^(\S+) +test accuracy +(\S+)%  zeros +(\S+)%", capsys.readouterr().out, re.M
    )
    accuracy = {stage: float(share) for stage, share, _ in rows}
    zeros = {stage: float(share) for stage, _, share in rows}
    assert accuracy["trained"] > 90
    assert zeros == {"trained": 0.0, "pruned": 90.0, "fine-tuned": 90.0, "reloaded": 90.0}
    assert accuracy["fine-tuned"] > accuracy["pruned"]
    assert accuracy["reloaded"] == accuracy["fine-tuned"]


def test_an_equinox_model_is_trained_and_saved(example, tmp_path, capsys):
    example("equinox_gru").main(["--epochs", "2", "--width", "32", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert float(re.findall(r"test accuracy (\S+)%", output)[-1]) > 70
    assert "largest eigenvalues" in output
    assert (tmp_path / "equinox_gru.eqx").stat().st_size > 0
