"""A module with functions among its leaves, as of Equinox: the error says how to split it."""

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax import influence, pruning, spectrum

MODULE = {"kernel": jnp.ones((2, 1)), "activation": jnp.tanh}
INPUTS, TARGETS = jnp.ones((16, 2)), jnp.ones((16, 1))
KEY = jax.random.key(0)


def network(params, inputs):
    return params["activation"](inputs @ params["kernel"])


def loss(params, inputs, targets):
    return jnp.mean((network(params, inputs) - targets) ** 2)


def one_pass(make, *of):
    return lambda params: make(*of)(params, INPUTS, TARGETS, key=KEY)


def of_loss(function):
    return lambda params: function(loss, params, [(INPUTS, TARGETS)])


OUTPUTS = (network, "squared_error")
CALLS = {
    "adahessian": lambda params: curvax.adahessian(0.1).init(params),
    "mfac": lambda params: curvax.mfac(0.1, 4).init(params),
    "mfac, sparse": lambda params: curvax.mfac(0.1, 4, density=0.5).init(params),
    "natural_gradient": lambda params: curvax.natural_gradient(0.1).init(params),
    "state_bytes": lambda params: curvax.state_bytes(curvax.mfac(0.1, 4), params),
    "track_sharpness": lambda params: spectrum.track_sharpness(0.1).init(params),
    "prune_on_schedule": lambda params: pruning.prune_on_schedule(
        lambda step: 0.5, curvax.adahessian(0.1)
    ).init(params),
    "averaging_table": lambda params: curvax.averaging_table(params, "row"),
    "random_probe": lambda params: curvax.random_probe(KEY, params),
    "value_grad_and_hvp": lambda params: curvax.value_grad_and_hvp(loss)(
        params, params, INPUTS, TARGETS
    ),
    "hvp": lambda params: curvax.hvp(loss, params, params, INPUTS, TARGETS),
    "linearized_hvp": lambda params: curvax.linearized_hvp(loss, params, INPUTS, TARGETS),
    "ggn_vp": lambda params: curvax.ggn_vp(*OUTPUTS, params, params, INPUTS),
    "fisher_vp": lambda params: curvax.fisher_vp(*OUTPUTS, params, params, INPUTS, key=KEY),
    "hessian diagonal": one_pass(curvax.value_grad_and_hessian_diag, loss),
    "GGN diagonal": one_pass(curvax.value_grad_and_ggn_diag, *OUTPUTS),
    "GGN diagonal from outputs": one_pass(curvax.value_grad_and_ggn_diag_from_outputs, *OUTPUTS),
    "hessian_diag": lambda params: curvax.hessian_diag(loss, params, INPUTS, TARGETS, key=KEY),
    "hessian_trace": lambda params: curvax.hessian_trace(loss, params, INPUTS, TARGETS, key=KEY),
    "hessian_operator": of_loss(spectrum.hessian_operator),
    "ggn_operator": lambda params: spectrum.ggn_operator(*OUTPUTS, params, [(INPUTS, TARGETS)]),
    "ntk_gram": lambda params: spectrum.ntk_gram(network, params, INPUTS),
    "example_projections": lambda params: spectrum.example_projections(
        loss, params, (INPUTS, TARGETS), jnp.eye(2)
    ),
    "loss_along": lambda params: spectrum.loss_along(loss, [params, params], [(INPUTS, TARGETS)]),
    "collect_gradients": lambda params: pruning.collect_gradients(
        loss, params, [(INPUTS, TARGETS)], 1
    ),
    "prune_one_shot": lambda params: pruning.prune_one_shot(
        loss, params, [(INPUTS, TARGETS)] * 16, 0.5
    ),
    "ggn_influence": lambda params: influence.ggn_influence(*OUTPUTS, params, (INPUTS, TARGETS)),
    "prune": lambda params: pruning.prune(params, None, 0.5, method="magnitude"),
}


@pytest.mark.parametrize("name", CALLS)
def test_they_are_one_sentence(name):
    with pytest.raises(ValueError, match=r"only arrays, got .*eqx\.partition\(model"):
        CALLS[name](MODULE)
