"""A batch and parameters on eight devices: the update of one device, and what is communicated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

from .collectives import collectives
from .meshes import make_mesh
from .trees import assert_trees_close

NUM_EXAMPLES, WIDTH = 64, 40
RNG = np.random.default_rng(0)
PARAMS = {
    "hidden": RNG.standard_normal((16, WIDTH)) / 4,
    "output": RNG.standard_normal(WIDTH),
}
BATCH = RNG.standard_normal((NUM_EXAMPLES, 16)), RNG.standard_normal(NUM_EXAMPLES)
LAYOUTS = {
    "examples": ((8,), ("data",), {"hidden": P(), "output": P()}),
    "examples and parameters": (
        (2, 4),
        ("data", "model"),
        {"hidden": P(None, "model"), "output": P("model")},
    ),
}


pytestmark = [pytest.mark.oldest, pytest.mark.usefixtures("x64")]


def residuals(params, inputs, targets):
    return jnp.tanh(inputs @ params["hidden"]) @ params["output"] - targets


def step_of(micro_batch_size):
    tx = curvax.natural_gradient(
        0.5, 1e-3, momentum=0.5, centered=True, micro_batch_size=micro_batch_size
    )

    def step(params, state, batch):
        updates, state = tx.update(None, state, params, outputs_fn=residuals, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


def placed(mesh, specs):
    params = {k: jax.device_put(leaf, NamedSharding(mesh, specs[k])) for k, leaf in PARAMS.items()}
    return params, jax.device_put(BATCH, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("micro_batch_size", [None, 16])
@pytest.mark.parametrize(
    ("layout", "kind"),
    [("examples", "automatic"), ("examples", "explicit"), ("examples and parameters", "automatic")],
)
def test_eight_devices_take_the_step_of_one(layout, kind, micro_batch_size):
    tx, step = step_of(micro_batch_size)
    wanted = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)
    shape, names, specs = LAYOUTS[layout]
    mesh = make_mesh(kind, shape, names)
    with jax.set_mesh(mesh):
        params, batch = placed(mesh, specs)
        state = tx.init(params)
        compiled = jax.jit(step).lower(params, state, batch).compile()
        found = compiled(params, state, batch)
        if kind == "automatic":  # compiled for what it returns, so it can be called again
            compiled(*found, batch)
    for tree in (found[0], found[1][0].carried):
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    assert_trees_close(
        jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, wanted), rtol=1e-9, atol=1e-9
    )


def test_a_step_gathers_the_small_matrix_and_the_examples_and_no_rows():
    tx, step = step_of(None)
    mesh = make_mesh("automatic", (8,), ("data",))
    with jax.set_mesh(mesh):
        params, batch = placed(mesh, LAYOUTS["examples"][2])
        compiled = jax.jit(step).lower(params, tx.init(params), batch).compile()
    found = collectives(compiled)
    sizes = {
        "matrix": NUM_EXAMPLES**2,
        "examples": 16 * NUM_EXAMPLES,
        "gradient": PARAMS["hidden"].size,
    }
    assert max(one.size for one in found) == sizes["matrix"]
    assert sum(n for one, n in found.items() if one.size == sizes["matrix"]) == 1
    # Two gradients are summed: the mean row, and the update.
    assert sum(n for one, n in found.items() if one.shape == PARAMS["hidden"].shape) <= 2
    rows = NUM_EXAMPLES // 8 * PARAMS["hidden"].size
    assert all(one.size < rows for one in found if one.size != sizes["matrix"])


def test_inside_a_shard_map_each_device_takes_the_step_of_its_own_examples():
    tx, step = step_of(4)
    mesh = make_mesh("automatic", (8,), ("data",))

    def local(params, batch):
        stepped, _ = step(params, tx.init(params), batch)
        return jax.tree.map(lambda leaf: leaf[jnp.newaxis], stepped)

    found = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    )(PARAMS, BATCH)
    first = jax.tree.map(lambda leaf: leaf[: NUM_EXAMPLES // 8], BATCH)
    wanted, _ = jax.jit(step)(PARAMS, tx.init(PARAMS), first)
    assert_trees_close(
        jax.tree.map(lambda leaf: np.asarray(leaf[0]), found),
        jax.tree.map(np.asarray, wanted),
        rtol=1e-9,
        atol=1e-9,
    )
