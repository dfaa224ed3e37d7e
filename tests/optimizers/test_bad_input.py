"""Wrong input gets one clear sentence, early."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 must be a number in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be a number in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, r"eps must be a number in \(0, inf\], got 0.0"),
        ({"hessian_power": 1.5}, r"hessian_power must be a number in \[0, 1\], got 1.5"),
        ({"hessian_power": jnp.ones(2)}, "hessian_power must be a number"),
        ({"update_interval": 0}, "update_interval must be an integer of at least 1, got 0"),
        ({"update_interval": 2.5}, "update_interval must be an integer of at least 1"),
        ({"refresh_warmup": -1}, "refresh_warmup must be .* at least 0, got -1; pass the number"),
        ({"refresh_warmup": 2.0}, "refresh_warmup must be an integer of at least 0, got 2.0"),
        ({"key": 0.5}, r"key must be a PRNG key, such as jax.random.key\(0\), or an integer seed"),
        ({"mode": "backwards"}, "mode must be one of 'forward_over_reverse'"),
        ({"num_probes": 0}, "num_probes must be an integer of at least 1"),
        ({"distribution": "cauchy"}, "distribution must be one of 'rademacher', 'normal'"),
        ({"clip_threshold": 0.0}, r"clip_threshold must be a number in \(0, inf\]"),
        ({"b2": jnp.bfloat16(0.9)}, "hyperparam_dtype=jnp.float32"),
    ],
)
@pytest.mark.parametrize(
    "factory", [curvax.scale_by_adahessian, lambda **o: curvax.adahessian(0.1, **o)]
)
def test_a_hyperparameter_out_of_range_is_refused_at_construction(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)


def test_traced_hyperparameters_are_let_through():
    @jax.jit
    def init(b1, interval):
        tx = curvax.adahessian(0.1, b1=b1, update_interval=interval)
        return tx.init(jnp.ones(2))

    assert bool(optax.tree.get(init(0.9, 3), "due"))


def update(tx=None, params=None, grads=None, **extra):
    tx = curvax.adahessian(0.1) if tx is None else tx
    params = {"a": jnp.ones(2), "b": jnp.ones(3)} if params is None else params
    return tx.update(params if grads is None else grads, tx.init(params), params, **extra)


def test_a_missing_curvature_shows_the_line_to_add():
    with pytest.raises(ValueError, match=r"obj_fn=lambda p: loss_fn\(p, batch\)"):
        update()


def test_obj_fn_needs_params():
    tx = curvax.scale_by_adahessian()
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="obj_fn needs params"):
        tx.update(x, tx.init(x), obj_fn=lambda p: jnp.sum(p))


@pytest.mark.parametrize(
    ("diag", "message"),
    [
        ({"a": jnp.ones(2)}, r"at b it has no leaf, the gradient has shape \(3,\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(4)}, r"at b it has a leaf of shape \(4,\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}, "it has a leaf at c"),
    ],
)
def test_a_diagonal_that_does_not_match_is_named_by_path(diag, message):
    with pytest.raises(ValueError, match=message):
        update(hessian_diag=diag)


def test_a_loss_that_still_has_its_aux_is_refused():
    with pytest.raises(ValueError, match=r"lambda params: loss_fn\(params, batch\)\[0\]"):
        update(obj_fn=lambda p: (jnp.sum(p["a"]), {}))


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"real floating-point scalar, got shape \(2,\)"):
        update(obj_fn=lambda p: p["a"] ** 2)


def test_complex_params_are_refused_by_path():
    with pytest.raises(ValueError, match="real parameters, got complex64 at a"):
        curvax.adahessian(0.1).init({"a": jnp.ones(2, jnp.complex64)})


def test_a_traced_refresh_is_refused():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="refresh must be static"):
        update(hessian_diag=params, refresh=jnp.asarray(True))


@pytest.mark.parametrize("every_k", [0, 1.5])
def test_an_accumulation_over_no_count_is_refused(every_k):
    with pytest.raises(ValueError, match="every_k must be an integer of at least 1"):
        curvax.accumulate_hessian_diag(every_k)


def test_shardings_need_params_that_have_one():
    with pytest.raises(ValueError, match="leaves have a sharding"):
        curvax.state_shardings(curvax.adahessian(0.1), {"a": jax.ShapeDtypeStruct((2,), "float32")})
