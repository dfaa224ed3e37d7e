"""The natural gradient of a batch, against a dense matrix in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax

pytestmark = pytest.mark.oldest
NUM_EXAMPLES = 7
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.25])
# All rows at once; three micro-batches, the last not full.
every_size = pytest.mark.parametrize("micro_batch_size", [None, 3])
EMPIRICAL = ["empirical_fisher", "improved_empirical_fisher"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def problem(seed=0):
    """A network with coupled leaves of several ranks, its inputs and targets; 20 parameters."""
    params = {
        "hidden": normal(seed, 3, 4),
        "output": [normal(seed + 1, 4, 2), normal(seed + 2)],
        "steps": jnp.int32(3),
    }
    return params, normal(seed + 3, NUM_EXAMPLES, 3), normal(seed + 4, NUM_EXAMPLES, 2)


def network(params, inputs):
    kernel, scale = params["output"]
    return jnp.sin(scale) + jnp.tanh(inputs @ params["hidden"]) @ kernel


def amplitudes(params, inputs):
    """A complex number for each example."""
    outputs = network(params, inputs)
    return jax.lax.complex(outputs[:, 0], outputs[:, 1])


def flat(tree):
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return np.concatenate([np.ravel(leaf) for leaf in floats])


def jacobian(fun, params, inputs):
    """A dense (n, outputs, parameters) or, of one output each, (n, parameters)."""
    leaves, treedef = jax.tree.flatten(params)
    vector, unravel = ravel_pytree(leaves[:-1])

    def of_vector(vector):
        return fun(jax.tree.unflatten(treedef, [*unravel(vector), leaves[-1]]), inputs)

    if not jnp.iscomplexobj(of_vector(vector)):
        return np.asarray(jax.jacobian(of_vector)(vector))
    real, imaginary = (
        jax.jacobian(lambda v, part=part: part(of_vector(v)))(vector)
        for part in (jnp.real, jnp.imag)
    )
    return np.asarray(real) + 1j * np.asarray(imaginary)


def prepared(rows, weights, centered):
    """Rows (n, ...) with their means subtracted, times the roots of their weights."""
    weights = np.ones(len(rows)) if weights is None else weights
    mean = np.tensordot(weights / weights.sum(), rows, 1) if centered else 0
    roots = np.sqrt(weights).reshape(-1, *[1] * (rows.ndim - 1))
    return roots * (rows - mean), np.sqrt(weights), weights.sum()


def dense_direction(rows, samples, normalizer, damping, carried=None):
    r"""$\mu d' + F^{-1} \operatorname{Re} G^H (s - \mu G d') / n$ and $d^T F d$ of it."""
    carried = np.zeros(rows.shape[1]) if carried is None else carried
    matrix = damping * np.eye(rows.shape[1]) + (rows.conj().T @ rows).real / normalizer
    force = (rows.conj().T @ (samples - rows @ carried)).real / normalizer
    direction = carried + np.linalg.solve(matrix, force)
    return direction, direction @ matrix @ direction


def updated(tx, params, **extra):
    return jax.jit(lambda state: tx.update(None, state, params, **extra))(tx.init(params))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


@every_size
@pytest.mark.parametrize(("weights", "centered"), [(None, False), (None, True), (WEIGHTS, True)])
def test_residuals_weighted_and_centered_are_a_dense_solution(micro_batch_size, weights, centered):
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(
        0.02, centered=centered, micro_batch_size=micro_batch_size
    )
    updates, state = updated(
        tx, params, outputs_fn=network, batch=(inputs,), targets=targets, weights=weights
    )
    rows, roots, normalizer = prepared(jacobian(network, params, inputs), weights, centered)
    samples = roots[:, None] * np.asarray(network(params, inputs) - targets)
    direction, square = dense_direction(
        rows.reshape(2 * NUM_EXAMPLES, -1), samples.ravel(), normalizer, 0.02
    )
    assert_close(flat(updates), direction)
    assert_close(state.fisher_norm**2, square)
    assert updates["steps"] == 0


@every_size
def test_complex_amplitudes_of_real_parameters(micro_batch_size):
    params, inputs, energies = problem(seed=1)
    energies = jax.lax.complex(energies[:, 0], energies[:, 1])
    tx = curvax.scale_by_natural_gradient(0.1, centered=True, micro_batch_size=micro_batch_size)
    updates, _ = updated(
        tx,
        params,
        outputs_fn=amplitudes,
        batch=(inputs,),
        cotangents=energies,
        weights=WEIGHTS,
    )
    rows, roots, normalizer = prepared(jacobian(amplitudes, params, inputs), WEIGHTS, centered=True)
    samples = roots * np.asarray(energies)
    assert_close(flat(updates), dense_direction(rows, samples, normalizer, 0.1)[0])


@every_size
def test_a_holomorphic_function_gives_the_hermitian_solution(micro_batch_size):
    params = {"a": normal(0, 3, 2) + 1j * normal(1, 3, 2), "b": normal(2, 2) - 1j * normal(3, 2)}
    inputs, energies = normal(4, NUM_EXAMPLES, 3), normal(5, NUM_EXAMPLES) + 1j

    def amplitude(params, inputs):
        return jnp.sinh(0.1 * inputs @ params["a"]) @ params["b"]

    tx = curvax.scale_by_natural_gradient(0.1, micro_batch_size=micro_batch_size)
    updates, _ = updated(tx, params, outputs_fn=amplitude, batch=(inputs,), cotangents=energies)
    vector, unravel = ravel_pytree(params)
    rows = np.asarray(
        jax.jacobian(lambda v: amplitude(unravel(v), inputs), holomorphic=True)(vector)
    )
    matrix = 0.1 * np.eye(len(vector)) + rows.conj().T @ rows / NUM_EXAMPLES
    force = rows.conj().T @ np.asarray(energies) / NUM_EXAMPLES
    assert_close(ravel_pytree(updates)[0], np.linalg.solve(matrix, force))


@pytest.mark.parametrize("kind", ["real", "complex", "complex parameters"])
def test_gradients_of_each_example_are_the_rows_themselves(kind):
    params = {"hidden": normal(3, 3, 4)}
    rows, samples = normal(0, NUM_EXAMPLES, 12), normal(1, NUM_EXAMPLES)
    if kind != "real":
        rows, samples = rows + 1j * normal(2, NUM_EXAMPLES, 12), samples + 0.5j
    if kind == "complex parameters":
        params = {"hidden": params["hidden"] + 0j}
    tx = curvax.scale_by_natural_gradient(0.1, centered=True)
    updates, _ = tx.update(
        {"hidden": rows.reshape(NUM_EXAMPLES, 3, 4)},
        tx.init(params),
        params,
        cotangents=samples,
        weights=WEIGHTS,
    )
    rows, roots, normalizer = prepared(np.asarray(rows), WEIGHTS, centered=True)
    force = rows.conj().T @ (roots * np.asarray(samples)) / normalizer
    matrix = rows.conj().T @ rows / normalizer
    if kind != "complex parameters":
        force, matrix = force.real, matrix.real
    direction = np.linalg.solve(0.1 * np.eye(12) + matrix, force)
    assert updates["hidden"].dtype == params["hidden"].dtype
    assert_close(np.ravel(updates["hidden"]), direction)


@pytest.mark.parametrize(
    ("loss", "micro_batch_size"),
    [("softmax_cross_entropy", None), ("softmax_cross_entropy", 3), ("convex", None)],
)
def test_gauss_newton_of_a_loss_is_that_of_its_products(loss, micro_batch_size):
    params, inputs, _ = problem()
    labels = jnp.arange(NUM_EXAMPLES) % 2
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    if loss == "convex":
        loss = curvax.convex_loss(lambda logits, label: cross_entropy(logits, label))
    tx = curvax.scale_by_natural_gradient(0.05, loss=loss, micro_batch_size=micro_batch_size)
    updates, _ = updated(tx, params, outputs_fn=network, batch=(inputs,), targets=labels)

    def damped(vector):
        product = curvax.ggn_vp(network, loss, params, vector, inputs, labels)
        return jax.tree.map(lambda p, v: p + 0.05 * v, product, vector)

    grads = jax.grad(lambda p: cross_entropy(network(p, inputs), labels).mean(), allow_int=True)(
        params
    )
    assert_close(flat(damped(updates))[: len(flat(grads))], flat(grads))


@pytest.mark.parametrize("matrix", EMPIRICAL)
def test_empirical_fisher_matrices_have_one_row_an_example(matrix):
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(0.05, matrix=matrix, micro_batch_size=3)
    updates, _ = updated(tx, params, outputs_fn=network, batch=(inputs,), targets=targets)
    residuals = np.asarray(network(params, inputs) - targets)
    lengths = np.linalg.norm(residuals, axis=1) if "improved" in matrix else np.ones(NUM_EXAMPLES)
    rows = np.einsum("nk,nkd->nd", residuals, jacobian(network, params, inputs)) / lengths[:, None]
    assert_close(flat(updates), dense_direction(rows, lengths, NUM_EXAMPLES, 0.05)[0])


@every_size
def test_springs_direction_is_nearest_to_the_one_carried_over(micro_batch_size):
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(0.02, momentum=0.8, micro_batch_size=micro_batch_size)
    state, carried = tx.init(params), 0.0
    rows = jacobian(network, params, inputs).reshape(2 * NUM_EXAMPLES, -1)
    for step in range(3):
        goals = targets + step
        updates, state = tx.update(
            None, state, params, outputs_fn=network, batch=(inputs,), targets=goals
        )
        samples = np.ravel(network(params, inputs) - goals)
        carried = 0.8 * carried + np.zeros(rows.shape[1])
        carried, square = dense_direction(rows, samples, NUM_EXAMPLES, 0.02, carried)
        assert_close(flat(updates), carried)
        assert_close(flat(state.carried), carried)
        assert_close(state.fisher_norm**2, square)
    assert state.count == 3


def test_a_trust_region_shortens_the_update_and_not_what_is_carried_over():
    params, inputs, targets = problem()
    call = {"outputs_fn": network, "batch": (inputs,), "targets": targets}
    free = curvax.scale_by_natural_gradient(0.02, momentum=0.5)
    bounded = curvax.scale_by_natural_gradient(0.02, momentum=0.5, max_fisher_norm=0.1)
    (whole, wanted), (short, state) = (updated(tx, params, **call) for tx in (free, bounded))
    assert state.fisher_norm == wanted.fisher_norm > 0.1
    assert_close(flat(short), flat(whole) * float(0.1 / wanted.fisher_norm))
    assert_close(flat(state.carried), flat(whole))


def test_a_damping_relative_to_the_rows_follows_the_scale_of_the_residuals():
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(1e-3, relative_damping=True)

    def scaled(params, inputs):
        return 1000.0 * network(params, inputs)

    updates, state = updated(tx, params, outputs_fn=network, batch=(inputs,), targets=targets)
    others, _ = updated(tx, params, outputs_fn=scaled, batch=(inputs,), targets=1000.0 * targets)
    assert_close(flat(others), flat(updates))
    rows = jacobian(network, params, inputs).reshape(2 * NUM_EXAMPLES, -1)
    assert_close(state.damping, 1e-3 * np.sum(rows**2) / len(rows) / NUM_EXAMPLES)


def test_a_schedule_of_the_damping_counts_steps():
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(lambda count: 0.1 / (1 + count))
    state = tx.init(params)
    for wanted in (0.1, 0.05):
        call = {"outputs_fn": network, "batch": (inputs,), "targets": targets}
        _, state = tx.update(None, state, params, **call)
        assert_close(state.damping, wanted)


def test_weighted_targets_are_targets_and_weights():
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(0.1)
    call = {"outputs_fn": network, "batch": (inputs,)}
    together = curvax.WeightedTargets(targets, WEIGHTS)
    updates, _ = updated(tx, params, **call, targets=together)
    others, _ = updated(tx, params, **call, targets=targets, weights=WEIGHTS)
    assert_close(flat(updates), flat(others))


def test_a_linear_model_is_solved_in_one_step_of_rate_one():
    inputs, targets = normal(0, 5, 9), normal(1, 5)
    tx = curvax.natural_gradient(1.0, damping=1e-12)
    params = jnp.zeros(9)
    updates, _ = updated(
        tx, params, outputs_fn=lambda w, x: x @ w, batch=(inputs,), targets=targets
    )
    assert_close(updates, np.linalg.lstsq(inputs, targets)[0])


@pytest.mark.parametrize("damping", [1e-4, 1e-5, 1e-6, 1e-7])
def test_float32_is_accurate_at_a_small_damping(damping):
    """64 rows of length about one that differ by a third of it, as those of similar examples."""
    rng = np.random.default_rng(0)
    mean, noise = rng.standard_normal(500), rng.standard_normal((64, 500))
    rows = (mean + 0.3 * noise) / np.sqrt(500)
    samples = rng.standard_normal(64)
    exact, _ = dense_direction(rows, samples, 64, damping)
    with jax.enable_x64(False):
        tx = curvax.scale_by_natural_gradient(damping)
        grads = jnp.asarray(rows, jnp.float32)
        updates, state = tx.update(grads, tx.init(grads[0]), cotangents=jnp.asarray(samples))
        assert updates.dtype == jnp.float32
        assert state.failures == 0
    assert np.linalg.norm(updates - exact) < 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("weights", [None, np.linspace(0.1, 2.0, 64)])
def test_in_float32_a_mean_of_the_cotangents_costs_no_digits_of_a_centered_batch(weights):
    """Local energies are far from zero; only their deviations count."""
    rng = np.random.default_rng(0)
    rows, samples = rng.standard_normal((64, 500)) / np.sqrt(500), rng.standard_normal(64) - 60
    with jax.enable_x64(False):
        tx = curvax.scale_by_natural_gradient(1e-6, centered=True)
        grads = jnp.asarray(rows, jnp.float32)
        given = jnp.asarray(samples, jnp.float32)
        updates, _ = tx.update(grads, tx.init(grads[0]), cotangents=given, weights=weights)
        inverse = curvax.inverse_fisher(grads, 1e-6, centered=True, weights=weights)
        product = inverse.solve_in_sample_space(given)
    wide, roots, normalizer = prepared(np.asarray(grads, np.float64), weights, centered=True)
    exact = dense_direction(wide, roots * np.asarray(given, np.float64), normalizer, 1e-6)[0]
    for found in (updates, product / normalizer):
        assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


def test_a_singular_batch_in_float32_is_counted_and_solved():
    with jax.enable_x64(False):
        grads = jnp.ones((16, 50))
        tx = curvax.scale_by_natural_gradient(1e-12)
        updates, state = tx.update(grads, tx.init(grads[0]))
    assert state.failures == 1
    np.testing.assert_allclose(updates, 1 / 50, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_updates_have_the_dtype_of_the_params_and_the_state_is_wide(dtype):
    with jax.enable_x64(False):
        params = jnp.ones(3, dtype)
        tx = curvax.scale_by_natural_gradient(0.1, momentum=0.5)
        updates, state = tx.update(
            None,
            tx.init(params),
            params,
            outputs_fn=lambda w, x: jnp.tanh(x @ w),
            batch=(jnp.ones((4, 3), dtype),),
        )
    assert updates.dtype == params.dtype
    assert state.carried.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_leaves_the_state_and_shows_in_the_update(bad):
    params, inputs, targets = problem()
    tx = curvax.scale_by_natural_gradient(0.1, momentum=0.5)
    call = {"outputs_fn": network, "targets": targets}
    _, state = tx.update(None, tx.init(params), params, batch=(inputs,), **call)
    updates, after = tx.update(None, state, params, batch=(inputs.at[2, 0].set(bad),), **call)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert np.isnan(flat(updates)).all()


def test_line_search_of_optax_takes_the_direction():
    params, inputs, targets = problem()

    def value_fn(params, outputs_fn, batch, targets):
        return 0.5 * jnp.sum((outputs_fn(params, *batch) - targets) ** 2) / NUM_EXAMPLES

    tx = optax.chain(
        curvax.scale_by_natural_gradient(1e-6),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),
    )
    call = {"outputs_fn": network, "batch": (inputs,), "targets": targets}
    values = []
    floats = {"hidden": params["hidden"], "output": params["output"]}
    state = tx.init(floats)
    for _ in range(5):
        value, grads = jax.value_and_grad(value_fn)(floats, **call)
        updates, state = tx.update(
            grads, state, floats, value=value, grad=grads, value_fn=value_fn, **call
        )
        floats = optax.apply_updates(floats, updates)
        values.append(value)
    assert values[-1] < values[0] / 4


def test_a_second_batch_compiles_nothing_and_a_step_is_differentiable_forward():
    params, inputs, targets = problem()
    tx = curvax.natural_gradient(0.5, 0.1, momentum=0.5, micro_batch_size=3)

    @jax.jit
    def step(state, inputs):
        call = {"outputs_fn": network, "batch": (inputs,), "targets": targets}
        return tx.update(None, state, params, **call)

    _, state = step(tx.init(params), inputs)
    step(state, inputs + 1)
    assert step._cache_size() == 1

    def of_scale(scale):
        call = {"outputs_fn": network, "batch": (scale * inputs,), "targets": targets}
        return tx.update(None, tx.init(params), params, **call)[0]["hidden"]

    one = jnp.ones(())
    tangent = jax.jvp(of_scale, (one,), (one,))[1]
    difference = (of_scale(one + 1e-6) - of_scale(one - 1e-6)) / 2e-6
    np.testing.assert_allclose(tangent, difference, rtol=1e-6, atol=1e-8)


@functools.cache
def temporary_bytes(micro_batch_size):
    """The memory of a step on 256 examples beside arguments and results."""
    with jax.enable_x64(False):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256,))]
        inputs = jax.ShapeDtypeStruct((256, 64), jnp.float32)
        tx = curvax.scale_by_natural_gradient(0.1, micro_batch_size=micro_batch_size)

        def step(params, state, inputs):
            def outputs(params, inputs):
                return jnp.tanh(inputs @ params[0]) @ params[1]

            return tx.update(None, state, params, outputs_fn=outputs, batch=(inputs,))

        state = jax.eval_shape(tx.init, shapes)
        program = jax.jit(step).lower(shapes, state, inputs).compile()
        return program.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_micro_batch_and_not_with_the_batch():
    row = 4 * (64 * 256 + 256)
    assert temporary_bytes(None) > 256 * row
    for size in (8, 32):
        # Rows of two micro-batches, each once more while they are transposed for a product; the
        # matrices of the batch; and examples.
        assert temporary_bytes(size) < 4.5 * size * row + 8 * 4 * 256**2 + 4 * 256 * 600
