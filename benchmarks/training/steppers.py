"""The ways in which a training step is taken: what an optimizer needs beside the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import curvax
from training.tasks.task import Batch, Task, Variables

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]
Transformation = optax.GradientTransformationExtraArgs


class Stepper(NamedTuple):
    """An optimizer on a task.

    Attributes:
      init: ``params -> state``.
      step: ``(variables, state, batch, key, refresh) -> (variables, state, loss)``; ``refresh`` is
        static: whether curvature is due, or None to follow the state.
      due: ``step -> refresh``, where the host decides.
    """

    init: Callable[[PyTree], PyTree]
    step: Callable[..., tuple[Variables, PyTree, jax.Array]]
    due: Callable[[int], bool | None] = lambda _: None


def first_order(task: Task, tx: Transformation) -> Stepper:
    """The gradient alone."""

    def step(variables: Variables, state: PyTree, batch: Batch, key: jax.Array, _: Any) -> Any:
        params, statistics = variables
        value_and_grad = jax.value_and_grad(task.mean_loss, has_aux=True)
        (loss, statistics), grads = value_and_grad(params, *batch, statistics, key)
        updates, state = tx.update(grads, state, params)
        return Variables(optax.apply_updates(params, updates), statistics), state, loss

    return Stepper(tx.init, step)


def with_function(task: Task, tx: Transformation) -> Stepper:
    """The gradient, and the loss of the batch as ``obj_fn``, as Optax's Sophia takes it."""

    def step(variables: Variables, state: PyTree, batch: Batch, key: jax.Array, _: Any) -> Any:
        params, statistics = variables
        value_and_grad = jax.value_and_grad(task.mean_loss, has_aux=True)
        (loss, changed), grads = value_and_grad(params, *batch, statistics, key)

        def obj_fn(params: PyTree) -> jax.Array:
            return task.mean_loss(params, *batch, statistics, key)[0]

        updates, state = tx.update(grads, state, params, obj_fn=obj_fn)
        return Variables(optax.apply_updates(params, updates), changed), state, loss

    return Stepper(tx.init, step)


def with_hessian_diag(
    task: Task,
    tx: Transformation,
    interval: int = 1,
    warmup: int = 0,
    *,
    radius: float = 0.0,
    num_probes: int = 1,
) -> Stepper:
    """Gradient and Hessian diagonal in one pass.

    With a ``radius`` both are taken at the sharpness-aware point, that far up the gradient.
    """
    one_pass = curvax.from_state(
        curvax.value_grad_and_hessian_diag(task.mean_loss, has_aux=True, num_probes=num_probes)
    )

    def step(
        variables: Variables, state: PyTree, batch: Batch, key: jax.Array, refresh: Any
    ) -> Any:
        params, statistics = variables
        point = params
        if radius:
            grads, _ = jax.grad(task.mean_loss, has_aux=True)(params, *batch, statistics, key)
            scale = radius / (optax.tree.norm(grads) + 1e-12)
            point = optax.tree.add_scale(params, scale, grads)
        (loss, statistics), grads, diag = one_pass(
            point, *batch, statistics, key, state=state, refresh=refresh
        )
        updates, state = tx.update(grads, state, params, hessian_diag=diag, refresh=refresh)
        return Variables(optax.apply_updates(params, updates), statistics), state, loss

    return Stepper(tx.init, step, _due(interval, warmup))


def with_ggn_diag(task: Task, tx: Transformation, interval: int = 1, warmup: int = 0) -> Stepper:
    """The gradient, and the Gauss-Newton diagonal from a probe on the outputs."""
    one_pass = curvax.from_state(
        curvax.value_grad_and_ggn_diag_from_outputs(network_of(task), task.loss, has_aux=True)
    )

    def step(
        variables: Variables, state: PyTree, batch: Batch, key: jax.Array, refresh: Any
    ) -> Any:
        params, statistics = variables
        (loss, statistics), grads, diag = one_pass(
            params, *batch, statistics=statistics, noise_key=key, state=state, refresh=refresh
        )
        updates, state = tx.update(grads, state, params, hessian_diag=diag, refresh=refresh)
        return Variables(optax.apply_updates(params, updates), statistics), state, loss

    return Stepper(tx.init, step, _due(interval, warmup))


def of_somax(task: Task, make: Callable[..., Any], **options: Any) -> Stepper:
    """A method of Somax, which updates the parameters itself; it takes no batch statistics."""

    def loss(params: PyTree, batch: dict[str, Any]) -> jax.Array:
        return task.mean_loss(params, batch["x"], batch["y"], {}, batch["key"])[0]

    method = make(loss_fn=loss, **options)

    def step(variables: Variables, state: PyTree, batch: Batch, key: jax.Array, _: Any) -> Any:
        examples = {"x": batch[0], "y": batch[1], "key": key}  # of dropout: it passes a tree on
        value = loss(variables.params, examples)
        params, state, _ = method.step(variables.params, examples, state, key)
        return Variables(params, variables.statistics), state, value

    return Stepper(method.init, step)


def network_of(task: Task) -> Callable[..., Any]:
    """Outputs and new statistics, from parameters and inputs."""

    def network(params: PyTree, inputs: Any, *, statistics: PyTree, noise_key: jax.Array) -> Any:
        return task.apply(params, inputs, statistics, noise_key)

    return network


def _due(interval: int, warmup: int) -> Callable[[int], bool | None]:
    if interval == 1:
        return lambda _: None
    return lambda step: curvax.refresh_due(step, interval, warmup)
