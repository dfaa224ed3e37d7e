"""Pruning of a layer: against loops in NumPy, least squares, and brute force, in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

DAMPING = 0.02


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def problem(features=12, outputs=5, rows=40, seed=0):
    """A kernel (features, outputs) and correlated inputs (rows, features)."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features))
    return rng.normal(size=(features, outputs)), rng.normal(size=(rows, features)) @ mixing


def hessian(inputs, damping=DAMPING):
    gram = inputs.T @ inputs / len(inputs)
    return gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def measured_error(kernel, result, inputs):
    change = inputs @ (np.asarray(result.kernel, float) - kernel)
    return np.sum(change**2) / np.sum((inputs @ kernel) ** 2)


def sparse_gpt(kernel, inputs, choose):
    """The published loop over features; ``choose(values, u, first)`` gives what is pruned next."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian(inputs))).T  # H^-1 = U^T U
    weights = kernel.copy()
    pruned = np.zeros(weights.shape, bool)
    for j in range(len(weights)):
        for rows, flags in choose(weights, np.diag(upper), j):
            pruned[rows] = flags
        error = np.where(pruned[j], weights[j], 0) / upper[j, j]
        weights[j:] -= np.outer(upper[j, j:], error)
        weights[j] = np.where(pruned[j], 0, weights[j])
    return weights, pruned


def lowest_share_of_blocks(share, size):
    def choose(weights, diagonal, j):
        if j % size:
            return
        scores = (weights[j : j + size] / diagonal[j : j + size, None]) ** 2
        flags = np.zeros(scores.size, bool)
        flags[np.argsort(scores, axis=None)[: round(share * scores.size)]] = True
        yield slice(j, j + size), flags.reshape(scores.shape)

    return choose


def lowest_of_groups(n, m):
    def choose(weights, diagonal, j):
        if j % m:
            return
        scores = (weights[j : j + m] / diagonal[j : j + m, None]) ** 2
        yield slice(j, j + m), np.argsort(np.argsort(scores, axis=0), axis=0) < m - n

    return choose


def remove_one_at_a_time(weights, matrix, candidates):
    """OBC for one output unit by inverses of what is left: weights, and (weight, rise) in order."""
    alive, weights, removals = list(range(len(weights))), weights.copy(), []
    while allowed := candidates(alive):
        inverse = np.linalg.inv(matrix[np.ix_(alive, alive)])
        rises = {p: weights[p] ** 2 / inverse[alive.index(p), alive.index(p)] for p in allowed}
        p = min(rises, key=rises.get)
        column = inverse[alive.index(p)] / inverse[alive.index(p), alive.index(p)]
        weights[alive] -= column * weights[p]
        weights[p] = 0
        alive.remove(p)
        removals.append((p, rises[p]))
    return weights, removals


# The Gram matrix.


def test_a_stream_of_inputs_has_the_gram_matrix_of_all_of_them():
    _, inputs = problem(rows=30)
    parts = inputs[:7].reshape(7, 1, 12), inputs[7:].tolist()
    gram = pruning.input_gram(part for part in parts)
    np.testing.assert_allclose(gram.matrix, inputs.T @ inputs / 30, rtol=1e-12)
    assert gram.num_rows == 30


def test_inputs_without_features_are_refused():
    with pytest.raises(ValueError, match=r"at least one feature, got shape \(3, 0\)"):
        pruning.input_gram(np.ones((3, 0)))


def test_a_generator_an_array_and_its_gram_matrix_prune_alike():
    kernel, inputs = problem()
    results = [
        pruning.prune_layer(kernel, given, 0.5)
        for given in (inputs, iter([inputs[:9], inputs[9:]]), pruning.input_gram(inputs))
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.kernel, results[0].kernel, rtol=1e-10)


def test_low_precision_inputs_are_summed_in_float32():
    inputs = jnp.full((4096, 2), 0.1, jnp.bfloat16)
    gram = pruning.input_gram([inputs] * 8)
    assert gram.matrix.dtype == jnp.float32
    np.testing.assert_allclose(gram.matrix, float(inputs[0, 0]) ** 2, rtol=1e-4)


# Optimal Brain Surgeon in the order of the features.


@pytest.mark.parametrize("block_size", [1, 4, 6, 12])
def test_obs_is_the_published_loop(block_size):
    kernel, inputs = problem()
    result = pruning.prune_layer(
        kernel, inputs, 0.6, damping=DAMPING, update="sweep", block_size=block_size
    )
    choose = lowest_share_of_blocks(0.6, block_size)
    weights, pruned = sparse_gpt(kernel, inputs, choose)
    np.testing.assert_array_equal(result.mask, ~pruned)
    np.testing.assert_allclose(result.kernel, weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (1, 3)])
def test_obs_with_n_of_m_is_the_published_loop(n, m):
    kernel, inputs = problem()
    result = pruning.prune_layer(
        kernel,
        inputs,
        None,
        structure=pruning.NM(n, m),
        damping=DAMPING,
        update="sweep",
        block_size=5,
    )
    weights, pruned = sparse_gpt(kernel, inputs, lowest_of_groups(n, m))
    np.testing.assert_array_equal(result.mask, ~pruned)
    np.testing.assert_allclose(result.kernel, weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", [None, pruning.NM(2, 4)])
def test_lazy_blocks_change_nothing(structure):
    kernel, inputs = problem(features=36, rows=100)
    mask = np.random.default_rng(1).random(kernel.shape) < 0.5 if structure is None else None
    results = [
        pruning.prune_layer(
            kernel,
            inputs,
            None,
            mask=mask,
            structure=structure,
            update="sweep",
            block_size=block_size,
        )
        for block_size in (4, 32, 36, 128)
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other.mask, results[0].mask)
        np.testing.assert_allclose(other.kernel, results[0].kernel, rtol=1e-9, atol=1e-12)


def test_a_last_block_that_is_shorter_prunes_the_same_share():
    kernel, inputs = problem(features=22, outputs=10)
    result = pruning.prune_layer(kernel, inputs, 0.5, block_size=8)
    counts = [np.count_nonzero(~result.mask[first : first + 8]) for first in (0, 8, 16)]
    assert counts == [40, 40, 30]


def test_decreasing_diagonal_is_the_sweep_of_sorted_features():
    kernel, inputs = problem()
    order = np.argsort(-np.sum(inputs**2, axis=0))
    result = pruning.prune_layer(kernel, inputs, 0.5, order="diagonal", block_size=4)
    by_hand = pruning.prune_layer(kernel[order], inputs[:, order], 0.5, block_size=4)
    np.testing.assert_array_equal(result.mask[order], by_hand.mask)
    np.testing.assert_allclose(result.kernel[order], by_hand.kernel, rtol=1e-9)


def test_decreasing_diagonal_keeps_groups_together():
    kernel, inputs = problem()
    structure = pruning.NM(2, 4)
    result = pruning.prune_layer(kernel, inputs, None, order="diagonal", structure=structure)
    assert np.all(np.asarray(result.mask).reshape(3, 4, -1).sum(axis=1) == 2)


# One removal at a time.


def test_greedy_is_removal_one_at_a_time_by_inverses():
    kernel, inputs = problem()
    result = pruning.prune_layer(kernel, inputs, 0.5, method="greedy", damping=DAMPING)
    traces = [remove_one_at_a_time(column, hessian(inputs), list)[1] for column in kernel.T]
    # The layer takes the removal that costs least next, over the outputs' traces.
    counts = [0] * len(traces)
    for _ in range(kernel.size // 2):
        unit = min(range(len(traces)), key=lambda u: traces[u][counts[u]][1])
        counts[unit] += 1
    mask = np.ones(kernel.shape, bool)
    for unit, (trace, count) in enumerate(zip(traces, counts, strict=True)):
        mask[[p for p, _ in trace[:count]], unit] = False
    np.testing.assert_array_equal(result.mask, mask)


def test_greedy_keeps_n_of_m():
    kernel, inputs = problem()
    structure = pruning.NM(2, 4)
    result = pruning.prune_layer(
        kernel, inputs, None, method="greedy", structure=structure, damping=DAMPING
    )

    def allowed(alive):
        return [p for p in alive if sum(q // 4 == p // 4 for q in alive) > 2]

    for unit, column in enumerate(kernel.T):
        weights, _ = remove_one_at_a_time(column, hessian(inputs), allowed)
        np.testing.assert_allclose(result.kernel[:, unit], weights, rtol=1e-6, atol=1e-8)


def test_greedy_rises_add_up_to_the_error_of_its_weights():
    kernel, inputs = problem(outputs=1)
    matrix = hessian(inputs)
    weights, removals = remove_one_at_a_time(
        kernel[:, 0], matrix, lambda alive: alive if len(alive) > 4 else []
    )
    result = pruning.prune_layer(kernel, inputs, 8 / 12, method="greedy", damping=DAMPING)
    change = np.asarray(result.kernel[:, 0]) - kernel[:, 0]
    assert change @ matrix @ change == pytest.approx(sum(rise for _, rise in removals))
    np.testing.assert_allclose(result.kernel[:, 0], weights, rtol=1e-6, atol=1e-8)


# The simple rules.


def test_wanda_compares_weights_times_norms_in_each_output():
    kernel, inputs = problem()
    result = pruning.prune_layer(kernel, inputs, 0.5, method="wanda")
    scores = np.abs(kernel) * np.linalg.norm(inputs, axis=0)[:, np.newaxis]
    mask = np.argsort(np.argsort(scores, axis=0), axis=0) >= 6
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_array_equal(result.kernel, np.where(mask, kernel, 0))


def test_magnitude_compares_the_weights_of_the_layer():
    kernel, inputs = problem()
    result = pruning.prune_layer(kernel, inputs, 0.5, method="magnitude")
    np.testing.assert_array_equal(result.mask, np.abs(kernel) > np.median(np.abs(kernel)))


@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_n_of_m_holds_in_every_group(method):
    kernel, inputs = problem()
    result = pruning.prune_layer(kernel, inputs, None, method=method, structure=pruning.NM(1, 3))
    assert np.all(np.asarray(result.mask).reshape(4, 3, -1).sum(axis=1) == 1)
    assert result.sparsity == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_sparsity_is_rounded_down_to_whole_weights(sparsity, method):
    kernel, inputs = problem(features=10, outputs=10)
    result = pruning.prune_layer(kernel, inputs, sparsity, method=method)
    assert result.sparsity == pytest.approx(sparsity)
    np.testing.assert_array_equal(np.asarray(result.kernel) == 0, ~np.asarray(result.mask))


# Updates for a mask.


def test_the_joint_update_is_least_squares_for_each_output():
    kernel, inputs = problem()
    mask = np.random.default_rng(1).random(kernel.shape) < 0.5
    result = pruning.prune_layer(kernel, inputs, None, mask=mask, update="joint", damping=0.0)
    for unit, kept in enumerate(mask.T):
        solution = np.linalg.lstsq(inputs[:, kept], inputs @ kernel[:, unit], rcond=None)[0]
        np.testing.assert_allclose(result.kernel[kept, unit], solution, rtol=1e-6)
    np.testing.assert_array_equal(result.mask, mask)
    assert np.all(np.asarray(result.kernel)[~mask] == 0)


def test_the_sweep_for_a_mask_lies_between_no_update_and_least_squares():
    kernel, inputs = problem()
    mask = pruning.prune_layer(kernel, inputs, 0.5, method="magnitude").mask
    errors = [
        pruning.prune_layer(kernel, inputs, None, mask=mask, update=update).error
        for update in ("joint", "sweep", "none")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


def test_weights_that_a_mask_has_pruned_stay_pruned():
    kernel, inputs = problem(features=10, outputs=10)
    first = pruning.prune_layer(kernel, inputs, 0.3)
    for method in ("obs", "greedy", "wanda", "magnitude"):
        second = pruning.prune_layer(first.kernel, inputs, 0.6, mask=first.mask, method=method)
        assert not np.any(second.mask & ~first.mask)
        assert second.sparsity == pytest.approx(0.6)


@pytest.mark.parametrize("update", ["sweep", "joint", "none"])
@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_the_reported_error_is_that_of_the_outputs(method, update):
    kernel, inputs = problem()
    result = pruning.prune_layer(kernel, inputs, 0.5, method=method, update=update)
    assert result.error == pytest.approx(measured_error(kernel, result, inputs))


# Kernels of other shapes.


def test_a_kernel_with_heads_is_a_matrix():
    kernel, inputs = problem(outputs=6)
    plain = pruning.prune_layer(kernel, inputs, 0.5)
    heads = pruning.prune_layer(kernel.reshape(12, 2, 3), inputs, 0.5, layout="IOO")
    np.testing.assert_array_equal(heads.kernel, plain.kernel.reshape(12, 2, 3))
    np.testing.assert_array_equal(heads.mask, plain.mask.reshape(12, 2, 3))


@pytest.mark.parametrize("shape", [(40, 3, 4), (40, 12), (5, 8, 3, 4)])
def test_an_output_projection_sums_over_heads(shape):
    kernel, inputs = problem()
    plain = pruning.prune_layer(kernel, inputs, 0.5)
    out = pruning.prune_layer(kernel.reshape(3, 4, 5), inputs.reshape(shape), 0.5, layout="IIO")
    np.testing.assert_allclose(out.kernel, plain.kernel.reshape(3, 4, 5), rtol=1e-10)


def test_outputs_may_come_first():
    kernel, inputs = problem()
    plain = pruning.prune_layer(kernel, inputs, 0.5)
    result = pruning.prune_layer(kernel.T, inputs, 0.5, layout="OI")
    np.testing.assert_array_equal(result.kernel, plain.kernel.T)


@pytest.mark.parametrize("strides", [1, (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 2), 0]])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_a_convolution_is_a_dense_layer_of_its_patches(strides, padding, dilation):
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 9, 8, 3)), rng.normal(size=(3, 3, 3, 4))
    patches = pruning.conv_patches(
        images, (3, 3), strides=strides, padding=padding, dilation=dilation
    )
    outputs = jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(strides, strides) if isinstance(strides, int) else strides,
        padding=padding if isinstance(padding, str) else [(1, 2), (0, 0)],
        rhs_dilation=(dilation, dilation) if isinstance(dilation, int) else dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(np.tensordot(patches, kernel, 3), outputs, rtol=1e-10, atol=1e-12)


def test_patches_are_those_of_jax():
    images = np.random.default_rng(0).normal(size=(2, 7, 3))
    patches = pruning.conv_patches(images, (3,), strides=2)
    theirs = jax.lax.conv_general_dilated_patches(
        images, (3,), (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    np.testing.assert_allclose(patches, np.moveaxis(theirs.reshape(2, 4, 3, 3), -1, -2))


def test_a_pruned_convolution_is_the_pruned_dense_layer():
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(4, 6, 6, 4)), rng.normal(size=(3, 3, 4, 5))
    patches = pruning.conv_patches(images, (3, 3))
    structure = pruning.NM(2, 4)
    result = pruning.prune_layer(kernel, patches, None, structure=structure)
    dense = pruning.prune_layer(
        kernel.reshape(36, 5), patches.reshape(-1, 36), None, structure=structure
    )
    np.testing.assert_allclose(result.kernel.reshape(36, 5), dense.kernel, rtol=1e-10)
    assert np.all(np.asarray(result.mask).sum(axis=2) == 2)


# Precision and odd inputs.


@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_a_bfloat16_kernel_is_pruned_in_float32_and_keeps_its_dtype(method):
    kernel, inputs = problem()
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    inputs = jnp.asarray(inputs, jnp.float32)
    result = pruning.prune_layer(kernel, inputs, 0.5, method=method)
    wide = pruning.prune_layer(kernel.astype(jnp.float32), inputs, 0.5, method=method)
    assert result.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.mask, wide.mask)
    np.testing.assert_array_equal(result.kernel, wide.kernel.astype(jnp.bfloat16))


def test_float32_is_close_to_float64():
    kernel, inputs = problem(features=100, outputs=20, rows=400)
    narrow = pruning.prune_layer(kernel.astype("f"), inputs.astype("f"), 0.5)
    wide = pruning.prune_layer(kernel, inputs, 0.5)
    assert np.mean(np.asarray(narrow.mask) != np.asarray(wide.mask)) < 0.002
    assert narrow.error == pytest.approx(wide.error, rel=1e-2)


@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_features_that_are_always_zero_are_pruned_first(method):
    kernel, inputs = problem(outputs=4)
    inputs[:, [2, 7]] = 0
    kernel[[2, 7]] = 100
    result = pruning.prune_layer(kernel, inputs, 0.5, method=method)
    assert not np.any(np.asarray(result.mask)[[2, 7]])
    assert result.num_dead == 2
    assert result.sparsity == pytest.approx(0.5)
    assert np.all(np.isfinite(result.kernel))


@pytest.mark.parametrize("sparsity", [0.0, None])
def test_features_that_are_always_zero_stay_where_nothing_more_is_to_be_pruned(sparsity):
    kernel, inputs = problem(outputs=4)
    inputs[:, 2] = 0
    mask = np.ones(kernel.shape, bool)
    mask[5, 1] = sparsity == 0.0
    result = pruning.prune_layer(kernel, inputs, sparsity, mask=mask)
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_array_equal(result.kernel[2], kernel[2])


@pytest.mark.parametrize(
    ("entries", "message"), [(((0, 1), (1, 0)), "finite"), (((1, 1), (1, 1)), "negative")]
)
def test_what_is_no_gram_matrix_is_refused(entries, message):
    matrix = np.eye(6, dtype="f")
    for place in entries:
        matrix[place] = np.nan if message == "finite" else -1
    gram = pruning.InputGram(jnp.asarray(matrix), 64)
    with pytest.raises(ValueError, match=message):
        pruning.prune_layer(jnp.ones((6, 3)), gram, 0.5)


def test_a_matrix_that_only_a_large_damping_makes_definite_is_damped_with_a_warning():
    matrix = np.full((6, 6), 1e30, "f")  # entries beside the diagonal are far larger than it
    np.fill_diagonal(matrix, 1.0)
    with pytest.warns(UserWarning, match="damping was raised"):
        pruning.prune_layer(
            jnp.ones((6, 3)), pruning.InputGram(jnp.asarray(matrix), 64), 0.5, damping=1e-2
        )


@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_fewer_inputs_than_features_work_and_warn(method):
    kernel, inputs = problem(rows=6)
    with pytest.warns(UserWarning, match="inputs have only 6 rows for 12 features"):
        result = pruning.prune_layer(kernel, inputs, 0.5, method=method)
    assert np.all(np.isfinite(result.kernel))
    assert result.error == pytest.approx(measured_error(kernel, result, inputs))


def test_a_singular_gram_matrix_gets_more_damping_and_warns():
    kernel, inputs = problem()
    inputs = (inputs[:, :2] @ inputs[:2]).astype("f")  # of rank two
    with pytest.warns(UserWarning, match="damping was raised"):
        result = pruning.prune_layer(kernel.astype("f"), inputs, 0.5, damping=0.0)
    assert result.damping > 0
    assert np.all(np.isfinite(result.kernel))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("is_set", [False, True], ids=["", "set"])
@pytest.mark.parametrize("spec", [jax.P(None, "data"), jax.P("data"), jax.P()], ids=str)
@pytest.mark.parametrize("method", ["obs", "greedy", "wanda", "magnitude"])
def test_sharded_kernels_and_inputs_give_what_single_ones_do(method, spec, is_set, kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    rows, own = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, spec)
    kernel, inputs = problem(outputs=8)
    mask = np.ones(kernel.shape, bool)
    mask[:2, :3] = False
    single = pruning.prune_layer(kernel, inputs, 0.5, method=method, mask=mask)
    placed = jax.device_put((kernel, mask), own)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        sharded = pruning.prune_layer(
            placed[0], jax.device_put(inputs, rows), 0.5, method=method, mask=placed[1]
        )
    assert sharded.kernel.sharding == sharded.mask.sharding == own
    np.testing.assert_array_equal(sharded.mask, single.mask)
    np.testing.assert_allclose(sharded.kernel, single.kernel, rtol=1e-6, atol=1e-8)


def test_the_second_layer_of_a_shape_compiles_nothing(caplog):
    kernel, inputs = problem(features=14)
    pruning.prune_layer(kernel, inputs, 0.5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        pruning.prune_layer(kernel + 1, inputs + 1, 0.6)
    assert not [record for record in caplog.records if "Compiling" in record.message]


# Wrong input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0.0, 1.0\)"),
        ({"sparsity": 1 - 1e-9}, "would leave none of the"),
        ({"sparsity": -0.1}, r"sparsity must be a number in \[0.0, 1.0\)"),
        ({"sparsity": None}, "sparsity=None needs a mask"),
        ({"method": "fisher"}, "method must be one of 'obs', 'greedy', 'wanda', 'magnitude'"),
        ({"update": "all"}, "update must be one of 'sweep', 'joint', 'none'"),
        ({"order": "random"}, "order must be one of 'natural', 'diagonal'"),
        ({"damping": -1.0}, "damping must be a number in"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"structure": pruning.OutputUnits()}, r"structure must be None or NM\(n, m\)"),
        ({"structure": pruning.NM(5, 4)}, "n <= m"),
        ({"structure": pruning.NM(2, 4), "sparsity": 0.6}, "prunes 0.5 of a layer, got"),
        ({"structure": pruning.NM(2, 5), "sparsity": None}, "a fan-in divisible by 5, got 12"),
        ({"mask": np.ones((12, 4), bool)}, r"mask must be bool with kernel's shape \(12, 5\)"),
        ({"mask": np.ones((12, 5))}, "mask must be bool"),
        ({"mask": np.zeros((12, 5), bool)}, "sparsity=0.5 of kernel is below the 1 of its mask"),
        ({"layout": "IOO"}, r"names 3 axes, the kernel of shape \(12, 5\) has 2"),
        ({"layout": "LI"}, "does not determine"),
        ({"layout": "IX"}, "a layout consists of the letters"),
        ({"kernel": np.ones((12, 5), int)}, "kernel must hold real weights, got int"),
        ({"kernel": np.full((12, 5), np.nan)}, "kernel must be finite"),
        ({"kernel": np.ones((2, 3, 4))}, "layout='auto' does not determine"),
        ({"kernel": np.ones((2, 3, 4)), "layout": "LIO"}, "has stacked axes"),
        ({"inputs": np.full((4, 12), np.inf)}, "inputs must be finite.* in array 0"),
        ({"inputs": [np.ones((4, 12)), np.full((4, 12), np.nan)]}, "in array 1"),
        ({"inputs": np.ones((40, 7))}, r"\(..., 12\), got shape \(40, 7\)"),
        ({"inputs": np.ones((40, 12), int)}, "inputs must be real, got int"),
        ({"inputs": np.zeros((40, 12))}, "inputs are all zero"),
        ({"inputs": []}, "inputs have no rows"),
        ({"inputs": np.ones((0, 12))}, "inputs have no rows"),
        (
            {"inputs": np.ones((4, 0)), "kernel": np.ones((0, 5))},
            "kernel must hold real weights, got float64",
        ),
        ({"inputs": 3}, "inputs must be an array, an iterable"),
        ({"inputs": pruning.InputGram(jnp.eye(3), 9)}, "inputs have 3 features, but the kernel"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(options, message):
    kernel, inputs = problem()
    arguments = {"kernel": kernel, "inputs": inputs, "sparsity": 0.5} | options
    with pytest.raises(ValueError, match=message):
        pruning.prune_layer(**arguments)


def test_images_in_place_of_patches_are_refused_with_the_way_to_get_them():
    with pytest.raises(ValueError, match=r"pruning.conv_patches\(images, window"):
        pruning.prune_layer(np.ones((3, 3, 2, 4)), np.ones((5, 6, 6, 2)), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "FULL"}, "padding must be one of 'SAME'"),
        ({"padding": [(1, 1)]}, "each of the window's 2 axes"),
        ({"window": (3, 3, 3, 3)}, "4 spatial axes"),
        ({"window": (0, 3)}, "each size of window"),
    ],
)
def test_wrong_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning.conv_patches(np.ones((2, 6, 6, 3)), **({"window": (3, 3)} | arguments))


@pytest.mark.parametrize("update", ["sweep", "joint"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_the_scale_of_the_inputs_does_not_matter(scale, update):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)
    inputs = rng.normal(size=(400, 48)) @ rng.normal(size=(48, 48))
    scaled, plain = (
        pruning.prune_layer(kernel, jnp.asarray(inputs * c, jnp.float32), 0.5, update=update)
        for c in (scale, 1.0)
    )
    np.testing.assert_allclose(scaled.error, plain.error, rtol=1e-3)
    np.testing.assert_allclose(scaled.damping, plain.damping * scale**2, rtol=1e-3)
