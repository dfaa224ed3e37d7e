"""Which entries share a curvature value, in Flax layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.optimizers._averaging import average_curvature

pytestmark = pytest.mark.oldest

HWIO = (3, 3, 4, 5)


def values(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def averaged(averaging, path, shape):
    """The average of a leaf at ``path``, and the leaf itself."""
    leaf = values(shape)
    tree = leaf
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return jax.tree.leaves(average_curvature(averaging, tree))[0], np.asarray(leaf)


def mean_over(leaf, axes):
    return np.broadcast_to(np.abs(leaf).mean(axis=axes, keepdims=True), leaf.shape)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("Conv_0/kernel", HWIO, (0, 1)),
        ("stem/kernel", HWIO, (0, 1)),
        ("keypoints/kernel", HWIO, (0, 1)),
        ("conv/kernel", (3, 4, 5), (0,)),
        ("conv/kernel", (2, 3, 3, 4, 5), (1, 2)),
        ("attention/query/kernel", (8, 2, 4), ()),
        ("scanned/attention/query/kernel", (6, 8, 2, 4), ()),
        ("block/qkv/kernel", (6, 8, 2, 4), ()),
        ("projection/kernel", (8, 2, 4), ()),
        ("conv/bias", (5,), ()),
        ("dense/kernel", (4, 5), ()),
        ("scale", (), ()),
    ],
)
def test_the_default_averages_the_spatial_axes_of_convolutions_only(path, shape, axes):
    result, leaf = averaged("conv", path, shape)
    np.testing.assert_allclose(result, mean_over(leaf, axes) if axes else np.abs(leaf), rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("dense/kernel", (4, 5), (0,)),
        ("token/embedding", (7, 4), ()),
        ("conv/kernel", HWIO, (0, 1)),
        ("dense/kernel", (3, 4, 5), (1,)),
        ("attention/query/kernel", (8, 2, 4), ()),
        ("dense/bias", (5,), ()),
    ],
)
def test_row_averages_the_fan_in_of_each_output_unit(path, shape, axes):
    result, leaf = averaged("row", path, shape)
    np.testing.assert_allclose(result, mean_over(leaf, axes) if axes else np.abs(leaf), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 31, 32, 70, 96])
@pytest.mark.parametrize(("name", "axis"), [("kernel", 0), ("weight", 1)])
def test_block_averages_runs_of_32_along_the_fan_in_with_a_ragged_tail(name, axis, size):
    shape = (size, 3) if axis == 0 else (3, size)
    result, leaf = averaged("block", f"dense/{name}", shape)
    runs = np.split(np.abs(leaf), range(32, size, 32), axis=axis)
    expected = [np.broadcast_to(run.mean(axis=axis, keepdims=True), run.shape) for run in runs]
    np.testing.assert_allclose(result, np.concatenate(expected, axis=axis), rtol=1e-5)


def test_paper_averages_the_signed_values():
    result, leaf = averaged("paper", "conv/kernel", HWIO)
    expected = np.broadcast_to(leaf.mean(axis=(0, 1), keepdims=True), leaf.shape)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
    dense, leaf = averaged("paper", "dense/kernel", (4, 5))
    np.testing.assert_array_equal(dense, leaf)


def test_none_takes_the_absolute_value_only():
    result, leaf = averaged("none", "conv/kernel", HWIO)
    np.testing.assert_array_equal(result, np.abs(leaf))


def test_a_function_of_path_and_shape_decides():
    seen = []

    def rule(path, shape):
        seen.append((path, shape))
        return curvax.Block(2, axis=1) if path == "a/kernel" else (-1,)

    tree = {"a": {"kernel": values((3, 5))}, "b": [values((2, 4), 1)]}
    result = average_curvature(rule, tree)
    assert seen == [("a/kernel", (3, 5)), ("b/0", (2, 4))]
    kernel = np.abs(tree["a"]["kernel"])
    pairs = [kernel[:, i : i + 2].mean(axis=1, keepdims=True) for i in (0, 2, 4)]
    expected = np.repeat(np.concatenate(pairs, axis=1), 2, axis=1)[:, :5]
    np.testing.assert_allclose(result["a"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(result["b"][0], mean_over(tree["b"][0], (-1,)), rtol=1e-6)


def test_the_optimizer_uses_the_average():
    kernel = values(HWIO)
    params = {"conv": {"kernel": kernel}}
    tx = curvax.scale_by_adahessian(eps=1e-8, clip_threshold=None)
    updates, state = tx.update(
        {"conv": {"kernel": jnp.ones(HWIO)}}, tx.init(params), params, hessian_diag=params
    )
    assert state.nu["conv"]["kernel"].shape == HWIO
    np.testing.assert_allclose(
        updates["conv"]["kernel"], 1 / mean_over(np.asarray(kernel), (0, 1)), rtol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [{"averaging": lambda path, shape: (5,)}, {"layout": {"dense": "HWIO"}}],
    ids=["rule", "layout"],
)
def test_what_does_not_fit_a_leaf_is_refused_before_the_first_step(options):
    with pytest.raises(ValueError, match="dense/kernel, which has shape"):
        curvax.adahessian(0.1, **options).init({"dense": {"kernel": jnp.ones((4, 5))}})


@pytest.mark.parametrize("share", [(2,), (0, 0), (0, -2), [0], 0, curvax.Block(2, axis=5)])
def test_axes_that_are_not_there_are_refused(share):
    with pytest.raises(
        ValueError, match=r"distinct axes of dense/kernel, which has shape \(4, 5\)"
    ):
        averaged(lambda path, shape: share, "dense/kernel", (4, 5))


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="length of at least 1"):
        averaged(lambda path, shape: curvax.Block(0), "dense/kernel", (4, 5))


def test_an_unknown_preset_is_refused_at_construction():
    with pytest.raises(ValueError, match="averaging must be one of 'conv', 'row'"):
        curvax.adahessian(0.1, averaging="spatial")
