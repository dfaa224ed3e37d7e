"""A compiled step of M-FAC writes its row in place; XLA of the oldest JAX does not always."""

import jax
import jax.numpy as jnp

import curvax


def test_the_window_is_updated_in_place_and_never_copied():
    params = {"kernel": jnp.zeros((64, 32)), "image": jnp.zeros((3, 3, 4, 8))}
    for options in (
        {},
        {"window_dtype": "bfloat16"},
        {"density": 0.05},
        {"density": 0.5, "window_dtype": "bfloat16"},
    ):
        tx = curvax.scale_by_mfac(num_grads=256, **options)
        state = tx.init(params)
        window = sum(leaf.nbytes for leaf in jax.tree.leaves(state.window))
        update = jax.jit(tx.update, donate_argnums=1)
        memory = update.lower(params, state).compile().memory_analysis()
        matrix = state.gram.nbytes
        assert memory.alias_size_in_bytes >= window + matrix
        assert memory.temp_size_in_bytes < max(0.6 * window, 8 * matrix)
