"""Collected gradients: those of the loss, in order, wherever they are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import pruning

from . import problems

loss_fn = problems.regression_loss


def collect(num_grads=3, loss=loss_fn, **options):
    params, batches = problems.regression(num_batches=3)
    options = {"progress": False, **options}
    return params, batches, pruning.collect_gradients(loss, params, batches, num_grads, **options)


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 100])
def test_row_i_is_the_gradient_of_batch_i(micro_batch_size):
    params, batches, rows = collect(micro_batch_size=micro_batch_size)
    for index, batch in enumerate(batches):
        row = jax.tree.map(lambda x, i=index: x[i], rows)
        assert_trees_close(row, jax.grad(loss_fn)(params, *batch))


@pytest.mark.parametrize("micro_batch_size", [None, 3, 8])
def test_gradients_of_examples_are_those_of_batches_of_one(micro_batch_size):
    params, batches, rows = collect(
        num_grads=11, per_example=True, micro_batch_size=micro_batch_size
    )
    for index in range(11):
        single = [x[index % 8][np.newaxis] for x in batches[index // 8]]
        row = jax.tree.map(lambda x, i=index: x[i], rows)
        assert_trees_close(row, jax.grad(loss_fn)(params, *single))


def test_a_batch_that_is_no_tuple_is_one_argument():
    batches = [{"x": jnp.full(2, 3.0)}]
    rows = pruning.collect_gradients(
        lambda w, batch: jnp.sum(w * batch["x"]), jnp.ones(2), batches, 1
    )
    np.testing.assert_array_equal(rows, [[3.0, 3.0]])


@pytest.mark.parametrize("options", [{}, {"per_example": True}, {"micro_batch_size": 3}])
def test_aux_of_the_loss_is_dropped(options):
    def with_aux(*args):
        return loss_fn(*args), {"metric": 1.0}

    _, _, rows = collect(**options)
    _, _, others = collect(loss=with_aux, has_aux=True, **options)
    assert_trees_close(others, rows)


@pytest.mark.parametrize("storage", ["device", "host"])
def test_integer_leaves_have_rows_of_zeros(storage):
    params = {"steps": jnp.array(3), "table": jnp.array([1, 0]), "w": jnp.array([1.0, 2.0])}

    def loss(p, x):
        return jnp.sum(p["w"][p["table"]] * x)

    rows = pruning.collect_gradients(loss, params, [jnp.array([3.0, 4.0])] * 2, 2, storage=storage)
    np.testing.assert_array_equal(rows["w"], [[4.0, 3.0]] * 2)
    np.testing.assert_array_equal(rows["table"], np.zeros((2, 2)))
    np.testing.assert_array_equal(rows["steps"], np.zeros(2))


def test_pruned_weights_have_gradients_of_zero():
    params, _ = problems.regression()
    mask = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 2 == 0, params)
    _, _, rows = collect(mask=mask)
    _, _, whole = collect()
    assert_trees_close(rows, jax.tree.map(lambda x, kept: jnp.where(kept, x, 0), whole, mask))


def test_the_host_and_a_folder_hold_what_the_device_holds(tmp_path):
    _, _, on_device = collect()
    for storage, kind in (("host", np.ndarray), (tmp_path / "rows", np.memmap)):
        _, _, rows = collect(storage=storage)
        assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(rows))
        jax.tree.map(np.testing.assert_array_equal, rows, on_device)


def test_rows_keep_the_shardings_and_are_float32_or_wider():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    weights = jax.device_put(jnp.ones((2, 8), jnp.bfloat16), sharding)
    rows = pruning.collect_gradients(lambda w, x: jnp.sum(w * x), weights, [2.0, 3.0], 2)
    assert rows.dtype == jnp.float32
    assert rows.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, None, "x")), 3)
    np.testing.assert_array_equal(rows[:, 0, 0], [2.0, 3.0])


def test_the_gradient_is_compiled_once():
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        return loss_fn(*args)

    for _ in range(2):  # the second call is of a recomputation
        collect(loss=counted)
    assert count == 1


def test_an_iterator_is_read_no_further_than_needed():
    params, batches = problems.regression(num_batches=3)
    stream = iter(batches)
    pruning.collect_gradients(loss_fn, params, stream, 2)
    assert next(stream) is batches[2]


def test_progress_is_shown_where_wanted(capsys):
    pytest.importorskip("tqdm")
    collect(progress=True)
    assert "3/3" in capsys.readouterr().err
    collect()
    assert not capsys.readouterr().err


class TestBadInput:
    def test_fewer_batches_than_asked(self):
        with pytest.raises(ValueError, match="batches gave 3 gradients, but num_grads=4"):
            collect(num_grads=4)

    @pytest.mark.parametrize("options", [{"num_grads": 0}, {"micro_batch_size": 0}])
    def test_counts_are_positive(self, options):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            collect(**options)

    def test_a_gradient_that_is_not_finite_is_named(self):
        def broken(params, inputs, targets):
            loss = loss_fn(params, inputs, targets)
            return loss + jnp.where(inputs[0, 0] < 10, 0, jnp.nan) * params["first"]["bias"][0]

        params, batches = problems.regression(num_batches=2)
        batches[1] = (batches[1][0].at[0, 0].set(11.0), batches[1][1])
        with pytest.raises(ValueError, match="gradient 1 is not finite at first/bias"):
            pruning.collect_gradients(broken, params, batches, 2)

    def test_the_loss_is_a_scalar(self):
        with pytest.raises(ValueError, match="the loss must return"):
            collect(loss=lambda params, inputs, targets: inputs)

    def test_storage_is_known(self):
        with pytest.raises(ValueError, match=r"storage must be 'device', 'host' or a pathlib.Path"):
            collect(storage="disk")

    def test_examples_lie_along_the_first_axis(self):
        with pytest.raises(ValueError, match="first axis"):
            pruning.collect_gradients(
                lambda w, x, y: jnp.sum(w) + jnp.sum(x) + jnp.sum(y),
                jnp.ones(2),
                [(jnp.ones(3), jnp.ones(4))],
                1,
                per_example=True,
            )

    def test_a_mask_that_does_not_match(self):
        with pytest.raises(ValueError, match="mask must match params"):
            collect(mask={"first": True})


def linear(params, x):
    return x * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("storage", ["device", "host"])
def test_a_leaf_without_entries_has_rows_too(storage):
    params = {"empty": jnp.zeros((0, 3)), "weights": jnp.zeros(2)}
    rows = pruning.collect_gradients(linear, params, [1.0, 2.0], 2, storage=storage)
    assert rows["empty"].shape == (2, 0, 3)
    assert curvax.inverse_fisher(rows).diagonal()["empty"].shape == (0, 3)


def test_numpy_params_of_float64_are_collected_in_the_dtype_at_hand():
    rows = pruning.collect_gradients(linear, np.zeros(2), [1.0], 1)
    assert rows.dtype == jnp.float32
