"""The small system of an M-FAC step on a TPU: products and little else, unless it is repeated."""

import functools

import pytest

from curvax.fisher import solve_damped_gram
from tests.hlo import cycles, instructions

from .compiler import array, compiled, one_chip

# About 0.2 ms of a v5e; two passes over a window of 10 million parameters take some 50.
MOST_CYCLES = {128: 100_000, 512: 300_000}
every_size = pytest.mark.parametrize("size", MOST_CYCLES)


@functools.cache
def ordinary_attempt(size):
    """What runs in each solution: no branch and no loop of attempts decides."""
    where = one_chip()
    gram, shift, rhs = array((size, size), where), array((), where), array((size,), where)
    program = compiled(solve_damped_gram, gram, shift, rhs, optimized=True).as_text()
    return [one for one in instructions(program) if one.always]


@every_size
def test_the_first_attempt_is_outside_any_loop_of_attempts(size):
    assert any("cholesky" in one.text.lower() for one in ordinary_attempt(size))


@every_size
def test_an_ordinary_attempt_gathers_nothing(size):
    assert not [one.text for one in ordinary_attempt(size) if one.opcode == "gather"]


@every_size
def test_an_ordinary_attempt_takes_few_cycles(size):
    assert cycles(ordinary_attempt(size)) <= MOST_CYCLES[size]
