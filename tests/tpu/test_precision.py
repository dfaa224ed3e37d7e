"""Products that feed M-FAC's solve on a TPU: float32 in six passes, bfloat16 rows in three parts.

A TPU multiplies in bfloat16 and rounds float32 factors to it unless it is told otherwise.
"""

import functools
import re

import jax.numpy as jnp

from curvax.fisher import DenseWindow, solve_damped_gram
from curvax.fisher.inverse._gram import Cut, gram_of_cut
from tests.hlo import instructions

from .compiler import array, compiled, one_chip

PARTS = 3  # of bfloat16 make a float32 number


def products(fun, *args):
    """The matrix products of a compiled function, in the form that a TPU has: convolutions."""
    found = instructions(compiled(fun, *args).as_text())
    return [one for one in found if one.opcode in ("convolution", "dot")]


def is_exact(product):
    return "operand_precision={highest,highest}" in product.text


@functools.cache
def window(dtype):
    where = one_chip()
    return DenseWindow({"w": array((64, 512, 256), where, dtype)}), {"w": array((512, 256), where)}


def dots(rows, vector):
    return rows.dots(vector, jnp.float32)


def combine(rows, vector):
    return rows.combine(jnp.ones(64), vector)


def test_inner_products_with_float32_rows_are_exact():
    found = products(dots, *window(jnp.float32))
    assert all(map(is_exact, found)), found


def test_sums_of_float32_rows_are_exact():
    found = products(combine, *window(jnp.float32))
    assert all(map(is_exact, found)), found


def test_the_small_solve_is_exact():
    where = one_chip()
    args = array((256, 256), where), array((), where), array((256,), where)
    found = products(solve_damped_gram, *args)
    assert found
    assert all(map(is_exact, found)), found


def test_the_gram_matrix_of_an_inverse_fisher_is_exact():
    for cut in (Cut(local=True, axis=1), Cut(local=False, axis=None)):
        rows = array((128, 64, 1024), one_chip())
        found = products(functools.partial(gram_of_cut, cut=cut), rows)
        assert found
        assert all(map(is_exact, found)), found


def roundings(fun):
    """How often a compiled function rounds a float32 array to bfloat16 and keeps the rest."""
    text = compiled(fun, *window(jnp.bfloat16)).as_text()
    found = [one for one in instructions(text) if one.opcode == "reduce-precision"]
    sources = {re.search(r"reduce-precision\(%?([\w.\-]+)\)", one.text)[1] for one in found}
    return len(sources)


def test_a_vector_keeps_three_parts_beside_bfloat16_rows():
    assert roundings(dots) >= PARTS


def test_weights_keep_three_parts_beside_bfloat16_rows():
    assert roundings(lambda rows, vector: rows.combine(vector["w"][0, :64], vector)) >= PARTS
