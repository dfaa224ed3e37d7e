"""What is compiled for a loss: once, for that very loss, and gone with it."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import pruning, spectrum

pytestmark = pytest.mark.oldest

KEY = jax.random.key(0)
WEIGHTS = jnp.array([1.0, 2.0, 3.0])
INPUTS = jnp.ones((4, 3))

# What asks for a loss's curvature, each as a function of the loss and of a number to compare.
USES = {
    "hessian_trace": lambda loss: curvax.hessian_trace(loss, WEIGHTS, INPUTS, key=KEY).value,
    "exact trace": lambda loss: curvax.hessian_trace(loss, WEIGHTS, INPUTS, method="exact").value,
    "hessian_diag": lambda loss: curvax.hessian_diag(loss, WEIGHTS, INPUTS, key=KEY).value[0],
    "operator": lambda loss: spectrum.hessian_operator(loss, WEIGHTS, [INPUTS])(WEIGHTS)[0],
    "gradients": lambda loss: pruning.collect_gradients(loss, WEIGHTS, [INPUTS], 1)[0, 0],
}
NETWORK_USES = {
    "ntk_gram": lambda network: spectrum.ntk_gram(network, WEIGHTS[:, None], INPUTS)[0, 0],
    "ntk_eigenpairs": lambda network: spectrum.ntk_eigenpairs(
        network, WEIGHTS[:, None], INPUTS, 1
    ).values[0],
    "ggn_operator": lambda network: spectrum.ggn_operator(
        network, "squared_error", WEIGHTS[:, None], [(INPUTS, jnp.zeros((4, 1)))]
    )(WEIGHTS[:, None])[0, 0],
}


class Scaled:
    """A loss or network whose scale can change; its data are watched by weak references."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def loss(self, weights, inputs):
        return self.scale * jnp.mean((inputs @ weights) ** 2)

    def network(self, weights, inputs):
        return self.scale * (inputs @ weights)

    def __call__(self, weights, inputs):
        return self.loss(weights, inputs)


@pytest.mark.parametrize("name", [*USES, *NETWORK_USES])
def test_what_a_loss_closes_over_is_freed_with_it(name):
    use = USES.get(name) or NETWORK_USES[name]
    owner = Scaled()
    reference = weakref.ref(owner)
    method = Scaled.loss if name in USES else Scaled.network

    def function(weights, inputs, owner=owner):
        return method(owner, weights, inputs)

    use(function)
    del function, owner
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("name", [*USES, *NETWORK_USES])
def test_an_object_that_has_changed_gives_its_new_values(name):
    use = USES.get(name) or NETWORK_USES[name]
    owner = Scaled()
    method = "loss" if name in USES else "network"
    bound = functools.partial(getattr(owner, method))
    functions = [lambda: getattr(owner, method), lambda: bound]
    if name in USES:
        functions.append(lambda: owner)
    for function in functions:
        owner.scale = 1.0
        first = use(function())
        owner.scale = 3.0
        power = 1 if name in USES else 2  # a Jacobian enters the kernel twice
        np.testing.assert_allclose(use(function()), 3.0**power * first, rtol=1e-5)


class ByValue:
    """Compared by value, like a module of Linen: its methods are those of an equal object."""

    def __init__(self):
        self.traces, self.scale = [], 1.0

    def __eq__(self, other):
        return isinstance(other, ByValue) and self.scale == other.scale

    def __hash__(self):
        return hash(self.scale)

    def loss(self, weights, inputs):
        self.traces.append(1)
        return self.scale * jnp.mean((inputs @ weights) ** 2)


def test_methods_of_an_object_with_a_hash_by_value_are_compiled_once_until_it_changes():
    owner = ByValue()
    first, again = (USES["exact trace"](owner.loss) for _ in range(2))
    assert first == again
    assert len(owner.traces) == 1
    owner.scale = 2.0
    assert USES["exact trace"](owner.loss) == 2 * first


class Unhashable:
    """As a module with arrays is."""

    __hash__ = None

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, weights, inputs):
        return jnp.mean((inputs @ (self.scale * weights)) ** 2)


@pytest.mark.parametrize("name", USES)
def test_a_loss_without_a_hash_is_taken(name):
    reference = USES[name](lambda weights, inputs: jnp.mean((inputs @ weights) ** 2))
    np.testing.assert_allclose(USES[name](Unhashable(jnp.ones(3))), reference, rtol=1e-6)


COMPILATIONS = [0]


def count_compilation(event, _, **__):
    COMPILATIONS[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_compilation)


def study(loss):
    return spectrum.batch_size_study(loss, WEIGHTS, (INPUTS,), [2], key=KEY, num_draws=1)


@pytest.mark.parametrize("name", [*USES, *NETWORK_USES, "batch_size_study"])
def test_a_second_identical_call_compiles_nothing(name):
    use = {**USES, **NETWORK_USES, "batch_size_study": study}[name]
    method = Scaled.network if name in NETWORK_USES else Scaled.loss

    def function(weights, inputs):
        return method(Scaled(), weights, inputs)

    use(function)
    before = COMPILATIONS[0]
    use(function)
    assert COMPILATIONS[0] == before


def test_the_functions_of_an_output_loss_are_known_again():
    traces = []

    def example_loss(outputs, target):
        traces.append(1)
        return jnp.sum((outputs - target) ** 2)

    def network(weights, inputs):
        return inputs @ weights

    loss = curvax.convex_loss(example_loss)
    arguments = WEIGHTS[:, None], [(INPUTS, jnp.zeros((4, 1)))]
    spectrum.ggn_operator(network, loss, *arguments)
    count = len(traces)
    spectrum.ggn_operator(network, loss, *arguments)
    assert len(traces) == count


def test_bound_arguments_and_jitted_losses_are_compiled_once():
    traces = []

    def loss(weights, inputs, scale):
        traces.append(1)
        return scale * jnp.mean((inputs @ weights) ** 2)

    for function in (functools.partial(loss, scale=2.0), jax.jit(functools.partial(loss, scale=3))):
        traces.clear()
        for _ in range(2):
            USES["exact trace"](function)
        assert len(traces) == 1


def test_flags_of_a_loss_are_static_and_its_arrays_are_not():
    traces = []

    def loss(weights, scale, *, squared, shift=0.0):
        traces.append(1)
        power = 2 if squared else 4
        return scale * jnp.sum((weights + shift) ** power)

    def trace(*args, **kwargs):
        return float(curvax.hessian_trace(loss, WEIGHTS, *args, method="exact", **kwargs).value)

    assert trace(jnp.float32(1.0), squared=True) == 6
    assert trace(jnp.float32(2.0), squared=True) == 12
    assert len(traces) == 1
    assert trace(jnp.float32(1.0), squared=False) == 12 * (1 + 4 + 9)
    assert trace(1, squared=False) == trace(1.0, squared=False) == trace(True, squared=False)
