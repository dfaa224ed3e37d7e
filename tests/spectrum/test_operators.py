"""Operators: the dense matrices of the whole data, of parts of the tree, in other libraries."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax import pruning, spectrum

from . import problems
from .problems import loss_fn, network, ravel

CROSS_ENTROPY = "softmax_cross_entropy"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def as_matrix(operator):
    flat, _ = ravel_pytree(operator.like)
    product = operator.flat_product()
    return np.stack([np.asarray(product(row)) for row in jnp.eye(flat.size)])


@pytest.mark.oldest
@pytest.mark.parametrize("seed", range(3))
def test_the_hessian_of_uneven_batches_is_that_of_all_examples(seed):
    one = problems.problem(seed)
    operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
    np.testing.assert_allclose(as_matrix(operator), problems.dense_hessian(one), atol=1e-12)


def test_gauss_newton_and_empirical_fisher_are_their_dense_matrices():
    one = problems.problem()
    flat, unravel = ravel_pytree(one.params)
    J = np.asarray(jax.jacobian(lambda x: network(unravel(x), one.inputs))(flat))
    p = np.asarray(jax.nn.softmax(network(one.params, one.inputs)))
    ggn = fisher = 0
    for n in range(41):
        ggn = ggn + J[n].T @ (np.diag(p[n]) - np.outer(p[n], p[n])) @ J[n] / 41
        gradient = J[n].T @ (p[n] - np.eye(4)[one.targets[n]])
        fisher = fisher + np.outer(gradient, gradient) / 41
    for make, expected in (
        (spectrum.ggn_operator, ggn),
        (spectrum.empirical_fisher_operator, fisher),
    ):
        operator = make(network, CROSS_ENTROPY, one.params, one.batches)
        np.testing.assert_allclose(as_matrix(operator), expected, atol=1e-12)


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("select", [None, lambda path, leaf: "kernel" in path])
def test_what_is_computed_once_and_kept_changes_nothing(kind, select):
    one = problems.problem()
    make = {
        "hessian": lambda **options: spectrum.hessian_operator(
            loss_fn, one.params, one.batches, **options
        ),
        "ggn": lambda **options: spectrum.ggn_operator(
            network, CROSS_ENTROPY, one.params, one.batches, **options
        ),
        "empirical_fisher": lambda **options: spectrum.empirical_fisher_operator(
            network, CROSS_ENTROPY, one.params, one.batches, **options
        ),
    }[kind]
    kept, anew = (make(select=select, linearize=linearize) for linearize in (True, False))
    vectors = [anew.random_vector(jax.random.key(seed)) for seed in range(3)]
    for vector, together in zip(vectors, kept.products(vectors), strict=True):
        expected = ravel(anew(vector))
        np.testing.assert_allclose(ravel(kept(vector)), expected, atol=1e-12)
        np.testing.assert_allclose(ravel(together), expected, atol=1e-12)


def test_a_single_batch_goes_through_the_network_once(monkeypatch):
    one, linearizations = problems.problem(), []
    linearize = jax.linearize
    monkeypatch.setattr(jax, "linearize", lambda *a: linearizations.append(1) or linearize(*a))
    for batches, expected in ((one.batches[:1], 1), (one.batches, 0)):
        linearizations.clear()
        operator = spectrum.hessian_operator(lambda *args: loss_fn(*args), one.params, batches)
        operator(one.params)
        assert len(linearizations) == expected


def test_a_kept_product_can_be_traced_and_used_outside_again():
    one = problems.problem()
    operator = spectrum.hessian_operator(
        loss_fn, one.params, one.batches[:1], check_deterministic=False
    )
    traced = jax.jit(operator)(one.params)
    np.testing.assert_allclose(ravel(operator(one.params)), ravel(traced), atol=1e-12)
    closed_over = spectrum.hessian_operator(
        loss_fn, one.params, one.batches[:1], check_deterministic=False
    )
    doubled = jax.jit(lambda scale: scale * ravel_pytree(closed_over(one.params))[0])(2.0)
    np.testing.assert_allclose(2 * ravel(closed_over(one.params)), doubled, atol=1e-12)


@pytest.mark.parametrize("layer", ["first", "second/kernel"])
def test_a_selection_is_a_block_of_the_whole(layer):
    one = problems.problem()
    operator = spectrum.hessian_operator(
        loss_fn, one.params, one.batches, select=lambda path, leaf: path.startswith(layer)
    )
    chosen = np.array(
        [
            path.startswith(layer)
            for path, leaf in (
                ("first/bias", one.params["first"]["bias"]),
                ("first/kernel", one.params["first"]["kernel"]),
                ("second/kernel", one.params["second"]["kernel"]),
            )
            for _ in range(leaf.size)
        ]
    )
    expected = problems.dense_hessian(one)[np.ix_(chosen, chosen)]
    np.testing.assert_allclose(as_matrix(operator), expected, atol=1e-12)
    assert all(path.startswith(layer) for path in operator.like)


def test_adapters_are_selected_by_their_paths():
    """LoRA: the frozen kernel takes no part."""
    rng = np.random.default_rng(0)
    params = {
        "frozen": jnp.asarray(rng.standard_normal((5, 4))),
        "lora_a": jnp.asarray(rng.standard_normal((5, 2))),
        "lora_b": jnp.asarray(rng.standard_normal((2, 4))),
    }
    inputs = jnp.asarray(rng.standard_normal((9, 5)))

    def loss(p, x):
        return jnp.mean(jnp.tanh(x @ (p["frozen"] + p["lora_a"] @ p["lora_b"])) ** 2)

    operator = spectrum.hessian_operator(
        loss, params, [inputs], select=lambda path, leaf: "lora" in path
    )
    adapters = {name: leaf for name, leaf in params.items() if "lora" in name}
    expected = problems.dense(lambda a: loss({**params, **a}, inputs), adapters)
    np.testing.assert_allclose(as_matrix(operator), expected, atol=1e-12)


def test_data_are_streamed_and_an_iterator_is_kept():
    one = problems.problem()

    class Stream:
        passes = 0

        def __iter__(self):
            Stream.passes += 1
            return iter(one.batches)

    operator = spectrum.hessian_operator(loss_fn, one.params, Stream(), check_deterministic=False)
    before = Stream.passes
    operator(one.params)
    operator(one.params)
    assert Stream.passes == before + 2
    once = spectrum.hessian_operator(loss_fn, one.params, iter(one.batches))
    np.testing.assert_array_equal(ravel(once(one.params)), ravel(operator(one.params)))


def test_a_loss_is_compiled_once_for_all_its_operators():
    one, count = problems.problem(), 0

    def counted(params, inputs, targets):
        nonlocal count
        count += 1
        return loss_fn(params, inputs, targets)

    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda leaf, s=scale: s * leaf, one.params)
        operator = spectrum.hessian_operator(counted, params, one.batches[:1])
        operator(params)
    assert count == 1


def test_low_precision_params_have_wide_vectors():
    one = problems.problem(dtype=jnp.bfloat16)
    operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
    assert {leaf.dtype for leaf in jax.tree.leaves(operator.like)} == {jnp.dtype(jnp.float32)}
    image = operator(operator.random_vector(jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(image)} == {jnp.dtype(jnp.float32)}


def test_an_operator_is_an_argument_of_jitted_functions():
    one, traces = problems.problem(), []

    @jax.jit
    def squared(operator, vector):
        traces.append(1)
        return operator(operator(vector))

    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda leaf, s=scale: s * leaf, one.params)
        operator = spectrum.hessian_operator(loss_fn, params, one.batches)
        expected = ravel(operator(operator(params)))
        np.testing.assert_allclose(ravel(squared(operator, params)), expected, atol=1e-12)
    assert len(traces) == 1
    doubled = jax.tree.map(lambda leaf: 2 * leaf, operator)  # all its arrays, the weights too
    assert doubled.size == operator.size


@pytest.mark.parametrize("matrix", [jnp.eye(2), jnp.full((2, 2), 3.0)])
def test_operators_of_plain_functions_and_of_trees_go_through_jit(matrix):
    def times(matrix, vector):
        return matrix @ vector

    for product in (lambda v: matrix @ v, jax.tree_util.Partial(times, matrix)):
        operator = spectrum.Operator(product, jnp.zeros(2))
        image = jax.jit(lambda op, v: op(v))(operator, jnp.ones(2))
        np.testing.assert_allclose(image, matrix @ jnp.ones(2))


def test_an_operator_is_made_within_jit():
    one = problems.problem()

    @jax.jit
    def product(params):
        return spectrum.hessian_operator(loss_fn, params, one.batches)(params)

    expected = spectrum.hessian_operator(loss_fn, one.params, one.batches)(one.params)
    np.testing.assert_allclose(ravel(product(one.params)), ravel(expected), atol=1e-12)


def test_integer_leaves_are_held_constant():
    params = {"table": jnp.array([2, 0]), "w": jnp.array([1.0, 2.0, 3.0])}

    def loss(p, scale):
        return scale * jnp.sum(p["w"][p["table"]] ** 3)

    operator = spectrum.hessian_operator(loss, params, [1.0])
    assert operator.like["table"] is None
    image = operator({"table": None, "w": jnp.ones(3)})
    np.testing.assert_allclose(image["w"], [6.0, 0.0, 18.0])
    selected = spectrum.hessian_operator(loss, params, [1.0], select=lambda *_: True)
    assert set(selected.like) == {"w"}


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
def test_aux_of_a_loss_or_network_is_dropped(kind):
    one = problems.problem()

    def with_aux(fun):
        return lambda *args: (fun(*args), {"metric": jnp.ones(3)})

    if kind == "hessian":
        plain = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        other = spectrum.hessian_operator(with_aux(loss_fn), one.params, one.batches, has_aux=True)
    else:
        make = getattr(spectrum, f"{kind}_operator")
        plain = make(network, CROSS_ENTROPY, one.params, one.batches)
        other = make(with_aux(network), CROSS_ENTROPY, one.params, one.batches, has_aux=True)
    np.testing.assert_array_equal(ravel(other(one.params)), ravel(plain(one.params)))


def test_running_statistics_among_the_parameters_are_named():
    variables = {
        "params": {"w": jnp.ones(2)},
        "batch_stats": {"norm": {"mean": jnp.ones(2)}},
    }

    def loss(variables, x):
        mean = variables["batch_stats"]["norm"]["mean"]
        return jnp.mean(x * (variables["params"]["w"] - mean) ** 2)

    batches = [jnp.ones(2)]
    for call in (
        lambda: spectrum.hessian_operator(loss, variables, batches),
        lambda: curvax.hessian_diag(loss, variables, *batches, method="exact"),
        lambda: pruning.collect_gradients(loss, variables, batches, 1),
    ):
        with pytest.warns(UserWarning, match="running statistics at batch_stats/norm/mean"):
            call()
    chosen = spectrum.hessian_operator(
        loss, variables, batches, select=lambda path, _: path.startswith("params")
    )
    assert chosen.size == 2


class TestPreconditioned:
    """The dense matrix P^-1/2 H P^-1/2 of each optimizer."""

    def run(self, tx, steps=3, **extra):
        one = problems.problem()
        params, state = one.params, tx.init(one.params)

        def loss(p):
            return loss_fn(p, one.inputs, one.targets)

        for _ in range(steps):
            updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss, **extra)
            params = optax.apply_updates(params, updates)
        operator = spectrum.hessian_operator(loss_fn, params, one.batches)
        return operator, state, problems.dense(loss, params)

    def test_adam(self):
        operator, state, hessian = self.run(optax.with_extra_args_support(optax.adam(0.01)))
        root = spectrum.adam_inverse_root(state, operator.like)
        nu = ravel(optax.tree.get(state, "nu")) / (1 - 0.999**3)
        expected = 1 / np.sqrt(np.sqrt(nu) + 1e-8)
        scaled = spectrum.preconditioned(operator, root)
        np.testing.assert_allclose(
            as_matrix(scaled), expected[:, np.newaxis] * hessian * expected, rtol=1e-9, atol=1e-10
        )
        vectors = [scaled.random_vector(jax.random.key(seed)) for seed in range(2)]
        for image, vector in zip(scaled.products(vectors), vectors, strict=True):
            np.testing.assert_allclose(ravel(image), ravel(scaled(vector)), atol=1e-12)

    def test_adahessian_and_a_part_of_the_tree(self):
        operator, state, _ = self.run(curvax.adahessian(0.01))
        root = spectrum.adahessian_inverse_root(state, operator.like)
        nu = ravel(optax.tree.get(state, "nu")) / float(optax.tree.get(state, "nu_weight"))
        expected = 1 / np.sqrt(np.sqrt(nu) + 1e-4)
        np.testing.assert_allclose(ravel(root), expected, rtol=1e-10)
        part = spectrum.adahessian_inverse_root(state, {"second/kernel": jnp.zeros((8, 4))})
        np.testing.assert_array_equal(part["second/kernel"], root["second"]["kernel"])

    @pytest.mark.parametrize("steps", [3, 7])
    def test_mfac(self, steps):
        tx = curvax.mfac(0.01, num_grads=5, damping=0.01)
        operator, state, hessian = self.run(tx, steps)
        rows = jax.tree.leaves(optax.tree.get(state, "window").rows)
        G = np.concatenate([np.reshape(x, (5, -1)) for x in rows], axis=1)
        F = 0.01 * np.eye(G.shape[1]) + G.T @ G / 5
        values, vectors = np.linalg.eigh(F)
        root = vectors / np.sqrt(values) @ vectors.T
        scaled = spectrum.preconditioned(operator, spectrum.mfac_inverse_root(state))
        np.testing.assert_allclose(as_matrix(scaled), root @ hessian @ root, atol=1e-8)

    def test_a_state_before_the_first_step_is_refused(self):
        params = problems.problem().params
        for tx, root in (
            (optax.adam(0.1), lambda s: spectrum.adam_inverse_root(s, params)),
            (curvax.adahessian(0.1), lambda s: spectrum.adahessian_inverse_root(s, params)),
            (curvax.mfac(num_grads=2), spectrum.mfac_inverse_root),
        ):
            with pytest.raises(ValueError, match="has taken no step yet"):
                root(tx.init(params))


class TestOtherLibraries:
    def test_scipy_finds_the_same_eigenvalues(self):
        from scipy.sparse.linalg import eigsh

        one = problems.problem()
        operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        values = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
        exact = np.linalg.eigvalsh(problems.dense_hessian(one))
        np.testing.assert_allclose(np.sort(values), exact[-3:], atol=1e-9)

    def test_matfree_takes_the_flat_product(self):
        decomp = pytest.importorskip("matfree.decomp")
        one = problems.problem()
        operator = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        tridiag = decomp.tridiag_sym(20, reortho="full")
        start = jnp.asarray(ravel(operator.random_vector(jax.random.key(0))))
        result = tridiag(operator.flat_product(), start)
        values = np.linalg.eigvalsh(np.asarray(result.J_small))
        exact = np.linalg.eigvalsh(problems.dense_hessian(one))
        np.testing.assert_allclose(values[-1], exact[-1], rtol=1e-6)

    def test_lineax_solves_with_the_operator(self):
        lineax = pytest.importorskip("lineax")
        one = problems.problem()
        ggn = spectrum.ggn_operator(network, CROSS_ENTROPY, one.params, one.batches)
        shifted = spectrum.Operator(lambda v: jax.tree.map(lambda a, b: a + b, ggn(v), v), ggn.like)
        linear = shifted.to_lineax()
        rhs = shifted.random_vector(jax.random.key(0))
        solution = lineax.linear_solve(
            lineax.TaggedLinearOperator(linear, lineax.positive_semidefinite_tag),
            rhs,
            lineax.CG(rtol=1e-10, atol=1e-10),
        ).value
        np.testing.assert_allclose(ravel(shifted(solution)), ravel(rhs), atol=1e-8)


class TestBadInput:
    def test_an_empty_data_set(self):
        with pytest.raises(ValueError, match="batches are empty"):
            spectrum.hessian_operator(loss_fn, problems.problem().params, [])

    def test_a_loss_that_is_no_scalar(self):
        one = problems.problem()
        with pytest.raises(ValueError, match="the loss must return a real floating-point scalar"):
            spectrum.hessian_operator(lambda p, x, y: network(p, x), one.params, one.batches)

    def test_a_selection_of_nothing(self):
        one = problems.problem()
        with pytest.raises(ValueError, match=r"chooses no leaf.*first/bias, first/kernel"):
            spectrum.hessian_operator(loss_fn, one.params, one.batches, select=lambda *_: False)

    def test_leaves_that_are_not_real(self):
        for dtype in (int, complex):
            with pytest.raises(ValueError, match=f"real floating-point, got {dtype.__name__}"):
                spectrum.Operator(lambda v: v, {"a": jnp.ones(2, dtype)})
        with pytest.raises(ValueError, match="at least one entry"):
            spectrum.Operator(lambda v: v, {})

    def test_a_vector_that_does_not_match(self):
        operator = spectrum.Operator(lambda v: v, jnp.zeros(3))
        with pytest.raises(ValueError, match="the vector must match"):
            operator(jnp.zeros(4))

    @pytest.mark.parametrize("start", [{"a": jnp.ones(2)}, {"a": jnp.ones(3), "b": jnp.ones(2)}])
    def test_a_start_that_does_not_match(self, start):
        operator = spectrum.Operator(lambda v: v, {"a": jnp.ones(2), "b": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"start must match operator.like.*start has"):
            spectrum.top_eigenpairs(operator, 1, key=jax.random.key(0), start=start)

    def test_batches_that_change_from_pass_to_pass_cause_a_warning(self):
        key = [jax.random.key(0)]

        def batches():
            while True:
                key[0], part = jax.random.split(key[0])
                yield [part]

        stream = batches()

        class Noisy:
            def __iter__(self):
                return iter(next(stream))

        def dropout_loss(w, part):
            return jnp.sum(jax.random.bernoulli(part, 0.5, w.shape) * w**2)

        with pytest.warns(UserWarning, match="two products with the same vector differ"):
            spectrum.hessian_operator(dropout_loss, jnp.ones(20), Noisy())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spectrum.hessian_operator(
                dropout_loss, jnp.ones(20), Noisy(), check_deterministic=False
            )

    def test_a_matrix_that_is_not_symmetric_is_found_on_request(self):
        matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        operator = spectrum.Operator(lambda v: matrix @ v, jnp.zeros(2))
        with pytest.raises(ValueError, match="the operator is not symmetric"):
            spectrum.check_symmetric(operator, key=jax.random.key(0))
        rolled = spectrum.Operator(lambda v: jnp.roll(v, 1), jnp.zeros(10**5))
        with pytest.raises(ValueError, match="the operator is not symmetric"):
            spectrum.check_symmetric(rolled, key=jax.random.key(0))
        one = problems.problem()
        good = spectrum.hessian_operator(loss_fn, one.params, one.batches)
        spectrum.check_symmetric(good, key=jax.random.key(0), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, np.float64])
@pytest.mark.parametrize("linearize", [True, False])
def test_vectors_of_any_dtype_are_taken(dtype, linearize):
    def loss_fn(params, inputs):
        return jnp.mean((inputs @ params) ** 2) / 2

    with jax.enable_x64(False):
        inputs = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        operator = spectrum.hessian_operator(
            loss_fn, jnp.zeros(2), [(inputs,)], linearize=linearize
        )
        np.testing.assert_allclose(operator(np.ones(2).astype(dtype)), [0.5, 2.0])


def test_selected_leaves_have_paths_of_their_own():
    params = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="select needs leaves with distinct paths"):
        spectrum.hessian_operator(
            lambda p, x: x * jnp.sum(p["a"]["b"] ** 2), params, [1.0], select=lambda *_: True
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_eigenpairs_of_the_tangent_kernel_widen_narrow_params(dtype):
    inputs = jnp.array([[3.0, 0.0], [0.0, 2.0]], dtype)
    pairs = spectrum.ntk_eigenpairs(lambda w, x: x @ w, jnp.zeros((2, 1), dtype), inputs, 1)
    np.testing.assert_allclose(pairs.values, [9.0])
    assert pairs.parameter_vectors.dtype == jnp.float32


@pytest.mark.parametrize("size", [-1, 0, 2.5])
def test_the_full_hessian_takes_whole_examples_at_a_time(size):
    with pytest.raises(ValueError, match="micro_batch_size must be an integer of at least 1"):
        spectrum.batch_size_study(
            lambda p, x: jnp.mean(x * p) ** 2,
            jnp.zeros(()),
            (jnp.ones(4),),
            [2],
            key=jax.random.key(0),
            micro_batch_size=size,
        )
