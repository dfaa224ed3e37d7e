"""Blocks: a layout that loses nothing, fits 16-bit positions and stays within shards."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.fisher.window._blocks import Blocks

shapes = st.lists(st.integers(1, 40), max_size=4).map(tuple) | st.sampled_from(
    [(), (5000,), (4099,), (300, 70), (3, 3, 40, 40), (129, 65), (50257, 2), (64, 4098)]
)


@hypothesis.given(shape=shapes)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_split_and_join_are_inverse(shape):
    leaf = np.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    layout = Blocks.of(shape)
    blocks = jax.jit(layout.split)(leaf)
    assert blocks.shape == (*layout.grid, layout.size)
    assert layout.size <= 4096
    np.testing.assert_array_equal(jax.jit(layout.join)(blocks), leaf)
    assert np.count_nonzero(blocks) == leaf.size  # padding is zeros, nothing is counted twice


def test_a_block_is_a_box_of_the_leaf():
    leaf = jnp.arange(64.0).reshape(8, 8) // 1
    layout = Blocks((8, 8), (4, 2), (2, 4))
    np.testing.assert_array_equal(layout.split(leaf)[0, 1], [4, 5, 6, 7, 12, 13, 14, 15])


@pytest.mark.parametrize("shape", [(768, 3072), (30522, 768), (3, 3, 64, 64), (16,), (1600,)])
def test_an_axis_in_eight_equal_parts_has_no_block_across_them(shape):
    layout = Blocks.of(shape)
    for size, blocks in zip(shape, layout.grid, strict=True):
        assert blocks % math.gcd(size, 8) == 0


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((4096, 4096), (256, 128)),
        ((4096, 32, 128), (256, 16, 8)),  # input, heads, entries of a head
        ((32, 128, 4096), (16, 8, 256)),
        ((4096, 8, 128), (256, 8, 8)),
        ((32, 4096, 11008), (32, 256, 256)),  # a stack of layers
        ((8, 4096, 14336), (8, 256, 256)),  # experts
        ((32000, 4096), (256, 256)),
        ((8192, 28672), (256, 256)),
        ((768, 3072), (32, 128)),
        ((4096,), (64,)),
    ],
)
def test_long_axes_are_cut_for_hundreds_of_devices(shape, cuts):
    layout = Blocks.of(shape)
    assert layout.grid == cuts
    assert layout.size * math.prod(cuts) == math.prod(shape)  # nothing is padded


def on_devices(*spec, devices=256):
    mesh = jax.sharding.AbstractMesh((devices,), ("x",))
    return jax.NamedSharding(mesh, jax.P(*spec))


def test_a_block_across_devices_is_refused_by_name():
    message = (
        "Axis 1 of layers/kernel, of shape .4096, 4096., is cut into 128 parts, .* 256 devices"
    )
    Blocks.of((4096, 4096)).check_devices("layers/kernel", on_devices("x"))
    Blocks.of((4096, 4096)).check_devices("layers/kernel", on_devices(None, "x", devices=128))
    with pytest.raises(ValueError, match=message):
        Blocks.of((4096, 4096)).check_devices("layers/kernel", on_devices(None, "x"))


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("shape", [(64, 24), (40, 4120)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_sharded_leaf_is_split_and_joined_where_it_is(kind, shape, axis):
    from tests.contract.collectives import collectives
    from tests.contract.meshes import make_mesh

    mesh = make_mesh(kind)
    spec = jax.P(*["x" if index == axis else None for index in range(2)])
    layout = Blocks.of(shape)
    with jax.set_mesh(mesh):
        values = np.random.default_rng(0).standard_normal(shape)
        leaf = jax.device_put(jnp.asarray(values), jax.NamedSharding(mesh, spec))
        there_and_back = jax.jit(lambda leaf: layout.join(2 * layout.split(leaf)))
        compiled = there_and_back.lower(leaf).compile()
        assert not collectives(compiled)
        result = compiled(leaf)
        assert result.sharding.is_equivalent_to(leaf.sharding, 2)
    np.testing.assert_array_equal(result, 2 * np.asarray(leaf))
