"""Finds an optimizer's own state inside the states of chains and wrappers around it."""

from typing import Any

import jax

from curvax._trees import path_name


def find_node(state: Any, fields: tuple[str, ...], *, one: str, several: str, example: str) -> Any:
    """The one node of ``state`` that has the named fields.

    Args:
      state: a state of ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``,
        ``inject_hyperparams``, ``apply_if_finite``, or the ``opt_state`` of ``nnx.Optimizer``.
      fields: the names of the fields that identify the node.
      one: what the node is called in an error.
      several: the same in the plural.
      example: whose state to pass, named in an error.

    Returns:
      The node. Its leaves may be variables, in which ``nnx.Optimizer`` wraps them.

    Raises:
      ValueError: if there is no such node, or if there are several, naming their paths.
    """

    def matches(node: Any) -> bool:
        return set(fields) <= set(getattr(node, "_fields", ()))

    entries, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=matches)
    found = {path_name(path): node for path, node in entries if matches(node)}
    if not found:
        raise ValueError(
            f"state holds no {one}: pass the state of {example}, or of a chain or wrapper "
            "around it."
        )
    if len(found) > 1:
        raise ValueError(
            f"state holds {len(found)} {several}, at {', '.join(found)}: pass the part of "
            "the state that you mean."
        )
    return next(iter(found.values()))


def find_mfac(state: Any) -> Any:
    """The one M-FAC state inside ``state``."""
    return find_node(
        state,
        ("window", "gram", "normalizer"),
        one="M-FAC optimizer",
        several="M-FAC optimizers",
        example="curvax.mfac",
    )
