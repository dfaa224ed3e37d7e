"""One pass of an NNX model: that of its pure loss, and the model changes as by one call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax

INPUTS = jax.random.normal(jax.random.key(0), (8, 3))
TARGETS = jnp.sin(INPUTS[:, :2])
KEY = jax.random.key(1)


class Network(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def loss_fn(model, inputs, targets):
    return jnp.mean((model(inputs) - targets) ** 2)


def from_outputs(network, loss, **options):
    return curvax.from_state(curvax.value_grad_and_ggn_diag_from_outputs(network, loss, **options))


def plain(tree):
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        plain(actual),
        plain(expected),
    )


def test_value_gradient_and_diagonal_are_those_of_the_pure_loss():
    model = Network()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def pure_loss(params):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), INPUTS, TARGETS)

    expected = curvax.value_grad_and_hessian_diag(pure_loss)(params, key=KEY)
    one_pass = curvax.for_nnx(curvax.value_grad_and_hessian_diag, loss_fn)
    for actual, wanted in zip(one_pass(model, INPUTS, TARGETS, key=KEY), expected, strict=True):
        assert_trees_close(actual, wanted)


def test_the_model_changes_as_by_one_call():
    model, called = Network(), Network()
    called(INPUTS)
    curvax.for_nnx(curvax.value_grad_and_hessian_diag, loss_fn)(model, INPUTS, TARGETS, key=KEY)
    other = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))
    assert_trees_close(nnx.state(model, other), nnx.state(called, other))
    assert model.dropout.rngs.count[...] == 1


def test_aux_comes_back_beside_the_value():
    def with_outputs(model, inputs, targets):
        outputs = model(inputs)
        return jnp.mean((outputs - targets) ** 2), outputs

    one_pass = curvax.for_nnx(
        curvax.value_grad_and_hessian_diag, with_outputs, has_aux=True, num_probes=2
    )
    (value, outputs), _, _ = one_pass(Network(), INPUTS, TARGETS, key=KEY)
    np.testing.assert_allclose(jnp.mean((outputs - TARGETS) ** 2), value, rtol=1e-6)


@pytest.mark.parametrize("refresh", [None, True, False])
@pytest.mark.parametrize("kind", ["hessian", "outputs"])
def test_it_trains_under_nnx_jit(kind, refresh):
    model = Network()
    tx = optax.chain(optax.clip_by_global_norm(1.0), curvax.adahessian(0.1, update_interval=2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    if kind == "hessian":
        one_pass = curvax.for_nnx(curvax.value_grad_and_hessian_diag_from_state, loss_fn)
    else:
        one_pass = curvax.for_nnx(from_outputs, Network.__call__, "squared_error")

    @nnx.jit(static_argnames="refresh")
    def step(model, optimizer, refresh):
        loss, grads, diag = one_pass(
            model, INPUTS, TARGETS, state=optimizer.opt_state, refresh=refresh
        )
        optimizer.update(model, grads, hessian_diag=diag, refresh=refresh)
        return loss

    step(model, optimizer, True)
    before = nnx.to_pure_dict(nnx.state(model))
    loss = step(model, optimizer, refresh)
    assert jnp.isfinite(loss)
    assert model.dropout.rngs.count[...] == 2
    assert not jnp.array_equal(before["norm"]["mean"], model.norm.mean[...])
    assert not jnp.array_equal(before["out"]["kernel"], model.out.kernel[...])


def test_only_the_filtered_variables_are_differentiated():
    model = nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0))
    one_pass = curvax.for_nnx(curvax.value_grad_and_hessian_diag, loss_fn, wrt=nnx.LoRAParam)
    _, grads, diag = one_pass(model, INPUTS, TARGETS, key=KEY)
    trained = nnx.state(model, nnx.LoRAParam)
    assert jax.tree.structure(grads) == jax.tree.structure(diag) == jax.tree.structure(trained)


def test_a_tree_of_arrays_is_refused():
    one_pass = curvax.for_nnx(curvax.value_grad_and_hessian_diag, loss_fn)
    with pytest.raises(ValueError, match="must be an NNX module, got <class 'dict'>"):
        one_pass({"kernel": INPUTS}, INPUTS, TARGETS, key=KEY)
