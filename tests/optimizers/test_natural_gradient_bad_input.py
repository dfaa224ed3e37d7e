"""Each wrong argument of the natural gradient is one early sentence."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax
from curvax.optimizers import _batch_rows

PARAMS = {"w": jnp.ones((3, 2))}
INPUTS = jnp.ones((5, 3))


def network(params, inputs):
    return inputs @ params["w"]


def update(grads=None, params=PARAMS, options=None, **extra):
    tx = curvax.scale_by_natural_gradient(**(options or {}))
    return tx.update(grads, tx.init(PARAMS), params, **extra)


def of_outputs(outputs_fn=network, batch=(INPUTS,), **extra):
    return update(outputs_fn=outputs_fn, batch=batch, **extra)


def rows(number=5):
    return {"w": jnp.ones((number, 3, 2))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, r"damping must be a number in \(0"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ({"max_fisher_norm": 0}, r"max_fisher_norm must be a number in \(0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer of at least 1"),
        ({"matrix": "fisher"}, "matrix must be one of 'gauss_newton'"),
        ({"loss": "hinge"}, "loss must be one of"),
    ],
)
def test_an_option_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        curvax.scale_by_natural_gradient(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # The gradient of the mean in place of those of each example.
        (lambda: update({"w": jnp.ones((3, 2))}), r"gradients of each example, with leaves"),
        (lambda: update({"w": jnp.float32(1)}, params=None), "gradients of each example"),
        (lambda: update(rows(0)), "gradients of each example"),
        (lambda: update(rows(), cotangents=jnp.ones(4)), r"cotangents must have shape \(5,\)"),
        (lambda: update(rows(), cotangents=1j * jnp.ones(5)), "are real, so .* must be real"),
        (lambda: update(rows(), weights=jnp.zeros(5)), "weights must not all be zero"),
        (lambda: update(rows(), weights=-jnp.ones(5)), "weights must be finite and at least zero"),
        (lambda: of_outputs(batch=None), "outputs_fn needs params and batch"),
        (lambda: of_outputs(params=None), "outputs_fn needs params and batch"),
        (lambda: of_outputs(lambda p, x: jnp.mean(network(p, x))), "outputs of each example.*mean"),
        (lambda: of_outputs(lambda p, x: jnp.mean(network(p, x), 0)), r"of shape \(2,\)"),
        (lambda: of_outputs(lambda p, x: (network(p, x), 0)), "got tuple"),
        (lambda: of_outputs(batch=(INPUTS, jnp.ones(4))), "same number of examples"),
        (lambda: of_outputs(targets=jnp.ones((5, 1))), "targets must have the shape of the"),
        (lambda: of_outputs(cotangents=jnp.ones(5)), "cotangents must have the shape of the"),
        (lambda: of_outputs(weights=jnp.ones(4)), r"weights must have shape \(5,\)"),
        (
            lambda: of_outputs(options={"loss": "softmax_cross_entropy"}),
            "needs targets and real outputs .* and no targets",
        ),
    ],
)
def test_a_batch_that_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_params_with_holes_are_filled_inside_the_function():
    params = {**PARAMS, "b": jnp.zeros(2)}

    def with_bias(params, inputs):
        return network(params, inputs) + params["b"]

    tx = optax.masked(curvax.natural_gradient(0.1), {"w": True, "b": False})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"curvax\.merge_masked\(params, p\)"):
        tx.update(params, state, params, outputs_fn=with_bias, batch=(INPUTS,))
    updates, _ = tx.update(
        params,
        state,
        params,
        outputs_fn=lambda p, inputs: with_bias(curvax.merge_masked(params, p), inputs),
        batch=(INPUTS,),
    )
    assert (updates["b"] == params["b"]).all()
    assert (updates["w"] != params["w"]).all()


def test_more_rows_than_memory_say_how_many_bytes(monkeypatch):
    monkeypatch.setattr(_batch_rows, "local_memory", lambda: 2**30)
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    inputs = jax.ShapeDtypeStruct((512, 1000), jnp.float32)

    def step(params, inputs, micro_batch_size):
        tx = curvax.scale_by_natural_gradient(micro_batch_size=micro_batch_size)
        call = {"outputs_fn": lambda p, x: (x @ p["w"])[:, 0], "batch": (inputs,)}
        return tx.update(None, tx.init(params), params, **call)

    with pytest.raises(ValueError, match=r"2,048,000,000 bytes for rows .* set micro_batch_size"):
        jax.eval_shape(lambda p, x: step(p, x, None), params, inputs)
    jax.eval_shape(lambda p, x: step(p, x, 32), params, inputs)
