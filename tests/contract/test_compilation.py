"""A second call of each public callable compiles nothing: a new one joins as one row of `CALLS`.

Transformations have their own table, in test_transformations. Rows called eagerly are marked so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax import pruning, spectrum

from .meshes import make_mesh

INPUTS = jax.random.normal(jax.random.key(0), (16, 3))
TARGETS = jax.random.normal(jax.random.key(1), (16, 2))
PARAMS = {"kernel": jax.random.normal(jax.random.key(2), (3, 2)), "bias": jnp.zeros(2)}


def network(params, inputs):
    return jnp.tanh(inputs @ params["kernel"] + params["bias"])


def loss(params, inputs, targets):
    return jnp.mean((network(params, inputs) - targets) ** 2)


class Call(NamedTuple):
    """A public callable: made once, then called with params, data and a key."""

    name: str
    make: Callable[[], Callable[..., Any]]
    eager: bool = False


def from_state(one_pass):
    tx = curvax.adahessian(0.1, update_interval=2)
    state = tx.init(PARAMS)
    called = curvax.from_state(one_pass)
    return lambda params, inputs, targets, key: called(params, inputs, targets, state=state)


def with_key(one_pass):
    return lambda params, inputs, targets, key: one_pass(params, inputs, targets, key=key)


def diag(**options):
    return curvax.value_grad_and_hessian_diag(loss, **options)


def ggn(make):
    return make(network, "squared_error")


def with_estimate(estimate):
    return lambda p, x, y, key: estimate(loss, p, x, y, key=key, num_probes=4)


def of_operator(instrument, **options):
    return lambda p, x, y, key: instrument(
        spectrum.hessian_operator(loss, p, [(x, y)]), key=key, **options
    )


def with_ggn_operator(p, x, y, key):
    return spectrum.ggn_operator(network, "squared_error", p, [(x, y)])(p)


def with_fisher(p, x, y, key):
    return curvax.fisher_vp(network, "squared_error", p, p, x, y, empirical=True)


def with_gradients(p, x, y, key):
    return pruning.collect_gradients(loss, p, [(x[:8], y[:8]), (x[8:], y[8:])], 2)


def with_inverse(p, x, y, key):
    inverse = curvax.inverse_fisher(jax.tree.map(lambda leaf: leaf[None] + 1.0, p), 0.1)
    return inverse.solve(p), inverse.diagonal()


CALLS = (
    Call("hessian_diag", lambda: with_key(diag())),
    Call("hessian_diag-probes", lambda: with_key(diag(num_probes=3))),
    Call("hessian_diag-eager", lambda: with_key(diag(num_probes=3)), eager=True),
    Call("ggn_diag", lambda: with_key(ggn(curvax.value_grad_and_ggn_diag))),
    Call("ggn_outputs", lambda: with_key(ggn(curvax.value_grad_and_ggn_diag_from_outputs))),
    Call("from_state", lambda: from_state(diag())),
    Call("hvp", lambda: lambda p, x, y, key: curvax.hvp(loss, p, p, x, y)),
    Call("ggn_vp", lambda: lambda p, x, y, key: curvax.ggn_vp(network, "squared_error", p, p, x)),
    Call("random_probe", lambda: lambda p, x, y, key: curvax.random_probe(key, p), eager=True),
    Call("fisher_vp", lambda: with_fisher),
    Call("linearized_hvp", lambda: lambda p, x, y, key: curvax.linearized_hvp(loss, p, x, y)(p)),
    Call("estimate_diag", lambda: with_estimate(curvax.hessian_diag), eager=True),
    Call("estimate_trace", lambda: with_estimate(curvax.hessian_trace), eager=True),
    Call("trace", lambda: of_operator(spectrum.trace), eager=True),
    Call("hutch++", lambda: of_operator(spectrum.trace, method="hutch++"), eager=True),
    Call("top_eigenpairs", lambda: of_operator(spectrum.top_eigenpairs, k=2), eager=True),
    Call("density", lambda: of_operator(spectrum.spectral_density, order=4), eager=True),
    Call("ggn_operator", lambda: with_ggn_operator, eager=True),
    Call("ntk_gram", lambda: lambda p, x, y, key: spectrum.ntk_gram(network, p, x), eager=True),
    Call("ntk", lambda: lambda p, x, y, key: spectrum.ntk_eigenpairs(network, p, x, 2), eager=True),
    Call("gradients", lambda: with_gradients, eager=True),
    Call("inverse_fisher", lambda: with_inverse, eager=True),
)


@pytest.mark.parametrize("devices", ["one device", "a mesh"])
@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_a_second_call_compiles_nothing(call, devices, compilations):
    params, data = PARAMS, (INPUTS, TARGETS)
    if devices == "a mesh":
        mesh = make_mesh("automatic")
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        data = jax.device_put(data, jax.NamedSharding(mesh, jax.P("x")))
    fun = call.make() if call.eager else jax.jit(call.make())
    keys = [jax.random.key(seed) for seed in range(2)]
    moved = jax.tree.map(lambda leaf: leaf + 0.5, params)
    jax.block_until_ready(fun(params, *data, keys[0]))
    compilations()
    jax.block_until_ready(fun(moved, *data, keys[1]))
    assert not compilations()


@pytest.mark.parametrize("wrt", ["parameters", "outputs"])
def test_the_size_of_a_one_pass_function_does_not_depend_on_the_number_of_probes(wrt):
    make = {
        "parameters": lambda n: diag(num_probes=n),
        "outputs": lambda n: curvax.value_grad_and_ggn_diag_from_outputs(
            network, "squared_error", num_probes=n
        ),
    }[wrt]

    def equations(num_probes):
        traced = jax.make_jaxpr(with_key(make(num_probes)))(
            PARAMS, INPUTS, TARGETS, jax.random.key(0)
        )
        return len(traced.eqns)

    assert equations(2) == equations(500)
