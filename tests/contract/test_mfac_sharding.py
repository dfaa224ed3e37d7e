"""M-FAC on a mesh: what an update communicates, counted in the compiled computation."""

import re
from collections import Counter
from functools import cache

import chex
import jax
import pytest
from jax.sharding import PartitionSpec as P

import curvax

from .collectives import collectives, largest_sum, moved
from .meshes import AXIS_TYPES, make_mesh, network, sharded

NUM_GRADS = 16
every_mesh = pytest.mark.parametrize("kind", AXIS_TYPES)
WINDOWS = {
    "dense": {},
    "low": {"window_dtype": "bfloat16", "max_update_norm": 1.0},
    "sparse": {"density": 0.1},
}
every_window = pytest.mark.parametrize("window", WINDOWS)
# Of its sides and its corner, leaves are split over one axis of the mesh, the other, both, none.
SPECS = {
    "conv": {"kernel": P(None, None, None, "x")},
    "dense": {"bias": P("y"), "kernel": P(("x", "y"), None)},
    "head": {"kernel": P("x", "y")},
    "scale": P(),
}


@cache
def compiled_update(kind, window):
    mesh = make_mesh(kind, (4, 2), ("x", "y"))
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh, SPECS)
        grads = jax.tree.map(lambda leaf: leaf + 0.5, params)
        tx = curvax.scale_by_mfac(num_grads=NUM_GRADS, momentum=0.9, **WINDOWS[window])
        state = tx.init(params)
        return jax.jit(tx.update).lower(grads, state, params).compile()


def sums_by_devices(compiled):
    """How many all-reduces carry arrays, and not scalars, over each set of devices."""
    found = Counter()
    for line in compiled.as_text().splitlines():
        call = re.search(r"= (.*?) all-reduce(?:-start)?\(", line)
        if call and re.search(r"\[\d", call[1]):
            found[re.search(r"replica_groups=(.*?), \w+=", line)[1]] += 1
    return found


@every_window
@every_mesh
def test_an_update_sums_a_few_numbers_a_row_and_gathers_nothing(kind, window):
    compiled = compiled_update(kind, window)
    found = collectives(compiled)
    assert not moved(found), found
    assert largest_sum(found) <= 4 * NUM_GRADS, found


@every_window
@every_mesh
def test_sums_are_combined_to_one_for_each_set_of_mesh_axes(kind, window):
    sums = sums_by_devices(compiled_update(kind, window))
    assert sums, "sharded leaves must be summed"
    assert max(sums.values()) == 1, sums


@every_mesh
def test_rows_of_the_window_follow_their_parameter(kind):
    mesh = make_mesh(kind, (4, 2), ("x", "y"))
    with jax.set_mesh(mesh):
        params = sharded(network(), mesh, SPECS)
        state = curvax.scale_by_mfac(num_grads=NUM_GRADS).init(params)
        for rows, leaf in zip(jax.tree.leaves(state.window), jax.tree.leaves(params), strict=True):
            shard = rows.sharding.shard_shape(rows.shape)
            assert shard == (NUM_GRADS, *leaf.sharding.shard_shape(leaf.shape))


@every_mesh
def test_init_refuses_blocks_that_would_lie_on_several_devices(kind):
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        spec = jax.NamedSharding(mesh, P(None, "x"))
        params = {"kernel": jax.device_put(jax.numpy.ones((8, 40)), spec)}
        tx = curvax.scale_by_mfac(num_grads=4, density=0.1)
        state = tx.init(params)
        assert state.window.values["kernel"].sharding.shard_shape((1, 8, 8, 4)) == (1, 8, 1, 4)
        odd = jax.make_mesh((5,), ("y",), axis_types=(AXIS_TYPES[kind],), devices=jax.devices()[:5])
    with jax.set_mesh(odd):
        spec = jax.NamedSharding(odd, P(None, "y"))
        params = {"kernel": jax.device_put(jax.numpy.ones((8, 40)), spec)}
        with pytest.raises(
            ValueError, match=r"Axis 1 of kernel.*cut into 8 parts, .* among 5 devices"
        ):
            tx.init(params)


def test_a_jitted_init_builds_the_window_in_shards():
    mesh = make_mesh("automatic")
    params = sharded(network(), mesh)
    for options in ({}, {"density": 0.1}):
        tx = curvax.scale_by_mfac(num_grads=NUM_GRADS, **options)
        shardings = curvax.state_shardings(tx, params)
        compiled = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
        built = compiled.memory_analysis().output_size_in_bytes
        promised = curvax.state_bytes(tx, params)
        assert promised <= built < promised + 400  # with a table of the outputs


@pytest.mark.parametrize(
    "options", [{}, {"window_dtype": "bfloat16"}, {"density": 0.5, "max_update_norm": 0.1}], ids=str
)
def test_in_shard_map_each_device_has_an_optimizer_of_its_own(options):
    mesh = make_mesh("automatic", (2,), ("models",))
    tx = curvax.scale_by_mfac(num_grads=4, damping=0.1, **options)

    def third_update(grads):
        state = tx.init(grads[0])
        for grad in grads:
            updates, state = tx.update(grad, state)
        return updates

    grads = jax.random.normal(jax.random.key(0), (2, 3, 5))
    mapped = jax.shard_map(
        lambda one: third_update(one[0])[None],
        mesh=mesh,
        in_specs=P("models"),
        out_specs=P("models"),
    )
    expected = jax.numpy.stack([third_update(one) for one in grads])
    chex.assert_trees_all_close(jax.jit(mapped)(grads), expected, rtol=1e-5)
