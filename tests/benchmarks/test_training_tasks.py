"""The training tasks: what they read, augment and solve."""

import gzip
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.tasks import TASKS, images, physics
from training.tasks.task import DataError, warmup_cosine


@pytest.mark.parametrize("name", ["cifar-resnet", "shakespeare", "multi30k"])
def test_missing_data_says_what_was_looked_for_and_what_to_do(name, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}.*--data-dir"):
        TASKS[name]("cpu", tmp_path)


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = jax.vmap(lambda step: warmup_cosine(step, 100))(jnp.arange(100))
    assert rates.max() == pytest.approx(1.0, abs=0.01)
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert bool(jnp.all(jnp.diff(rates[5:]) < 0))


def test_the_published_schedule_has_its_steps_at_epochs_80_and_120_of_160():
    steps = np.array([0, 79, 80, 119, 120, 159])
    rates = images.step_schedule(steps, 160)
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01])


# --- Images ---


def write_pickles(folder, size=2):
    """Batches of CIFAR-10 in the distributed form, whose pixels tell channel, row and column."""
    folder.mkdir()
    channel, row, column = np.indices((3, 32, 32))
    pixels = (50 * channel + row + column).astype(np.uint8).reshape(1, -1).repeat(size, axis=0)
    batch = {b"data": pixels, b"labels": list(range(size))}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))


def test_the_distributed_pickles_are_read_with_channels_last(tmp_path):
    write_pickles(tmp_path / "cifar-10-batches-py")
    pictures, labels, *test = images._from_pickles(tmp_path / "cifar-10-batches-py")
    assert pictures.shape == (10, 32, 32, 3)
    assert labels.tolist() == 5 * [0, 1]
    np.testing.assert_array_equal(pictures[0, 3, 7], [10, 60, 110])
    assert test[0].shape == (2, 32, 32, 3)


@pytest.mark.parametrize("seed", range(3))
def test_an_augmented_image_is_shifted_by_up_to_four_pixels_and_perhaps_mirrored(seed):
    picture = jax.random.normal(jax.random.key(seed), (1, 12, 10, 3))
    data = picture, jnp.array([7])
    indices = jnp.zeros(5, jnp.int32)
    augmented, labels = images.augmented(data, indices, jax.random.key(seed))
    assert labels.tolist() == 5 * [7]
    padded = np.pad(picture[0], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[i : i + 12, j : j + 10] for i in range(9) for j in range(9)]
    choices = np.stack([crop[:, ::step] for crop in crops for step in (1, -1)])
    for image in np.asarray(augmented):
        assert (choices == image).all(axis=(1, 2, 3)).any()


# --- Equations ---


def test_the_solution_of_burgers_equation_satisfies_it():
    generator = np.random.default_rng(0)
    points = generator.uniform((0.1, -0.9), (0.9, 0.9), size=(200, 2))
    points = points[np.abs(points[:, 1]) > 0.1]  # away from the shock
    step = 1e-4

    def u(dt=0.0, dx=0.0):
        return physics.burgers_solution(points + np.array([dt, dx]))

    u_t = (u(dt=step) - u(dt=-step)) / (2 * step)
    u_x = (u(dx=step) - u(dx=-step)) / (2 * step)
    u_xx = (u(dx=step) - 2 * u() + u(dx=-step)) / step**2
    np.testing.assert_allclose(u_t + u() * u_x, physics.VISCOSITY * u_xx, atol=2e-3)


def test_the_solution_of_burgers_equation_starts_as_given():
    x = np.linspace(-1, 1, 21)
    points = np.stack([np.full_like(x, 1e-9), x], axis=1)
    np.testing.assert_allclose(physics.burgers_solution(points), -np.sin(np.pi * x), atol=1e-3)


@pytest.mark.parametrize("name", ["poisson", "burgers"])
def test_residuals_are_those_of_points_inside_and_then_on_the_boundary(name, tmp_path):
    task = TASKS[name]("cpu", tmp_path)
    variables = task.init(jax.random.key(0))
    inputs, targets = task.sample(task.data, None, jax.random.key(1))
    outputs, _ = task.apply(variables.params, inputs, {}, None)
    assert outputs.shape == targets.shape == (len(inputs["inside"]) + len(inputs["boundary"]), 1)
    moved = {**inputs, "boundary": inputs["boundary"] + 0.1}
    others, _ = task.apply(variables.params, moved, {}, None)
    inside = len(inputs["inside"])
    np.testing.assert_array_equal(others[:inside], outputs[:inside])
    assert not np.allclose(others[inside:], outputs[inside:])


# --- Clicks and sentences ---


def test_clicks_are_rare_and_can_be_predicted(tmp_path):
    task = TASKS["clicks"]("cpu", tmp_path)
    _, labels = task.sample(task.data, jnp.arange(20_000), jax.random.key(0))
    assert 0.1 < float(jnp.mean(labels)) < 0.3
    loss = task.evaluate(task.init(jax.random.key(0)), "validation")["loss"]
    assert 0.4 < loss < 2.0


def write_sentences(folder):
    pairs = [("ein hund läuft .", "a dog runs ."), ("eine katze schläft .", "a cat sleeps .")]
    folder.mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for side, language in enumerate(("de", "en")):
            lines = "\n".join(pair[side] for pair in 32 * pairs) + "\n"
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))


def test_sentences_become_shifted_tokens_and_padding_has_no_weight(tmp_path):
    write_sentences(tmp_path / "multi30k")
    task = TASKS["multi30k"]("cpu", tmp_path)
    (source, decoder_inputs), targets = task.sample(task.data, jnp.arange(2), jax.random.key(0))
    labels, weights = targets
    assert source.shape[0] == decoder_inputs.shape[0] == 2
    np.testing.assert_array_equal(decoder_inputs[:, 1:], labels[:, :-1])
    np.testing.assert_array_equal(weights > 0, labels != 0)
    numbers = task.evaluate(task.init(jax.random.key(0)), "validation")
    assert 1.0 < numbers["loss"] < 10.0
