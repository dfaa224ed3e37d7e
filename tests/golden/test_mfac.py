"""The published dynamic M-FAC, update by update in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

pytestmark = pytest.mark.oldest

STREAMS = ("mfac_dynamic.npz", "mfac_dynamic_small_damping.npz")
TRAJECTORIES = ("mfac_optimizer.npz", "mfac_optimizer_plain.npz")


def load(name):
    with np.load(Path(__file__).parent / name) as data:
        return dict(data)


def assert_close(actual, expected):
    """To 1e-8 of the largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("density", [None, 1.0])
@pytest.mark.parametrize("name", STREAMS)
def test_every_update_and_every_product_equals_the_published(name, density):
    with jax.enable_x64(True):
        golden = load(name)
        tx = curvax.scale_by_mfac(int(golden["m"]), float(golden["damping"]), density=density)
        params = jnp.zeros(golden["grads"].shape[1])
        update, ihvp = jax.jit(tx.update), jax.jit(curvax.mfac_ihvp)
        state = tx.init(params)
        for t, grads in enumerate(golden["grads"]):
            updates, state = update(jnp.asarray(grads), state, params)
            assert_close(updates, golden["updates"][t])
            assert_close(ihvp(state, jnp.asarray(golden["vectors"][t])), golden["ihvps"][t])
        assert state.failures == 0


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_published_optimizer_is_a_chain_with_coupled_decay(name):
    with jax.enable_x64(True):
        golden = load(name)
        rate, factor = float(golden["lr"]), float(golden["lr_decay"])
        tx = optax.chain(
            optax.add_decayed_weights(float(golden["weight_decay"])),
            curvax.scale_by_mfac(
                int(golden["m"]), float(golden["damping"]), momentum=float(golden["momentum"])
            ),
            optax.scale_by_learning_rate(lambda count: rate * factor**count),
        )
        params = [jnp.asarray(golden[f"param0/{leaf}"]) for leaf in range(3)]
        update = jax.jit(tx.update)
        state = tx.init(params)
        steps = sum(key.endswith("/param/0") for key in golden)
        assert steps == 30
        for t in range(steps):
            grads = [jnp.asarray(golden[f"step{t}/grad/{leaf}"]) for leaf in range(3)]
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for leaf in range(3):
                assert_close(params[leaf], golden[f"step{t}/param/{leaf}"])
