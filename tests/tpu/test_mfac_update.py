"""What an update of M-FAC communicates on a TPU: a few numbers a row are summed, nothing moves."""

from typing import NamedTuple

import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from tests.contract.meshes import AXIS_TYPES
from tests.hlo import collectives

from .compiler import array, compiled, make_mesh, state_of

NUM_GRADS = 16
COLUMNS = 4  # in which a vector is contracted, at most
WINDOWS = {
    "dense": {},
    "low": {"window_dtype": "bfloat16", "max_update_norm": 1.0},
    "sparse": {"density": 0.01},
}


class Case(NamedTuple):
    """A mesh, and leaves with their shapes and how they are split."""

    topology: str
    mesh: dict[str, int]
    leaves: dict[str, tuple[tuple[int, ...], P]]


CASES = {
    "8 chips": Case(
        "v5e:2x4",
        {"x": 4, "y": 2},
        {
            "query": ((1024, 8, 128), P("x", "y", None)),
            "up": ((1024, 2816), P("x", "y")),
            "down": ((2816, 1024), P("y", "x")),
            "scale": ((1024,), P()),
        },
    ),
    "256 chips": Case(
        "v5e:16x16",
        {"x": 32, "y": 8},
        {
            "query": ((2, 4096, 32, 128), P(None, "x", "y", None)),
            "up": ((2, 4096, 11008), P(None, "x", "y")),
            "scale": ((2, 4096), P()),
        },
    ),
    "256 chips, one axis": Case(
        "v5e:16x16", {"x": 256}, {"up": ((4096, 11008), P("x", None)), "scale": ((4096,), P())}
    ),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(params=AXIS_TYPES, scope="module")
def params(request, case):
    mesh = make_mesh(case.topology, tuple(case.mesh.values()), tuple(case.mesh), request.param)
    return {
        name: array(shape, NamedSharding(mesh, spec)) for name, (shape, spec) in case.leaves.items()
    }


@pytest.fixture(params=WINDOWS, scope="module")
def update(request, params):
    """The communications of an update."""
    tx = curvax.scale_by_mfac(NUM_GRADS, momentum=0.9, **WINDOWS[request.param])
    program = compiled(tx.update, params, state_of(tx, params), params, donate=(1,))
    return collectives(program.as_text())


def test_an_update_moves_no_array_between_chips(update):
    assert {one.kind for one in update} <= {"all-reduce"}


def test_an_update_sums_a_few_numbers_a_row_and_leaf(update, params):
    assert max(one.largest for one in update) <= COLUMNS * NUM_GRADS
    scalars = 4  # a leaf: whether it is finite, the length of its update
    total = sum(one.num_bytes * one.runs for one in update)
    assert total <= 4 * len(params) * (COLUMNS * NUM_GRADS + scalars)
