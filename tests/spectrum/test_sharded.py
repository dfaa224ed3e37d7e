"""On a mesh of eight devices: the same values, vectors stay sharded, and nothing is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import spectrum
from curvax._trees import Differentiable
from curvax.curvature import _batch_mean, _operators
from curvax.spectrum import _basis, _lanczos
from tests.contract.collectives import collectives, largest_sum, moved

KEY = jax.random.key(0)
CAPACITY = 5
NUM_EXAMPLES, WIDTH, OUTPUTS = 20, 16, 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    axis_types = (getattr(jax.sharding.AxisType, request.param),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
    with jax.set_mesh(mesh):
        yield mesh


def loss_fn(params, inputs):
    """A pair of layers, the first split along its outputs and the second along its inputs."""
    hidden = jnp.tanh(inputs @ params["first"])
    if jax.typeof(hidden).sharding.mesh.are_all_axes_explicit:
        outputs = jax.lax.dot_general(
            hidden, params["second"], (((1,), (0,)), ((), ())), out_sharding=jax.P(None, None)
        )
    else:
        outputs = hidden @ params["second"]
    return jnp.mean(jnp.log(jnp.cosh(outputs)))


def make_params():
    first, second = (jax.random.normal(jax.random.key(i), (WIDTH, 16)) / 4 for i in (1, 2))
    return {"first": first, "second": second[:, :OUTPUTS]}


INPUTS = np.random.default_rng(0).standard_normal((NUM_EXAMPLES, WIDTH))


def shardings(mesh):
    specs = {"first": jax.P(None, "x"), "second": jax.P("x", None)}
    return {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}


def sharded(mesh, tree):
    return jax.device_put(tree, shardings(mesh))


def stays(mesh, tree):
    return all(
        leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        for leaf, wanted in zip(
            jax.tree.leaves(tree), jax.tree.leaves(shardings(mesh)), strict=True
        )
    )


def only_sums_of(compiled, size):
    """Whether the devices do nothing together but sum arrays of up to ``size``."""
    found = collectives(compiled)
    return not moved(found) and largest_sum(found) <= size


def compiled_product():
    return _operators._hessian_product(loss_fn, has_aux=False, mode="forward_over_reverse")


@pytest.mark.parametrize("stacked", [False, True])
def test_a_product_sums_activations_and_gathers_nothing(mesh, stacked):
    params = sharded(mesh, make_params())
    add = compiled_product().add
    leaves = jax.tree.leaves(params)
    vector = [jnp.stack([leaf, leaf]) for leaf in leaves] if stacked else leaves
    zeros = [jnp.zeros_like(leaf) for leaf in vector]
    arguments = (stacked, Differentiable.of(params), (INPUTS,), zeros, 1.0, vector)
    compiled = add.lower(*arguments).compile()
    assert collectives(compiled)  # the parameters are spread indeed
    assert only_sums_of(compiled, len(vector[0]) * NUM_EXAMPLES * WIDTH)


def test_a_linearized_product_gathers_nothing(mesh):
    params = sharded(mesh, make_params())
    product, part, leaves = compiled_product(), Differentiable.of(params), jax.tree.leaves(params)
    compiled = product.linearized.lower(part, (INPUTS,), leaves).compile()
    assert only_sums_of(compiled, NUM_EXAMPLES * WIDTH)
    linear = product.linearized(part, (INPUTS,), leaves)
    compiled = _batch_mean.add_linear.lower(False, linear, leaves, 1.0, leaves).compile()
    assert only_sums_of(compiled, NUM_EXAMPLES * WIDTH)


def test_random_vectors_are_spread_like_the_parameters(mesh):
    operator = spectrum.hessian_operator(loss_fn, sharded(mesh, make_params()), [INPUTS])
    vector = operator.random_vector(KEY)
    assert stays(mesh, vector)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        alone = spectrum.Operator(lambda v: v, jax.device_get(make_params())).random_vector(KEY)
    for name, leaf in vector.items():
        np.testing.assert_array_equal(leaf, alone[name])


@pytest.mark.parametrize("step", ["three terms", "orthogonalized", "put", "combined", "replaced"])
def test_a_lanczos_step_sums_scalars_and_coefficients_alone(mesh, step):
    vector = sharded(mesh, make_params())
    window = _basis.Basis(vector, CAPACITY)._window
    weights = jnp.ones((CAPACITY, 2))
    calls = {
        "three terms": (_lanczos._three_terms, (vector, vector, vector, 1.0)),
        "orthogonalized": (_basis._orthogonalized, (window, vector)),
        "put": (_basis._put, (window, vector, 1.0, 0)),
        "combined": (_basis._combined, (window, weights, vector)),
        "replaced": (_basis._replaced, (window, jax.tree.map(lambda x: x[jnp.newaxis], vector))),
    }
    kernel, arguments = calls[step]
    # Each leaf's dot products are summed by themselves, a few numbers together at most.
    assert only_sums_of(kernel.lower(*arguments).compile(), 4 * CAPACITY)


@pytest.mark.parametrize("reorthogonalize", ["full", "selective", "none"])
def test_lanczos_has_the_values_of_one_device(mesh, reorthogonalize):
    params = sharded(mesh, make_params())
    operator = spectrum.hessian_operator(loss_fn, params, [INPUTS])
    assert stays(mesh, operator(params))
    result = spectrum.lanczos(operator, params, 6, reorthogonalize=reorthogonalize)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        local = jax.device_get(make_params())
        one = spectrum.hessian_operator(loss_fn, local, [INPUTS])
        expected = spectrum.lanczos(one, local, 6, reorthogonalize=reorthogonalize)
    np.testing.assert_allclose(result.eigh()[0], expected.eigh()[0], atol=1e-10)


def test_eigenvectors_stay_sharded(mesh):
    operator = spectrum.hessian_operator(loss_fn, sharded(mesh, make_params()), [INPUTS])
    pairs = spectrum.top_eigenpairs(operator, 2, key=KEY, basis_size=8)
    for index, value in enumerate(pairs.values):
        vector = jax.tree.map(lambda leaf, i=index: leaf[i], pairs.vectors)
        assert stays(mesh, vector)
        image = operator(vector)
        for name, leaf in image.items():
            np.testing.assert_allclose(leaf, value * vector[name], atol=1e-5)
