"""Public results are typed: nothing returns a bare Any, and each choice is checked as declared."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import curvax
import curvax.fisher
from curvax.curvature._losses import LOSSES, LossName
from curvax.curvature._probes import _SAMPLERS, Distribution
from curvax.curvature._products import _ONE_PASS, Mode
from curvax.optimizers._averaging import PRESETS, Averaging
from curvax.pruning._options import OneShotOptions, PruneOptions

MODULES = (curvax, curvax.fisher, curvax.pruning, curvax.spectrum)
# Only the run knows the tree of an operator's vectors, or of one of several gradients.
EXCEPTIONS = {
    "for_nnx",  # what a model's loss returns, and trees of NNX
    "Eigenpairs.vectors",
    "InverseFisher.diagonal",
    "InverseFisher.sample",
    "InverseFisher.solve_in_sample_space",
    "Operator.random_vector",
    "trace",
    # Rows stand in trees like the params, as the state of an optimizer does.
    "DenseWindow.rows",
    "SparseRow.positions",
    "SparseRow.values",
    "SparseWindow.positions",
    "SparseWindow.values",
    # Whatever the user's loss takes.
    "WeightedTargets.targets",
}


def public_objects():
    for module in MODULES:
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield name, getattr(module, name)


def results_of_class(name, cls):
    for field in getattr(cls, "_fields", ()):
        yield f"{name}.{field}", cls.__annotations__[field]
    for key, member in vars(cls).items():
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if inspect.isfunction(function) and (not key.startswith("_") or key == "__call__"):
            yield f"{name}.{key}", function.__annotations__.get("return", Any)


def results():
    for name, value in public_objects():
        if inspect.isclass(value):
            yield from results_of_class(name, value)
        elif inspect.isfunction(value):
            for function in typing.get_overloads(value) or [value]:
                yield name, function.__annotations__["return"]


def holds_any(annotation):
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Callable, Mapping):
        arguments = arguments[-1:]  # what it takes is the user's
    return annotation is Any or any(map(holds_any, arguments))


def test_no_public_result_is_a_bare_any():
    found = {name for name, annotation in results() if holds_any(annotation)}
    assert found == EXCEPTIONS


def test_public_callables_are_plain_functions_since_jitted_ones_return_any():
    kinds = (curvax.OutputLoss, str)
    for name, value in public_objects():
        assert inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, kinds), name


@pytest.mark.parametrize(
    ("choices", "table"),
    [
        (Averaging, PRESETS),
        (Distribution, _SAMPLERS),
        (LossName, LOSSES),
        (Mode, _ONE_PASS),
    ],
)
def test_each_choice_has_an_entry_in_the_table_that_it_is_looked_up_in(choices, table):
    assert set(typing.get_args(choices)) == set(table)


@pytest.mark.parametrize(
    ("function", "options", "inner", "other"),
    [
        # A given diagonal belongs to one point: a run of several steps does not take it.
        (curvax.pruning.prune_one_shot, PruneOptions, curvax.pruning.prune, {"fisher_diag"}),
        (
            curvax.pruning.prune_gradually,
            OneShotOptions,
            curvax.pruning.prune_one_shot,
            {*PruneOptions.__annotations__},
        ),
    ],
)
def test_options_that_are_handed_on_are_named(function, options, inner, other):
    def keywords(function):
        parameters = inspect.signature(function).parameters.values()
        return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}

    handed_on = keywords(inner) - keywords(function)
    assert set(options.__annotations__) == handed_on ^ other
