"""Laplace approximations of one network by curvax, laplax and laplace-torch, on the same weights.

    PYTHONPATH=. python benchmarks/laplace_approximation.py
    PYTHONPATH=. python benchmarks/laplace_approximation.py --blocks 2 --output build

A classifier of digits with more parameters than rows (curvax then works in sample space) and a
regression with fewer, trained in JAX in float64. All have the whole Gauss-Newton matrix: the log
marginal likelihood, the covariance of the outputs on new inputs, and the posterior covariance of
the parameters, as relative differences from a dense matrix. Times are of the first two together,
repeated in one process in turn. curvax's functions are those of docs/uncertainty.md. A library that
is not installed is left out, and the table says so. The other two need
``pip install laplax laplace-torch``.
"""

import argparse
import importlib.util
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import curvax

ROOT = Path(__file__).parents[1]
PRECISION = 0.5
PACKAGES = {"laplax": "laplax", "laplace-torch": "laplace"}


class Problem(NamedTuple):
    """A trained network, its data, and inputs to predict for.

    Attributes:
      kind: ``"classification"`` or ``"regression"``.
      params: a list of layers with kernel and bias.
      noise: the standard deviation of a regression's noise; 1 for a classifier.
    """

    kind: str
    params: Any
    inputs: jax.Array
    targets: jax.Array
    new_inputs: jax.Array
    noise: float

    @property
    def log_likelihood(self) -> jax.Array:
        return -negative_log_likelihood(self)(network(self.params, self.inputs), self.targets)


class Moments(NamedTuple):
    """What is compared; the covariance of the parameters in the order of ``ravel_pytree``."""

    evidence: Any
    output_covariance: Any
    parameter_covariance: Any = None


def network(params: Any, inputs: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"]


def negative_log_likelihood(problem: Problem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The summed loss of the outputs of one example or of several."""
    if problem.kind == "classification":
        return lambda outputs, labels: jnp.sum(
            optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        )
    return lambda outputs, targets: (
        -jnp.sum(jax.scipy.stats.norm.logpdf(targets, outputs, problem.noise))
    )


def trained(problem: Problem, widths: tuple[int, ...], steps: int) -> Problem:
    rng = np.random.default_rng(0)
    params = [
        {
            "kernel": jnp.asarray(rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)),
            "bias": jnp.zeros(fan_out),
        }
        for fan_in, fan_out in itertools.pairwise(widths)
    ]
    likelihood, tx = negative_log_likelihood(problem), optax.adam(0.01)

    def objective(params: Any) -> jax.Array:
        squares = optax.tree.vdot(params, params)
        loss = likelihood(network(params, problem.inputs), problem.targets)
        return (loss + PRECISION / 2 * squares) / len(problem.inputs)

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state)
        return optax.apply_updates(params, updates), state

    run = jax.jit(lambda params: jax.lax.fori_loop(0, steps, step, (params, tx.init(params))))
    return problem._replace(params=run(params)[0])


def problems(steps: int) -> dict[str, Problem]:
    images, digits = load_digits(n_class=4, return_X_y=True)
    images, digits = jnp.asarray(images / 16), jnp.asarray(digits)
    classifier = Problem("classification", None, images[:200], digits[:200], images[200:250], 1.0)
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.standard_normal((350, 8)))
    means = jnp.stack([jnp.sin(inputs.sum(1)), inputs[:, 0] * inputs[:, 1]], axis=1)
    targets = means[:300] + 0.3 * rng.standard_normal((300, 2))
    regression = Problem("regression", None, inputs[:300], targets, inputs[300:], 0.3)
    return {
        "digits": trained(classifier, (64, 24, 4), steps),
        "regression": trained(regression, (8, 40, 2), steps),
    }


def dense(problem: Problem) -> Moments:
    """All from the d x d matrix."""
    vector, unflatten = ravel_pytree(problem.params)

    def jacobians(inputs: jax.Array) -> jax.Array:
        return jax.jit(jax.jacrev(lambda v: network(unflatten(v), inputs)))(vector)

    likelihood = negative_log_likelihood(problem)
    outputs = network(problem.params, problem.inputs)
    hessians = jax.vmap(jax.hessian(likelihood))(outputs, problem.targets)
    at_data, at_new = jacobians(problem.inputs), jacobians(problem.new_inputs)
    products = jnp.einsum("nce,nea->nca", hessians, at_data)
    matrix = jnp.tensordot(at_data, products, axes=((0, 1), (0, 1)))
    precision = matrix + PRECISION * jnp.eye(len(vector))
    evidence = problem.log_likelihood - PRECISION / 2 * vector @ vector
    logdet = jnp.linalg.slogdet(precision)[1]
    evidence += len(vector) / 2 * jnp.log(PRECISION) - logdet / 2
    covariance = jnp.linalg.inv(precision)
    of_outputs = jnp.einsum("nca,nea->nce", at_new @ covariance, at_new)
    return Moments(evidence, of_outputs, covariance)


# --- Contestants: a function that is timed, and the covariance of the parameters ---

Contestant = tuple[Callable[[], Moments], Callable[[], Any]]


def page() -> dict[str, Any]:
    """The functions of the page's block about the posterior."""
    text = (ROOT / "docs" / "uncertainty.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [block] = [block for block in blocks if "def posterior" in block]
    names: dict[str, Any] = {}
    exec("import functools, jax, optax, curvax\nimport jax.numpy as jnp\n" + block, names)
    return names


def by_curvax(problem: Problem) -> Contestant:
    recipe = page()
    is_classifier = problem.kind == "classification"
    loss = curvax.softmax_cross_entropy if is_classifier else curvax.squared_error

    def posterior(problem: Problem) -> Any:
        rows = recipe["gauss_newton_rows"](
            network, problem.params, problem.inputs, problem.targets, loss
        )
        return recipe["posterior"](rows, PRECISION, problem.noise)

    @jax.jit
    def moments(params: Any, inputs: jax.Array, targets: jax.Array, new: jax.Array) -> Moments:
        given = problem._replace(params=params, inputs=inputs, targets=targets)
        inverse, c = posterior(given)
        evidence = recipe["log_evidence"](given.log_likelihood, params, inverse, c, PRECISION)

        def of_example(x: jax.Array) -> jax.Array:
            jacobian = jax.jacrev(network)(params, x)
            solved = jax.vmap(inverse.solve)(jacobian)
            flat = [jax.vmap(lambda tree: ravel_pytree(tree)[0])(t) for t in (jacobian, solved)]
            return flat[0] @ flat[1].T / c

        return Moments(evidence, jax.vmap(of_example)(new))

    def covariance() -> Any:
        inverse, c = posterior(problem)
        vector, unflatten = ravel_pytree(problem.params)
        solve = jax.jit(jax.vmap(lambda v: ravel_pytree(inverse.solve(unflatten(v)))[0]))
        return solve(jnp.eye(len(vector))) / c

    data = problem.params, problem.inputs, problem.targets, problem.new_inputs
    return lambda: moments(*data), covariance


def by_laplax(problem: Problem) -> Contestant:
    from laplax.curv.cov import set_posterior_fn
    from laplax.curv.full import create_full_curvature
    from laplax.curv.ggn import create_ggn_mv
    from laplax.eval.likelihood import marginal_log_likelihood
    from laplax.eval.pushforward import lin_pred_cov, lin_setup, set_lin_pushforward

    likelihood = negative_log_likelihood(problem)
    # It multiplies the loss by 1 / (2 sigma).
    prior = {"prior_prec": PRECISION, "sigma": 0.5}

    def model(input: jax.Array, params: Any) -> jax.Array:  # noqa: A002, its argument's name
        return network(params, input)

    def curvature(params: Any, data: Any) -> jax.Array:
        product = create_ggn_mv(model, params, data, likelihood)
        return create_full_curvature(product, params)

    def posterior_of(matrix: jax.Array, params: Any) -> Any:
        return set_posterior_fn("full", matrix, layout=params)

    @jax.jit
    def moments(params: Any, inputs: jax.Array, targets: jax.Array, new: jax.Array) -> Moments:
        data = {"input": inputs, "target": targets}
        matrix = curvature(params, data)
        evidence = marginal_log_likelihood(
            matrix, prior, data, model, params, likelihood, "full", vmap_over_data=False
        )
        predict = set_lin_pushforward(
            model_fn=model,
            mean_params=params,
            posterior_fn=posterior_of(matrix, params),
            prior_arguments=prior,
            pushforward_fns=[lin_setup, lin_pred_cov],
        )
        return Moments(evidence, jax.vmap(lambda x: predict(x)["pred_cov"])(new))

    def covariance() -> Any:
        data = {"input": problem.inputs, "target": problem.targets}
        matrix = jax.jit(curvature)(problem.params, data)
        scale = posterior_of(matrix, problem.params)(prior).state["scale"]
        return scale @ scale.T

    data = problem.params, problem.inputs, problem.targets, problem.new_inputs
    return lambda: moments(*data), covariance


def by_laplace_torch(problem: Problem) -> Contestant:
    import torch
    from laplace import Laplace

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(timing.hardware()["cpu_cores"])
    layers: list[Any] = []
    for layer in problem.params:
        linear = torch.nn.Linear(*layer["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
            linear.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
        layers += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    inputs, targets, new = (
        torch.tensor(np.asarray(array))
        for array in (problem.inputs, problem.targets, problem.new_inputs)
    )
    data = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size=len(data))

    def fitted() -> Any:
        approximation = Laplace(
            model,
            problem.kind,
            subset_of_weights="all",
            hessian_structure="full",
            prior_precision=PRECISION,
            **({"sigma_noise": problem.noise} if problem.kind == "regression" else {}),
        )
        approximation.fit(loader)
        return approximation

    def moments() -> Moments:
        approximation = fitted()
        evidence = approximation.log_marginal_likelihood()
        covariance = approximation._glm_predictive_distribution(new)[1]
        return Moments(float(evidence), covariance.detach().numpy())

    def covariance() -> Any:
        # Its order: each layer's transposed kernel, then its bias.
        count = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        numbers = ravel_pytree(problem.params)[1](jnp.arange(float(count)))
        parts = [part for layer in numbers for part in (layer["kernel"].T, layer["bias"])]
        order = np.concatenate([np.ravel(part) for part in parts]).astype(int)
        ordered = np.empty((count, count))
        ordered[np.ix_(order, order)] = fitted().posterior_covariance.detach().numpy()
        return ordered

    return moments, covariance


CONTESTANTS = {"curvax": by_curvax, "laplax": by_laplax, "laplace-torch": by_laplace_torch}


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest entry."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def measure(problem: Problem, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    contestants = {name: CONTESTANTS[name](problem) for name in names}
    expected = dense(problem)
    rows = {}
    for name, (moments, covariance) in contestants.items():
        found = moments()
        rows[name] = {
            "evidence": difference(found.evidence, expected.evidence),
            "output_covariance": difference(found.output_covariance, expected.output_covariance),
            "parameter_covariance": difference(covariance(), expected.parameter_covariance),
        }
    loops = {name: timing.repeated(moments) for name, (moments, _) in contestants.items()}
    times = timing.time_loops(loops, seconds=args.seconds, cycle=1, blocks=args.blocks)
    timing.add_ratios(times, "curvax")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "examples": len(problem.inputs),
        "outputs": network(problem.params, problem.inputs).shape[1],
        "log_marginal_likelihood": float(expected.evidence),
        "libraries": {name: {**rows[name], **times[name]} for name in names},
    }


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"Measured on {results['name']} by `python benchmarks/laplace_approximation.py`, with "
        f"{versions}.",
        "",
        "Laplace approximations with the whole Gauss-Newton matrix, float64. The largest "
        "difference from a dense matrix, relative to its largest entry: of the log marginal "
        "likelihood, of the covariance of the outputs for 50 new inputs, and of that of the "
        "parameters. The time is of fitting, the likelihood and the outputs.",
        "",
        "| network | library | log marginal likelihood | outputs | parameters | ms | over curvax |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in results["cases"].items():
        size = f"{name}, {case['parameters']:,} parameters, {case['examples']} examples"
        for library, row in case["libraries"].items():
            lines.append(
                f"| {size}, {case['outputs']} outputs | {library} | {row['evidence']:.0e} "
                f"| {row['output_covariance']:.0e} | {row['parameter_covariance']:.0e} "
                f"| {1e3 * row['median_s']:.0f} | {row['ratio']:.2f} |"
            )
    if results["not_installed"]:
        lines += ["", f"Not installed: {', '.join(results['not_installed'])}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block")
    parser.add_argument("--blocks", type=int, default=5, help="turns of each library, at least 2")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    missing = [name for name, package in PACKAGES.items() if not importlib.util.find_spec(package)]
    for name in missing:
        print(f"{name} is not installed and is left out.")
    names = [name for name in CONTESTANTS if name not in missing]
    cases = {name: measure(problem, names, args) for name, problem in problems(args.steps).items()}
    results = {
        **timing.environment(("jax", "laplax", "laplace-torch", "torch")),
        "settings": {"steps": args.steps, "seconds": args.seconds, "blocks": args.blocks},
        "not_installed": missing,
        "cases": cases,
    }
    timing.write(results, table(results), "laplace_approximation", args.output)


if __name__ == "__main__":
    main()
