"""A user's program, checked by mypy and pyright, not run: what it may say, and what it may not."""

from collections.abc import Iterator
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax import influence, pruning, spectrum

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]


def network(params: Params, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["kernel"]) + params["bias"]


def network_with_aux(params: Params, inputs: jax.Array) -> tuple[jax.Array, int]:
    return network(params, inputs), len(inputs)


def loss_fn(params: Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    logits = network(params, inputs)
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def loss_with_aux(params: Params, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Params]:
    return loss_fn(params, inputs, labels), params


def batches() -> Iterator[Batch]:
    for seed in range(4):
        inputs = jax.random.normal(jax.random.key(seed), (8, 4))
        yield inputs, jnp.argmax(inputs, axis=1)


def initial_params() -> Params:
    return {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}


def train_with_adahessian(params: Params) -> Params:
    tx = curvax.adahessian(
        optax.cosine_decay_schedule(0.1, 100),
        b1=0.9,
        averaging="row",
        layout={"embedding": "OI", "scale": None},
        update_interval=10,
        refresh_warmup=5,
        distribution="normal",
        mode="reverse_over_reverse",
        key=0,
        clip_threshold=None,
        weight_decay=1e-4,
    )
    one_pass = curvax.value_grad_and_hessian_diag_from_state(loss_fn, num_probes=2)
    state = tx.init(params)
    for step, (inputs, labels) in enumerate(batches()):
        due = assert_type(curvax.refresh_due(step, 10, 5), bool)
        loss, grads, diag = one_pass(params, inputs, labels, state=state)
        assert_type(loss, jax.Array)
        assert_type(grads, Params)
        assert_type(diag, Params)
        _, _, perhaps = one_pass(params, inputs, labels, state=state, refresh=due)
        assert_type(perhaps, Params | None)
        updates, state = tx.update(grads, state, params, hessian_diag=diag)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def averaging_rule(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) if "kernel" in path and len(shape) == 2 else ()


def choices() -> None:
    curvax.adahessian(0.1, averaging=averaging_rule)
    curvax.adahessian(0.1, averaging="rows")  # type: ignore[arg-type]
    curvax.adahessian(0.1, layout="flux")  # type: ignore[arg-type]
    curvax.adahessian(0.1, mode="forward")  # type: ignore[arg-type]
    curvax.mfac(0.1, window_scaling="full")  # type: ignore[arg-type]
    curvax.mfac(0.1, window_dtype="float16")  # type: ignore[arg-type]
    curvax.mfac(0.1, window_dtype=jnp.bfloat16)
    curvax.ggn_vp(network, "mse", {}, {}, jnp.ones(2))  # type: ignore[arg-type]
    curvax.random_probe(0, jnp.ones(2), "gaussian")  # type: ignore[arg-type]
    curvax.inverse_fisher(jnp.ones((2, 3)), block_scope="layer")  # type: ignore[arg-type]


def one_pass_functions(params: Params, inputs: jax.Array, labels: jax.Array) -> None:
    product_at = curvax.value_grad_and_hvp(loss_fn)
    value, grads, product = product_at(params, params, inputs, labels)
    assert_type(value, jax.Array)
    assert_type(grads, Params)
    assert_type(product, Params)
    product_at(params, params, inputs)  # type: ignore[call-arg]
    product_at(params, inputs, inputs, labels)  # type: ignore[arg-type]

    with_aux = curvax.value_grad_and_hessian_diag(loss_with_aux, has_aux=True)
    (value, aux), grads, diag = with_aux(params, inputs, labels, key=0)
    assert_type(aux, Params)
    assert_type(diag, Params)
    assert_type(with_aux.value_and_grad(params, inputs, labels)[1], Params)
    with_aux(params, inputs, labels)  # type: ignore[call-arg]

    ggn = curvax.value_grad_and_ggn_diag_from_outputs(network, "softmax_cross_entropy")
    value, grads, diag = ggn(params, inputs, labels, key=jax.random.key(0))
    assert_type(value, jax.Array)
    assert_type(diag, Params)
    ggn_with_aux = curvax.value_grad_and_ggn_diag(
        network_with_aux, curvax.softmax_cross_entropy, has_aux=True
    )
    curvax.value_grad_and_ggn_diag(lambda p, x: network(p, x), "squared_error")
    curvax.value_grad_and_ggn_diag(network, "squared_error", has_aux=True)  # type: ignore[call-overload]
    from_state = curvax.from_state(ggn_with_aux)
    state = curvax.adahessian(0.1).init(params)
    (value, size), grads, diag = from_state(params, inputs, labels, state=state)
    assert_type(size, int)
    assert_type(diag, Params)


def products_and_estimates(params: Params, inputs: jax.Array, labels: jax.Array) -> None:
    assert_type(curvax.hvp(loss_fn, params, params, inputs, labels), Params)
    assert_type(curvax.linearized_hvp(loss_fn, params, inputs, labels)(params), Params)
    weighted = curvax.WeightedTargets(labels, jnp.ones(8))
    loss = curvax.convex_loss(lambda outputs, target: jnp.sum(jnp.exp(outputs) - target * outputs))
    assert_type(curvax.ggn_vp(network, loss, params, params, inputs, weighted), Params)
    assert_type(curvax.fisher_vp(network, "squared_error", params, params, inputs), Params)
    estimate = curvax.hessian_diag(loss_fn, params, inputs, labels, key=0)
    assert_type(estimate.standard_error, Params)
    trace = curvax.hessian_trace(loss_fn, params, inputs, labels, method="exact")
    assert_type(trace.per_leaf, Params)
    assert_type(curvax.random_probe(0, params), Params)
    assert_type(curvax.hvp(lambda x: jnp.sum(x**2), jnp.ones(2), jnp.ones(2)), jax.Array)


def train_with_mfac(params: Params) -> Params:
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        curvax.mfac(0.05, num_grads=4, damping=1e-3, window_scaling="filled", density=0.1),
    )
    state = tx.init(params)
    for inputs, labels in batches():
        grads = jax.grad(loss_fn)(params, inputs, labels)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert_type(curvax.mfac_ihvp(state, params), Params)
    assert_type(curvax.state_bytes(tx, params), int)
    inverse = curvax.inverse_fisher({"w": jnp.ones((3, 4))}, 1e-3, block_size=2, block_scope="leaf")
    assert_type(inverse.solve(params), Params)
    assert_type(inverse.element(0, 1), jax.Array)
    return params


def take_gauss_newton_steps(params: Params) -> Params:
    tx = curvax.natural_gradient(0.5, 1e-3, matrix="improved_empirical_fisher", momentum=0.5)
    curvax.natural_gradient(0.5, matrix="fisher")  # type: ignore[arg-type]
    inputs, targets = jnp.ones((4, 4)), jnp.ones((4, 2))
    updates, _ = tx.update(
        params, tx.init(params), params, outputs_fn=network, batch=(inputs,), targets=targets
    )
    function = influence.ggn_influence(network, "squared_error", params, (inputs, targets))
    scores = function.scores((inputs, targets))
    assert_type(scores, influence.InfluenceScores)
    assert_type(function.self_influence().top(2), np.ndarray)
    del updates
    return params


def look_at_the_spectrum(params: Params) -> float:
    operator = spectrum.hessian_operator(loss_fn, params, list(batches()))
    assert_type(operator(params), Params)
    pairs = spectrum.top_eigenpairs(operator, 2, key=0, which="magnitude")
    density = spectrum.spectral_density(operator, key=1, order=8, reorthogonalize="selective")
    axes = spectrum.plot_density(density, outliers=pairs.values)
    axes.set_title("Hessian")
    trace = spectrum.trace(operator, key=2, method="hutch++")
    state = optax.adam(0.1).init(params)
    root = spectrum.adam_inverse_root(state, params)
    assert_type(root, Params)
    scaled = spectrum.preconditioned(operator, root)
    largest = spectrum.top_eigenpairs(scaled, 1, key=3).values[0]
    spectrum.top_eigenpairs(operator, 1, key=0, which="top")  # type: ignore[arg-type]
    kernel = spectrum.ntk_eigenpairs(network, params, jnp.ones((2, 4)), 1)
    assert_type(kernel.parameter_vectors, Params)
    return float(largest) + float(np.sum(trace.samples))


def prune_and_fine_tune(params: Params) -> Params:
    grads = pruning.collect_gradients(loss_fn, params, batches(), 4, storage="host")
    assert_type(grads, Params)
    result = pruning.prune(params, grads, 0.5, method="greedy", block_size=16)
    assert_type(result.params, Params)
    assert_type(result.mask, Params)
    pruning.prune(params, grads, 0.5, method="woodfisher")  # type: ignore[arg-type]

    def fine_tune(params: Params, mask: Params) -> Params:
        tx = pruning.keep_pruned(mask, curvax.adahessian(0.1, averaging="none"))
        del tx
        return params

    gradual = pruning.prune_gradually(
        loss_fn,
        params,
        list(batches()),
        pruning.polynomial_sparsities(0.0, 0.8, 3),
        fine_tune,
        method="obs",
        update="independent",
        distribution="uniform",
        structure=pruning.NM(2, 4),
        num_grads=4,
    )
    pruning.prune_one_shot(
        loss_fn,
        params,
        list(batches()),
        0.5,
        distribution="tree",  # type: ignore[arg-type]
    )
    print(gradual.table())
    return gradual.params


def shardings(params: Params) -> None:
    tx = curvax.adahessian(0.1)
    targets = curvax.state_shardings(tx, params)
    jax.jit(tx.init, out_shardings=targets)(params)
    assert_type(curvax.merge_masked(params, {"kernel": params["kernel"]}), Params)
