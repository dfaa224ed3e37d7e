"""A model of 7 billion parameters on meshes of 16 to 256 chips, from shapes alone."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

LAYERS, WIDTH, HIDDEN = 32, 4096, 11008
# Shapes, and the axes of the mesh: x for fully sharded parameters, y for tensor parallelism.
LLAMA = {
    "embedding": ((32000, WIDTH), P("y", "x")),
    "head": ((WIDTH, 32000), P("x", "y")),
    "norm": ((WIDTH,), P()),
    "separate": {
        "query": ((WIDTH, 32, 128), P("x", "y", None)),
        "key": ((WIDTH, WIDTH), P("x", "y")),
        "out": ((32, 128, WIDTH), P("y", None, "x")),
    },
    "layers": {
        "norm": ((LAYERS, WIDTH), P()),
        "key": ((LAYERS, WIDTH, 32, 128), P(None, "x", "y", None)),
        "up": ((LAYERS, WIDTH, HIDDEN), P(None, "x", "y")),
        "down": ((LAYERS, HIDDEN, WIDTH), P(None, "y", "x")),
    },
}


def llama(shape, kind):
    """Placeholders on a mesh; with a single axis nothing is sharded over y."""
    axes = ("x", "y")[: len(shape)]
    mesh = AbstractMesh(shape, axes, axis_types=(kind,) * len(shape))

    def leaf(entry):
        size, spec = entry
        spec = P(*[name if name in axes else None for name in spec])
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, LLAMA, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "shape", [(256,), (16, 16), (32, 8), (64, 4), (64,), (32,), (16,)], ids=str
)
def test_a_sparse_state_is_divided_among_all_chips(shape, kind):
    params = llama(shape, kind)
    tx = curvax.scale_by_mfac(num_grads=1024, density=0.01, window_dtype="bfloat16")
    on_one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    gram = 4 * 1024**2
    divided = (curvax.state_bytes(tx, on_one) - gram) / math.prod(shape)
    assert divided < curvax.state_bytes(tx, params) - gram < 1.05 * divided


@pytest.mark.parametrize("build", [curvax.state_shardings, curvax.state_bytes])
def test_blocks_that_would_lie_on_several_chips_are_refused(build):
    mesh = AbstractMesh((256,), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    params = {"norm": {"scale": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)}}
    tx = curvax.mfac(num_grads=8, density=0.01)
    with pytest.raises(ValueError, match=r"Axis 0 of norm/scale.*cut into 64.*256 devices"):
        build(tx, params)
    build(curvax.mfac(num_grads=8), params)
