"""Products of any vector with M-FAC's inverse Fisher matrix, from a state wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax

SIZE = 6
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx, optax.scale(-0.1)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "frozen": False}),
    "partition": lambda tx: optax.partition(
        {"mfac": tx, "adam": optax.adam(0.1)}, {"w": "mfac", "frozen": "adam"}
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def grads(seed):
    generator = np.random.default_rng(seed)
    return {"w": jnp.asarray(generator.standard_normal(SIZE)), "frozen": jnp.zeros(0)}


def vector_for(wrapper):
    vector = {"w": jnp.arange(1.0, SIZE + 1)}
    return vector if wrapper in ("masked", "partition") else {**vector, "frozen": jnp.zeros(0)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "options", [{}, {"density": 0.4}, {"window_scaling": "filled"}, {"window_scaling": "relative"}]
)
def test_it_solves_with_the_window_of_the_last_step(wrapper, options):
    with jax.enable_x64(True):
        tx = WRAPPERS[wrapper](curvax.scale_by_mfac(4, 0.3, **options))
        state, rows = tx.init(grads(0)), []
        for seed in range(6):
            before = np.zeros(SIZE) if seed == 0 else waiting(state)
            _, state = jax.jit(tx.update)(grads(seed), state, grads(0))
            rows.append(np.asarray(grads(seed)["w"]) + before - waiting(state))
        window = np.stack(rows[-4:])
        is_relative = options.get("window_scaling") == "relative"
        unit = np.mean(np.sum(window**2, axis=1)) / 4 if is_relative else 1.0
        fisher = 0.3 * unit * np.eye(SIZE) + window.T @ window / 4
        vector = vector_for(wrapper)
        product = curvax.mfac_ihvp(state, vector)
        np.testing.assert_allclose(product["w"], np.linalg.solve(fisher, vector["w"]), rtol=1e-9)


def waiting(state):
    """The error feedback of the one leaf, zeros for a dense window."""
    feedback = optax.tree.get(state, "feedback")
    return np.zeros(SIZE) if feedback is None else np.asarray(feedback["w"])


def test_before_the_first_step_it_is_the_vector_over_the_damping():
    state = curvax.mfac(num_grads=3, damping=0.25).init(jnp.ones(2))
    np.testing.assert_allclose(curvax.mfac_ihvp(state, jnp.array([1.0, -2.0])), [4.0, -8.0])


def test_the_newest_gradient_gives_the_update():
    tx = curvax.scale_by_mfac(3, 0.1)
    state = tx.init(jnp.zeros(SIZE))
    for seed in range(4):
        gradient = grads(seed)["w"].astype(jnp.float32)
        updates, state = tx.update(gradient, state)
    np.testing.assert_allclose(curvax.mfac_ihvp(state, gradient), updates, rtol=1e-4)


def test_the_state_is_found_inside_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, curvax.mfac(0.1, 4, 0.5), wrt=nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradient)
    product = curvax.mfac_ihvp(optimizer.opt_state, gradient)
    for leaf in jax.tree.leaves(product):
        np.testing.assert_allclose(leaf, 1 / (0.5 + 8 / 4), rtol=1e-5)  # 8 entries of one


def test_several_states_are_named_and_none_is_an_error():
    tx = optax.chain(curvax.scale_by_mfac(2), curvax.scale_by_mfac(3))
    with pytest.raises(ValueError, match=r"2 M-FAC optimizers, at 0, 1"):
        curvax.mfac_ihvp(tx.init(jnp.ones(2)), jnp.ones(2))
    with pytest.raises(ValueError, match="holds no M-FAC optimizer"):
        curvax.mfac_ihvp(optax.adam(0.1).init(jnp.ones(2)), jnp.ones(2))


def test_a_vector_that_does_not_match_is_an_error():
    state = curvax.mfac(num_grads=2).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="the vector must match params"):
        curvax.mfac_ihvp(state, {"a": jnp.ones(3)})
