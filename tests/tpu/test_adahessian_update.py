"""What an update of AdaHessian communicates on a TPU: scalars, and means over a split axis."""

import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.contract.meshes import AXIS_TYPES
from tests.hlo import collectives

from .compiler import array, compiled, make_mesh, state_of

LEAVES = {
    "conv": {"kernel": ((3, 3, 64, 128), P(None, None, "x", "y"))},
    "dense": {"kernel": ((1024, 2816), P("x", "y")), "bias": ((2816,), P("y"))},
}


def update(averaging, kind, leaves=LEAVES):
    """The communications of an update with a given diagonal."""
    mesh = make_mesh("v5e:2x4", (4, 2), ("x", "y"), kind)
    params = {
        name: {leaf: array(shape, NamedSharding(mesh, spec)) for leaf, (shape, spec) in of.items()}
        for name, of in leaves.items()
    }
    tx = curvax.scale_by_adahessian(averaging=averaging)

    def step(grads, diag, state, params):
        return tx.update(grads, state, params, hessian_diag=diag)

    args = params, params, state_of(tx, params), params
    return collectives(compiled(step, *args, donate=(2,)).as_text())


@pytest.mark.parametrize("kind", AXIS_TYPES)
@pytest.mark.parametrize(
    ("averaging", "largest"), [("conv", 1), ("none", 1), ("block", 1), ("row", 2816 // 2)]
)
def test_an_update_moves_no_array_and_sums_scalars_or_means(averaging, largest, kind):
    found = update(averaging, kind)
    assert {one.kind for one in found} <= {"all-reduce"}
    assert max(one.largest for one in found) <= largest
