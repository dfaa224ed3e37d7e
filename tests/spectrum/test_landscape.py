"""Losses along paths and over planes are those of the combined parameters, over all examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import spectrum

KEYS = jax.random.split(jax.random.key(0), 6)
INPUTS = jax.random.normal(KEYS[0], (11, 3))
TARGETS = jax.random.normal(KEYS[1], (11, 2))
BATCHES = [(INPUTS[:8], TARGETS[:8]), (INPUTS[8:], TARGETS[8:])]  # uneven


def make_params(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(first, (3, 4))},
        "out": {"kernel": jax.random.normal(second, (4, 2))},
        "steps": jnp.array(7),
    }


def loss_fn(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"])
    return jnp.mean((hidden @ params["out"]["kernel"] - targets) ** 2)


START, MIDDLE, END = (make_params(key) for key in KEYS[2:5])


def at(t, first=START, second=END):
    return jax.tree.map(
        lambda a, b: (1 - t) * a + t * b if a.dtype.kind == "f" else a, first, second
    )


def whole_loss(params):
    return float(loss_fn(params, INPUTS, TARGETS))


def test_a_line_has_the_losses_of_its_points():
    curve = spectrum.loss_along(loss_fn, [START, END], BATCHES, num_points=5)
    np.testing.assert_allclose(curve.positions, [0, 0.25, 0.5, 0.75, 1])
    expected = [whole_loss(at(t)) for t in curve.positions]
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-5)


def test_a_path_of_several_lines_goes_through_each_of_their_ends():
    curve = spectrum.loss_along(loss_fn, [START, MIDDLE, END], iter(BATCHES), num_points=5)
    expected = [
        whole_loss(params)
        for params in (START, at(0.5, START, MIDDLE), MIDDLE, at(0.5, MIDDLE, END), END)
    ]
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-5)


def test_one_layer_moves_and_the_others_stay():
    curve = spectrum.loss_along(
        loss_fn, [START, END], BATCHES, num_points=3, select=lambda path, _: path[:3] == "out"
    )
    expected = [whole_loss({**START, "out": at(t)["out"]}) for t in (0, 0.5, 1)]
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("losses", "barrier"), [([0, 2, 1, 0], 2), ([1, 3, 2, 4], 1), ([3, 1, 1, 0], 0)]
)
def test_the_barrier_is_above_the_line_between_the_ends(losses, barrier):
    curve = spectrum.LossCurve(np.linspace(0, 1, 4), np.array(losses, float))
    np.testing.assert_allclose(curve.barrier, barrier)


def test_a_plane_has_the_loss_of_each_of_its_points():
    right = jax.tree.map(jnp.subtract, END, START)
    up = jax.tree.map(jnp.subtract, MIDDLE, START)
    surface = spectrum.loss_over_plane(
        loss_fn, START, right, up, BATCHES, extent=(0, 1, 0, 2), num_points=3
    )
    np.testing.assert_allclose(surface.right, [0, 0.5, 1])
    np.testing.assert_allclose(surface.up, [0, 1, 2])
    np.testing.assert_allclose(surface.losses[0, 2], whole_loss(END), rtol=1e-5)
    np.testing.assert_allclose(surface.losses[1, 0], whole_loss(MIDDLE), rtol=1e-5)
    one = jax.tree.map(
        lambda p, a, b: p + 0.5 * a + 2 * b if p.dtype.kind == "f" else p, START, right, up
    )
    np.testing.assert_allclose(surface.losses[2, 1], whole_loss(one), rtol=1e-5)


def test_the_losses_of_bfloat16_parameters_are_those_of_wide_ones():
    narrow = [
        jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype.kind == "f" else x, tree)
        for tree in (START, END)
    ]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in narrow]
    curves = [
        spectrum.loss_along(loss_fn, trees, BATCHES, num_points=4).losses
        for trees in (narrow, wide)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "batches", "options", "message"),
    [
        ([START], BATCHES, {}, "at least two trees of parameters, got 1"),
        ([START, END], BATCHES, {"num_points": 1}, "num_points must be an integer of at least 2"),
        ([START, END["out"]], BATCHES, {}, "must match params leaf for leaf"),
        ([START, END], [], {}, "batches are empty"),
        ([START, END], BATCHES, {"select": lambda *_: False}, "at least one real leaf"),
    ],
)
def test_what_cannot_be_drawn_is_refused(path, batches, options, message):
    with pytest.raises(ValueError, match=message):
        spectrum.loss_along(loss_fn, path, batches, **options)
