"""An optimizer with curvature in a chain with one of Optax's line searches."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax
from tests.reference import batch_like, coupled_loss, coupled_params

pytestmark = pytest.mark.oldest

SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(15),
    "zoom": lambda: optax.scale_by_zoom_linesearch(15),
}


def curvature(feed, params, batch, state, loss):
    if feed == "obj_fn":
        return {"obj_fn": loss}
    one_pass = curvax.value_grad_and_hessian_diag_from_state(coupled_loss)
    diag = one_pass(params, batch, state=state)[2]
    return {"hessian_diag": diag, "refresh": True} if feed == "refresh" else {"hessian_diag": diag}


@pytest.mark.parametrize("feed", ["hessian_diag", "refresh", "obj_fn"])
@pytest.mark.parametrize("name", SEARCHES)
def test_each_step_of_the_chain_lowers_the_loss(name, feed):
    params, search = coupled_params(), SEARCHES[name]()
    batch = batch_like(params)
    tx = optax.chain(curvax.adahessian(1.0, b1=0.0), curvax.without_curvature(search))

    def loss(p):
        return coupled_loss(p, batch)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        extra = curvature(feed, params, batch, state, loss)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss, **extra
        )
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert optax.tree.get(state, "learning_rate") > 0
    assert jax.tree.structure(state[1]) == jax.tree.structure(search.init(params))


def test_further_arguments_of_the_function_reach_it():
    search = curvax.without_curvature(optax.scale_by_backtracking_linesearch(15))
    x = jnp.array([1.0, -2.0])

    def loss(x, scale):
        return scale * jnp.sum(x**2)

    value, grads = jax.value_and_grad(loss)(x, 3.0)
    updates, _ = search.update(
        -grads, search.init(x), x, value=value, grad=grads, value_fn=loss, scale=3.0,
        hessian_diag=x, refresh=None, obj_fn=None, unknown=1,
    )  # fmt: skip
    assert loss(x + updates, 3.0) < value
