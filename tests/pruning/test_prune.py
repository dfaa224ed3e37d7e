"""One pruning step: scores, masks and weights against dense matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems

every_seed = pytest.mark.parametrize("seed", range(3))
DIM = 24 + 32


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem(seed=0):
    rows = problems.grads(seed + 10, dtype=jnp.float64)
    return problems.params(seed, jnp.float64), rows


def joint(w, fisher, gone):
    """The minimum of the quadratic model over the kept weights."""
    kept = ~gone
    result = np.where(gone, 0, w)
    change = np.linalg.solve(fisher[np.ix_(kept, kept)], fisher[np.ix_(kept, gone)] @ w[gone])
    result[kept] += change
    return result


def lowest(scores, number):
    gone = np.zeros(len(scores), bool)
    gone[np.argsort(scores, kind="stable")[:number]] = True
    return gone


@every_seed
@pytest.mark.parametrize("block_size", [None, 5, 20])
def test_obs_drops_the_lowest_saliencies_and_updates_jointly(block_size, seed):
    params, rows = problem(seed)
    fisher = problems.dense_fisher(problems.kernel_rows(rows), 1e-3, block_size)
    result = problems.prune(params, rows, 0.5, damping=1e-3, block_size=block_size)
    w = problems.kernels(params)
    gone = lowest(w**2 / np.diag(np.linalg.inv(fisher)), DIM // 2)
    np.testing.assert_array_equal(problems.kernels(result.mask) == 0, gone)
    np.testing.assert_allclose(problems.kernels(result.params), joint(w, fisher, gone), atol=1e-9)


@every_seed
def test_the_independent_update_is_the_published_sum(seed):
    params, rows = problem(seed)
    inverse = np.linalg.inv(problems.dense_fisher(problems.kernel_rows(rows), 1e-3))
    result = problems.prune(params, rows, 0.4, damping=1e-3, update="independent")
    w = problems.kernels(params)
    gone = problems.kernels(result.mask) == 0
    expected = w - inverse @ np.where(gone, w / np.diag(inverse), 0)
    expected[gone] = 0
    np.testing.assert_allclose(problems.kernels(result.params), expected, atol=1e-9)


def test_greedy_removes_in_its_order_where_saliencies_fall():
    """The second weight goes first, and makes the other's saliency smaller than its own."""
    root = np.linalg.cholesky(np.array([[2.0, -1.9], [-1.9, 2.0]]) - 1e-3 * np.eye(2)).T
    rows = {"kernel": jnp.asarray(np.sqrt(2) * root[:, :, np.newaxis])}
    params = {"kernel": jnp.array([[1.1], [1.0]])}
    result = problems.prune(params, rows, 0.5, method="greedy", block_size=2, damping=1e-3)
    np.testing.assert_array_equal(np.ravel(result.mask["kernel"]), [True, False])


@pytest.mark.parametrize("method", ["fisher", "obs", "magnitude"])
def test_gradients_that_are_not_finite_are_an_error_for_every_method(method):
    params, rows = problem(0)
    rows = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), rows)
    with pytest.raises(ValueError, match="must be finite"):
        problems.prune(params, rows, 0.5, method=method)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_gradients_are_summed_in_float32(dtype):
    rows = {"kernel": jnp.array([[[300.0], [1.0]], [[300.0], [1.0]]], dtype)}
    params = {"kernel": jnp.array([[3.0], [1.0]])}
    result = problems.prune(params, rows, 0.5, method="fisher")
    np.testing.assert_array_equal(np.ravel(result.mask["kernel"]), [True, False])


def test_units_that_do_not_fit_are_passed_over():
    params = {"a": {"kernel": jnp.full((100, 2), 0.1)}, "b": {"kernel": jnp.ones((4, 25))}}
    units = pruning.OutputUnits()
    result = problems.prune(params, None, 0.3, method="magnitude", structure=units)
    assert int(jnp.sum(~result.mask["b"]["kernel"])) == 88


def test_empty_leaves_and_states_of_nnx_are_passed_over():
    params = {"a": jnp.ones((0, 2)), "emb": {"embedding": {"value": jnp.ones((2, 2))}}}
    params["kernel"] = jnp.array([[1.0, 2.0]])
    result = problems.prune(params, None, 0.5, method="magnitude")
    assert [layer.path for layer in result.layers] == ["kernel"]


def test_nm_of_what_is_mostly_pruned_takes_what_is_left():
    params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [8.0]])}
    mask = {"kernel": jnp.array([0, 0, 0, 0, 0, 1, 1, 1], bool)[:, np.newaxis]}
    result = problems.prune(
        params, None, None, method="magnitude", mask=mask, structure=pruning.NM(2, 4)
    )
    np.testing.assert_array_equal(np.ravel(result.mask["kernel"]), [0, 0, 0, 0, 0, 0, 1, 1])


def test_layers_pruned_unequally_are_pruned_on_in_steps():
    params = {"a": {"kernel": jnp.arange(1.0, 11)[:, np.newaxis]}}
    params["b"] = {"kernel": jnp.arange(1.0, 11)[:, np.newaxis]}
    mask = {"a": {"kernel": jnp.arange(10)[:, np.newaxis] >= 6}}
    mask["b"] = {"kernel": jnp.ones((10, 1), bool)}

    def loss(p, x):
        return jnp.mean((x @ (p["a"]["kernel"] + p["b"]["kernel"])) ** 2)

    batches = [np.random.default_rng(k).standard_normal((4, 10)) for k in range(8)]
    result = pruning.prune_one_shot(
        loss,
        params,
        batches,
        0.7,
        mask=mask,
        distribution="uniform",
        recomputations=3,
        num_grads=8,
    )
    assert [layer.sparsity for layer in result.layers] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": None, "structure": pruning.NM(5, 4)}, "needs n <= m"),
        ({"sparsity": None, "structure": pruning.NM(2, 0)}, "m of NM"),
        ({"sparsity": {}}, "at least one pattern"),
    ],
)
def test_bad_options_are_clear_errors(options, message):
    params = {"kernel": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=message):
        problems.prune(params, None, method="magnitude", **options)


def test_a_kernel_of_attention_has_no_single_fan_in():
    params = {"query": {"kernel": jnp.ones((8, 4, 2))}}
    with pytest.raises(ValueError, match=r"read as '\?\?\?'.*layout="):
        problems.prune(params, None, None, method="magnitude", structure=pruning.NM(2, 4))


@every_seed
@pytest.mark.parametrize("block_size", [4, 10, 56])
def test_greedy_equals_removals_one_at_a_time(block_size, seed):
    params, rows = problem(seed)
    fisher = problems.dense_fisher(problems.kernel_rows(rows), 1e-2, block_size)
    w = problems.kernels(params)
    scores = np.empty(DIM)
    for start in range(0, DIM, block_size):
        part = np.arange(start, min(start + block_size, DIM))
        alive, weights, highest = list(part), dict(zip(part, w[part], strict=True)), 0.0
        while alive:
            inverse = np.linalg.inv(fisher[np.ix_(alive, alive)])
            values = np.array([weights[k] for k in alive])
            saliency = values**2 / (2 * np.diag(inverse))
            chosen = int(np.argmin(saliency))
            # More than the one before, so that equal scores do not change the order.
            highest = max(highest * (1 + 1e-15), saliency[chosen])
            scores[alive[chosen]] = highest
            values = values - inverse[:, chosen] * values[chosen] / inverse[chosen, chosen]
            weights = dict(zip(alive, values, strict=True))
            del alive[chosen]
    gone = lowest(scores, 28)
    result = problems.prune(params, rows, 0.5, method="greedy", damping=1e-2, block_size=block_size)
    np.testing.assert_array_equal(problems.kernels(result.mask) == 0, gone)
    np.testing.assert_allclose(problems.kernels(result.params), joint(w, fisher, gone), atol=1e-8)


@pytest.mark.parametrize(
    ("method", "scores"),
    [
        ("magnitude", lambda w, rows: w**2),
        ("fisher", lambda w, rows: w**2 * (1e-5 + (rows**2).mean(axis=0))),
    ],
)
def test_the_baselines_keep_the_weights_that_stay(method, scores):
    params, rows = problem()
    result = problems.prune(params, rows, 0.5, method=method)
    w = problems.kernels(params)
    gone = lowest(scores(w, problems.kernel_rows(rows)), DIM // 2)
    np.testing.assert_array_equal(problems.kernels(result.mask) == 0, gone)
    np.testing.assert_array_equal(problems.kernels(result.params), np.where(gone, 0, w))


def test_of_a_quadratic_the_best_mask_is_found_and_the_rest_refitted():
    """Four weights of eight reproduce the loss's minimum exactly; all 70 masks are tried."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((8, 8))
    minimum = np.array([1.5, 0, -2, 0, 0, 1, 0, 3.0])
    # Gradients of the residuals of a linear regression: F is its Hessian.
    rows = directions / np.sqrt(1)
    params = {"kernel": jnp.asarray(minimum + 0.01 * rng.standard_normal(8)).reshape(2, 4)}
    grads = {"kernel": jnp.asarray(rows).reshape(8, 2, 4)}
    fisher = rows.T @ rows / 8 + 1e-9 * np.eye(8)
    w = np.ravel(params["kernel"])

    def loss_after(gone):
        change = joint(w, fisher, gone) - w
        return change @ fisher @ change / 2

    masks = [np.isin(np.arange(8), places) for places in itertools.combinations(range(8), 4)]
    best = min(masks, key=loss_after)
    for options in ({"method": "obs"}, {"method": "greedy", "block_size": 8}):
        result = problems.prune(params, grads, 0.5, damping=1e-9, **options)
        np.testing.assert_array_equal(~np.ravel(result.mask["kernel"]), best)
        np.testing.assert_allclose(
            np.ravel(result.params["kernel"]), joint(w, fisher, best), atol=1e-7
        )


@every_seed
def test_each_step_from_saliency_to_joint_update_lowers_the_models_loss(seed):
    params, rows = problem(seed)
    fisher = problems.dense_fisher(problems.kernel_rows(rows), 1e-3)
    w = problems.kernels(params)

    def model(**options):
        result = problems.prune(params, rows, 0.5, damping=1e-3, **options)
        change = problems.kernels(result.params) - w
        return change @ fisher @ change / 2

    none, joint_loss = model(update="none"), model(update="joint")
    greedy = model(method="greedy", block_size=DIM)
    assert greedy <= joint_loss <= model(update="independent")
    assert joint_loss < none


def test_a_step_from_a_mask_works_on_the_alive_weights_alone():
    params, rows = problem()
    first = problems.prune(params, rows, 0.25, damping=1e-3)
    second = problems.prune(first.params, rows, 0.5, damping=1e-3, mask=first.mask, block_size=6)
    alive = problems.kernels(first.mask) == 1
    w = problems.kernels(first.params)[alive]
    # Blocks are counted over the survivors, as published.
    fisher = problems.dense_fisher(problems.kernel_rows(rows)[:, alive], 1e-3, 6)
    gone = lowest(w**2 / np.diag(np.linalg.inv(fisher)), 14)
    np.testing.assert_array_equal(problems.kernels(second.mask)[alive] == 0, gone)
    assert np.all(problems.kernels(second.mask)[~alive] == 0)
    np.testing.assert_allclose(
        problems.kernels(second.params)[alive], joint(w, fisher, gone), atol=1e-9
    )


def test_what_is_not_selected_stays_as_it_is():
    params, rows = problem()
    result = problems.prune(params, rows, 0.9, select=lambda path, leaf: path == "dense/kernel")
    for path in (("conv", "kernel"), ("conv", "bias")):
        np.testing.assert_array_equal(result.params[path[0]][path[1]], params[path[0]][path[1]])
        assert np.all(result.mask[path[0]][path[1]])
    assert [layer.path for layer in result.layers] == ["dense/kernel"]
    assert result.layers[0].kept == 4  # of 32, of which 28.8 may go


def test_scope_layer_prunes_each_leaf_to_the_sparsity():
    params, rows = problem()
    result = problems.prune(params, rows, 0.75, distribution="uniform")
    assert [layer.sparsity for layer in result.layers] == [0.75, 0.75]


def test_sparsities_may_differ_by_pattern():
    params, rows = problem()
    result = problems.prune(params, rows, {"conv": 0.25, "dense": 0.5})
    assert [layer.sparsity for layer in result.layers] == [0.25, 0.5]
    alone = problems.prune(params, rows, {"dense": 0.5})
    assert [layer.sparsity for layer in alone.layers] == [0.0, 0.5]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.57, 0.99])
def test_the_floor_of_the_sparsity_goes(sparsity):
    params = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}
    result = problems.prune(params, None, sparsity, method="magnitude")
    assert result.layers[0].kept == 100 - round(100 * sparsity)


def test_the_predicted_loss_change_is_the_quadratic_models():
    params, rows = problem()
    result = problems.prune(params, rows, 0.3, damping=1e-3)
    change = problems.kernels(result.params) - problems.kernels(params)
    products = problems.kernel_rows(rows) @ change
    expected = products.mean() + (products**2).mean() / 2
    np.testing.assert_allclose(result.predicted_loss_change, expected, rtol=1e-9)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("options", [{}, {"block_size": 5}, {"block_size": 128}])
def test_in_float32_masks_agree_and_dtypes_stay(options, make):
    params, rows = problem()
    exact = problems.prune(params, rows, 0.5, damping=1e-3, **options)
    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 3e-2)):
        low = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
        low_rows = jax.tree.map(lambda x: make(x.astype(jnp.float32)), rows)
        result = problems.prune(low, low_rows, 0.5, damping=1e-3, **options)
        agree = problems.kernels(result.mask) == problems.kernels(exact.mask)
        assert agree.mean() > 0.9
        assert result.params["conv"]["kernel"].dtype == dtype
        if agree.all():
            np.testing.assert_allclose(
                problems.kernels(result.params), problems.kernels(exact.params), atol=tolerance
            )


def test_a_sharded_leaf_keeps_its_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    params, rows = problem()
    alone = problems.prune(params, rows, 0.5, damping=1e-3)
    params["dense"]["kernel"] = jax.device_put(params["dense"]["kernel"], sharding)
    result = problems.prune(params, rows, 0.5, damping=1e-3)
    for tree in (result.params, result.mask):
        assert tree["dense"]["kernel"].sharding == sharding
    np.testing.assert_allclose(
        problems.kernels(result.params), problems.kernels(alone.params), rtol=1e-12
    )


def test_table_and_plot_show_every_layer():
    params, rows = problem()
    result = problems.prune(params, rows, 0.5)
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *("conv/kernel", "dense/kernel", "total", "model")
    ]
    assert lines[-2].split() == ["total", "56", "28", "50.00%"]
    assert lines[-1].split() == ["model", "59", "31", "47.46%"]
    assert result.num_kept == 31
    axes = result.plot()
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [100 * layer.sparsity for layer in result.layers])
