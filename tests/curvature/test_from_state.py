"""Key and interval read from the optimizer's state, wherever it is wrapped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax
from tests.reference import batch_like, coupled_loss, coupled_params

pytestmark = pytest.mark.oldest

LABELS = {"layers": "curvature", "head": "plain"}
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx, optax.scale(0.5))),
    "masked": lambda tx: optax.masked(tx, {"layers": True, "head": False}),
    "partition": lambda tx: optax.partition({"curvature": tx, "plain": optax.adam(0.1)}, LABELS),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def wrapped(name, **options):
    if name == "inject_hyperparams":
        return optax.inject_hyperparams(curvax.adahessian)(learning_rate=0.1, **options)
    return WRAPPERS[name](curvax.adahessian(0.1, **options))


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "inject_hyperparams"])
def test_the_state_is_found_inside_each_wrapper(wrapper):
    params = coupled_params()
    batch, key = batch_like(params), jax.random.key(3)
    state = wrapped(wrapper, key=key).init(params)
    found = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)(params, batch, state=state)
    step_key = jax.random.fold_in(key, 0)
    direct = curvax.value_grad_and_hessian_diag(coupled_loss)(params, batch, key=step_key)
    chex.assert_trees_all_close(found, direct, rtol=1e-5, atol=1e-6)


def test_the_state_is_found_inside_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip(1.0), curvax.adahessian(0.1, eps=1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, x):
        return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss)
    before, grads, diag = one_pass(params, jnp.ones((4, 3)), state=optimizer.opt_state)
    optimizer.update(model, grads, hessian_diag=diag, refresh=True)
    after, _, _ = one_pass(nnx.state(model, nnx.Param), jnp.ones((4, 3)), state=optimizer.opt_state)
    assert after < before


def test_each_step_draws_a_new_probe_and_the_state_alone_decides_it():
    params = coupled_params()
    batch = batch_like(params)
    tx = curvax.adahessian(0.0)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
    diags, state = [], tx.init(params)
    for _ in range(2):
        _, grads, diag = one_pass(params, batch, state=state)
        _, _, again = one_pass(params, batch, state=state)
        chex.assert_trees_all_equal(diag, again)
        _, state = tx.update(grads, state, params, hessian_diag=diag)
        diags.append(diag)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(*diags)


def test_in_graph_the_product_is_zero_off_the_refresh_steps():
    params = coupled_params()
    batch = batch_like(params)
    tx = curvax.adahessian(0.1, update_interval=3)
    one_pass = jax.jit(curvax.value_grad_and_hessian_diag_from_state(coupled_loss))
    state, refreshed = tx.init(params), []
    for _ in range(7):
        value, grads, diag = one_pass(params, batch, state=state)
        np.testing.assert_allclose(value, coupled_loss(params, batch), rtol=1e-5)
        refreshed.append(bool(np.any(diag["layers"][0])))
        _, state = tx.update(grads, state, params, hessian_diag=diag)
    assert refreshed == [True, False, False, True, False, False, True]


def test_a_static_refresh_decides_on_the_host_and_skips_the_product():
    params = coupled_params()
    batch = batch_like(params)
    state = curvax.adahessian(0.1).init(params)
    one_pass = jax.jit(
        curvax.value_grad_and_hessian_diag_from_state(coupled_loss), static_argnames="refresh"
    )
    value, grads, diag = one_pass(params, batch, state=state, refresh=False)
    assert diag is None
    chex.assert_trees_all_close(
        (value, grads), jax.value_and_grad(coupled_loss)(params, batch), rtol=1e-5
    )
    assert np.any(one_pass(params, batch, state=state, refresh=True)[2]["layers"][0])


@pytest.mark.parametrize("refresh", [None, True, False])
def test_aux_comes_back_in_every_case(refresh):
    def loss(params, batch):
        return coupled_loss(params, batch), {"seen": batch}

    params = coupled_params()
    batch = batch_like(params)
    state = curvax.adahessian(0.1, update_interval=2).init(params)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss, has_aux=True)
    (value, aux), _, _ = one_pass(params, batch, state=state, refresh=refresh)
    np.testing.assert_allclose(value, coupled_loss(params, batch), rtol=1e-5)
    chex.assert_trees_all_equal(aux, {"seen": batch})


def test_integer_leaves_pass_through_the_conditional():
    params = {"w": jnp.ones(2), "steps": jnp.arange(2)}
    state = curvax.adahessian(0.1, update_interval=2).init(params)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(lambda p: jnp.sum(p["w"] ** 2))
    _, grads, diag = one_pass(params, state=state)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, diag, params)


def test_several_optimizers_are_named_by_path():
    tx = optax.partition(
        {"curvature": curvax.adahessian(0.1), "plain": curvax.adahessian(0.2)}, LABELS
    )
    params = coupled_params()
    one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"2 optimizers .* inner_states/curvature.*plain"):
        one_pass(params, batch_like(params), state=state)
    one_pass(params, batch_like(params), state=state.inner_states["plain"])


def test_a_state_without_curvature_is_refused():
    params = coupled_params()
    one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
    with pytest.raises(ValueError, match="holds no optimizer that keeps curvature"):
        one_pass(params, batch_like(params), state=optax.adam(0.1).init(params))


def test_a_traced_refresh_is_refused():
    params = coupled_params()
    one_pass = jax.jit(curvax.value_grad_and_hessian_diag_from_state(coupled_loss))
    state = curvax.adahessian(0.1).init(params)
    with pytest.raises(ValueError, match=r"refresh must be static.*static_argnames"):
        one_pass(params, batch_like(params), state=state, refresh=True)


def network(params, inputs):
    return jnp.tanh(inputs @ params["layers"][0]) * params["head"][1]


GAUSS_NEWTON = {
    "parameters": curvax.value_grad_and_ggn_diag,
    "outputs": curvax.value_grad_and_ggn_diag_from_outputs,
}


@pytest.mark.parametrize("wrt", GAUSS_NEWTON)
def test_gauss_newton_diagonals_read_key_and_interval_from_the_state(wrt):
    one_pass = GAUSS_NEWTON[wrt](network, "squared_error")
    adapted = jax.jit(curvax.from_state(one_pass), static_argnames="refresh")
    params, key = coupled_params(), jax.random.key(3)
    data = batch_like(params), jnp.ones((5, 2))
    tx = curvax.adahessian(0.1, update_interval=2, key=key)
    state = tx.init(params)
    expected = one_pass(params, *data, key=jax.random.fold_in(key, 0))
    chex.assert_trees_all_close(adapted(params, *data, state=state), expected, rtol=1e-5)
    _, state = tx.update(expected[1], state, params, hessian_diag=expected[2])
    value, grads, diag = adapted(params, *data, state=state)
    chex.assert_trees_all_close((value, grads), expected[:2], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(diag))
    assert adapted(params, *data, state=state, refresh=False)[2] is None


def test_a_one_pass_function_of_ones_own_needs_nothing_else():
    def one_pass(params, batch, *, key):
        value, grads = jax.value_and_grad(coupled_loss)(params, batch)
        return value, grads, jax.tree.map(jnp.square, grads)

    params = coupled_params()
    batch = batch_like(params)
    adapted = curvax.from_state(one_pass)
    state = curvax.adahessian(0.1).init(params)
    expected = one_pass(params, batch, key=None)
    chex.assert_trees_all_equal(adapted(params, batch, state=state), expected)
    skipped = adapted(params, batch, state=state, refresh=False)
    chex.assert_trees_all_equal(skipped, (*expected[:2], None))


@pytest.mark.parametrize("has_aux", [False, True])
def test_value_and_gradient_alone_are_those_of_the_one_pass(has_aux):
    def loss(params, batch):
        return (coupled_loss(params, batch), batch) if has_aux else coupled_loss(params, batch)

    params = coupled_params()
    batch = batch_like(params)
    one_pass = curvax.value_grad_and_hessian_diag(loss, has_aux=has_aux)
    whole = one_pass(params, batch, key=7)
    chex.assert_trees_all_close(one_pass.value_and_grad(params, batch), whole[:2], rtol=1e-5)
    chex.assert_trees_all_equal(whole, one_pass(params, batch, key=jax.random.key(7)))


@pytest.mark.parametrize("flag", [True, False, np.bool_(True), np.bool_(False)])
def test_a_numpy_bool_is_a_static_flag_too(flag):
    params = coupled_params()
    batch = batch_like(params)
    tx = curvax.adahessian(0.1)
    one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
    _, grads, diag = one_pass(params, batch, state=tx.init(params), refresh=flag)
    assert (diag is None) == (not flag)
    _, state = tx.update(grads, tx.init(params), params, hessian_diag=diag, refresh=flag)
    assert optax.tree.get(state, "refreshes") == int(flag)
