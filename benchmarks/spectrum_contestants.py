"""The same spectrum, in JAX and in PyTorch: one network's Hessian through four libraries.

Each maker takes the weights and a batch, and returns what a task computes as a function to time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Weights = list[tuple[np.ndarray, np.ndarray]]  # kernel, bias of each layer
Task = Callable[[], dict[str, Any]]

TOP = 5
TOLERANCE = 1e-3
NUM_PROBES = 30
ORDER = 50


class Problem(NamedTuple):
    """A network of dense layers with tanh between, and the batch that its loss is of."""

    weights: Weights
    images: np.ndarray
    labels: np.ndarray


def loss_fn(params: Any, images: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def logits(params: Any, images: Any) -> jax.Array:
    hidden = images
    for kernel, bias in params[:-1]:
        hidden = jnp.tanh(hidden @ kernel + bias)
    kernel, bias = params[-1]
    return hidden @ kernel + bias


def curvax(problem: Problem) -> dict[str, Task]:
    from curvax import spectrum

    params = jax.tree.map(jnp.asarray, problem.weights)
    batch = jnp.asarray(problem.images), jnp.asarray(problem.labels)
    operator = spectrum.hessian_operator(loss_fn, params, [batch], check_deterministic=False)
    key = jax.random.key(0)

    def eigenvalues() -> dict[str, Any]:
        pairs = spectrum.top_eigenpairs(operator, TOP, key=key, tolerance=TOLERANCE)
        return {"values": pairs.values.tolist(), "products": int(pairs.num_matvecs)}

    def trace() -> dict[str, Any]:
        result = spectrum.trace(operator, key=key, num_probes=NUM_PROBES)
        return {"value": result.value, "standard_error": result.standard_error}

    def lanczos() -> dict[str, Any]:
        result = spectrum.lanczos(operator, operator.random_vector(key), ORDER)
        return {"values": result.eigh()[0][::-1][:TOP].tolist(), "products": ORDER}

    return {"eigenvalues": eigenvalues, "trace": trace, "lanczos": lanczos}


def matfree(problem: Problem) -> dict[str, Task]:
    from jax.flatten_util import ravel_pytree
    from matfree import decomp, eig, stochtrace

    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, problem.weights))
    batch = jnp.asarray(problem.images), jnp.asarray(problem.labels)

    def product(vector: jax.Array, flat: jax.Array, images: Any, labels: Any) -> jax.Array:
        gradient = jax.grad(lambda x: loss_fn(unravel(x), images, labels))
        return jax.jvp(gradient, (flat,), (vector,))[1]

    start = jax.random.normal(jax.random.key(0), flat.shape)
    largest = jax.jit(eig.eigh_partial(decomp.tridiag_sym(ORDER)), static_argnums=0)
    signs = stochtrace.sampler_signs(flat, num=NUM_PROBES)
    mean_and_error = jax.jit(
        stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), signs),
        static_argnums=0,
    )
    tridiagonal = jax.jit(decomp.tridiag_sym(ORDER), static_argnums=0)

    def eigenvalues() -> dict[str, Any]:
        values, vectors = largest(product, start, flat, *batch)
        jax.block_until_ready(vectors)
        return {"values": np.asarray(values)[::-1][:TOP].tolist(), "products": ORDER}

    def trace() -> dict[str, Any]:
        mean, error = mean_and_error(product, jax.random.key(0), flat, *batch)
        return {"value": float(mean), "standard_error": float(error)}

    def lanczos() -> dict[str, Any]:
        matrix = np.asarray(tridiagonal(product, start, flat, *batch).J_small)
        return {"values": np.linalg.eigvalsh(matrix)[::-1][:TOP].tolist(), "products": ORDER}

    return {"eigenvalues": eigenvalues, "trace": trace, "lanczos": lanczos}


def _torch_problem(problem: Problem) -> tuple[Any, Any, Any, Any]:
    import torch

    layers: list[Any] = []
    for kernel, bias in problem.weights:
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    images, labels = torch.from_numpy(problem.images), torch.from_numpy(problem.labels).long()
    return model, torch.nn.CrossEntropyLoss(), images, labels


def curvlinops(problem: Problem) -> dict[str, Task]:
    import torch
    from curvlinops import HessianLinearOperator, hutchinson_trace
    from scipy.sparse.linalg import LinearOperator, eigsh

    torch.manual_seed(0)
    model, criterion, images, labels = _torch_problem(problem)
    operator = HessianLinearOperator(
        model,
        criterion,
        list(model.parameters()),
        [(images, labels)],
        check_deterministic=False,
    )

    def eigenvalues() -> dict[str, Any]:
        inner = operator.to_scipy(np.float32)
        count = [0]

        def matvec(vector: np.ndarray) -> np.ndarray:
            count[0] += 1
            return inner.matvec(vector)

        counted = LinearOperator(shape=inner.shape, matvec=matvec, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(inner.shape[0]).astype(np.float32)
        values, _ = eigsh(counted, k=TOP, which="LA", tol=TOLERANCE, v0=start)
        return {"values": sorted(values.tolist(), reverse=True), "products": count[0]}

    def trace() -> dict[str, Any]:
        return {"value": float(hutchinson_trace(operator, NUM_PROBES))}

    return {"eigenvalues": eigenvalues, "trace": trace}


def pyhessian(problem: Problem) -> dict[str, Task]:
    import torch
    from pyhessian import hessian

    torch.manual_seed(0)
    model, criterion, images, labels = _torch_problem(problem)

    def operator() -> Any:
        return hessian(model, criterion, data=(images, labels), cuda=False)

    def eigenvalues() -> dict[str, Any]:
        values, _ = operator().eigenvalues(maxIter=200, tol=TOLERANCE, top_n=TOP)
        return {"values": values}

    def trace() -> dict[str, Any]:
        samples = operator().trace(maxIter=NUM_PROBES, tol=0.0)
        error = float(np.std(samples, ddof=1) / np.sqrt(len(samples)))
        return {"value": float(np.mean(samples)), "standard_error": error}

    return {"eigenvalues": eigenvalues, "trace": trace}


CONTESTANTS: dict[str, Callable[[Problem], dict[str, Task]]] = {
    "curvax": curvax,
    "matfree": matfree,
    "curvlinops": curvlinops,
    "PyHessian": pyhessian,
}
