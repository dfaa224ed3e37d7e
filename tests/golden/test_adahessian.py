"""The published AdaHessian, step by step in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

FILES = ("adahessian_image_k1.npz", "adahessian_image_k05.npz")
NAMES = tuple(
    f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weight", "bias")
)


@pytest.fixture(params=FILES)
def golden(request):
    with np.load(Path(__file__).parent / request.param) as data:
        return dict(data)


def tree(golden, prefix):
    return {name: jnp.asarray(golden[f"{prefix}/{name}"]) for name in NAMES}


def optimizer(golden):
    b1, b2 = golden["hp/betas"]
    return curvax.adahessian(
        float(golden["hp/lr"]),
        b1=float(b1),
        b2=float(b2),
        eps=float(golden["hp/eps"]),
        hessian_power=float(golden["hp/hessian_power"]),
        weight_decay=float(golden["hp/weight_decay"]),
        clip_threshold=None,
    )


def network(params, x):
    def conv(inputs, name, stride):
        outputs = jax.lax.conv_general_dilated(
            inputs,
            params[f"{name}.weight"],
            window_strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(outputs + params[f"{name}.bias"])

    hidden = conv(conv(x, "conv1", 1), "conv2", 2)
    flat = hidden.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as published
    hidden = jnp.tanh(flat @ params["fc1.weight"] + params["fc1.bias"])
    return hidden @ params["fc2.weight"] + params["fc2.bias"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def assert_equal(actual, expected):
    for name in NAMES:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-12, err_msg=name)


def test_recorded_diagonals_reproduce_the_published_trajectory(golden):
    with jax.enable_x64(True):
        tx = optimizer(golden)
        update = jax.jit(tx.update)
        params = tree(golden, "param0")
        state = tx.init(params)
        for t in range(int(golden["steps"])):
            diag = tree(golden, f"step{t}/zhz")
            updates, state = update(tree(golden, f"step{t}/grad"), state, params, hessian_diag=diag)
            params = optax.apply_updates(params, updates)
            assert_equal(params, tree(golden, f"step{t}/param"))


def test_recorded_probes_network_and_data_reproduce_the_published_trajectory(golden):
    with jax.enable_x64(True):
        tx = optimizer(golden)
        one_pass = jax.jit(curvax.value_grad_and_hvp(loss_fn))
        update = jax.jit(tx.update)
        params = tree(golden, "param0")
        state = tx.init(params)
        for t in range(int(golden["steps"])):
            x, y = golden[f"step{t}/x"], golden[f"step{t}/y"]
            probe = tree(golden, f"step{t}/z")
            value, grads, product = one_pass(params, probe, x, y)
            np.testing.assert_allclose(value, golden[f"step{t}/loss"], rtol=0, atol=1e-12)
            assert_equal(grads, tree(golden, f"step{t}/grad"))
            diag = jax.tree.map(jnp.multiply, probe, product)
            assert_equal(diag, tree(golden, f"step{t}/zhz"))
            updates, state = update(grads, state, params, hessian_diag=diag)
            params = optax.apply_updates(params, updates)
            assert_equal(params, tree(golden, f"step{t}/param"))
