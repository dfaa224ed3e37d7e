"""A loss with a keyword that the function around it keeps for itself is refused, not misled."""

import functools

import jax
import jax.numpy as jnp
import pytest

import curvax

pytestmark = pytest.mark.oldest

KEY = jax.random.key(0)


def taking(name, *, keyword_only=True):
    """A loss that has a keyword of that name."""
    before = "*args" if keyword_only else "x=None"
    scope = {"jnp": jnp}
    exec(f"def loss(params, {before}, {name}=None): return jnp.sum(params**2)", scope)
    return scope["loss"]


X = jnp.ones(2)
OWNERS = {
    ("key",): lambda loss: curvax.value_grad_and_hessian_diag(loss),
    ("tangent",): lambda loss: curvax.value_grad_and_hvp(loss),
    ("has_aux", "mode"): lambda loss: curvax.hvp(loss, X, X),
    ("has_aux", "mode", "tangent"): lambda loss: curvax.linearized_hvp(loss, X),
    (
        "key",
        "num_probes",
        "probe_batch_size",
        "distribution",
        "method",
        "has_aux",
        "mode",
    ): lambda loss: curvax.hessian_trace(loss, X, key=KEY),
    ("key", "num_probes"): lambda loss: curvax.hessian_diag(loss, X, key=KEY),
    ("mode", "targets"): lambda loss: curvax.ggn_vp(loss, "squared_error", X, X, X),
    ("empirical",): lambda loss: curvax.fisher_vp(loss, "squared_error", X, X, X),
    ("state", "refresh"): lambda loss: curvax.value_grad_and_hessian_diag_from_state(loss),
    ("key", "targets"): lambda loss: curvax.value_grad_and_ggn_diag(loss, "squared_error"),
}
CASES = [(name, owner) for names, owner in OWNERS.items() for name in names]


@pytest.mark.parametrize("keyword_only", [True, False])
@pytest.mark.parametrize(("name", "owner"), CASES)
def test_a_reserved_keyword_is_refused_and_the_way_out_named(name, owner, keyword_only):
    with pytest.raises(ValueError, match=rf"the keyword {name} itself.*partial\(fun, {name}=...\)"):
        owner(taking(name, keyword_only=keyword_only))


def test_bound_renamed_and_positional_arguments_are_taken():
    def loss(params, key):
        return jnp.sum(params**2) * jax.random.uniform(key)

    one_pass = curvax.value_grad_and_hessian_diag(loss)
    direct = one_pass(X, jax.random.key(3), key=KEY)[0]  # the loss's own key, by position

    def with_keyword(params, *, key=None):
        return loss(params, key)

    bound = functools.partial(with_keyword, key=jax.random.key(3))
    assert curvax.value_grad_and_hessian_diag(bound)(X, key=KEY)[0] == direct
    renamed = curvax.value_grad_and_hessian_diag(
        lambda params, *, dropout_key: loss(params, dropout_key)
    )
    assert renamed(X, dropout_key=jax.random.key(3), key=KEY)[0] == direct
