"""Wrong input: an early error that says what was given, what is allowed and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import influence
from tests.influence.problems import (
    TRAIN,
    example_losses,
    examples,
    loss_fn,
    make_params,
    network,
)

INPUTS, LABELS = examples(24, 1, np.float32)
PARAMS = make_params(dtype=np.float32)


def ggn(batches=(INPUTS, LABELS), network=network, params=PARAMS, **options):
    loss = options.pop("loss", "softmax_cross_entropy")
    return influence.ggn_influence(network, loss, params, batches, **options)


def fisher(loss=loss_fn, batches=(INPUTS, LABELS), **options):
    return influence.empirical_fisher_influence(loss, PARAMS, batches, **options)


def with_nan():
    inputs = INPUTS.copy()
    inputs[18] = np.nan
    return [(inputs[:10], LABELS[:10]), (inputs[10:], LABELS[10:])]


WEIGHTED = curvax.WeightedTargets(LABELS, np.ones(24))
WRONG = {
    "no batches": (lambda: ggn([]), "the training batches are empty"),
    "no examples": (lambda: ggn([(INPUTS[:0], LABELS[:0])]), "training batches are empty"),
    "no test examples": (lambda: ggn(damping=1.0).scores([]), "the test batches are empty"),
    "not a pair": (lambda: ggn([INPUTS]), "must be a pair (inputs, targets), got 1 arguments"),
    "not iterable": (lambda: ggn(3), "iterable of batches, got a int"),
    "unequal axes": (lambda: ggn((INPUTS, LABELS[:9])), "same number of examples"),
    "scalars alone": (lambda: fisher(batches=[(1.0, 2)]), "array with an axis of examples"),
    "label out of range": (lambda: ggn((INPUTS, LABELS + 1)), "labels must be in [0, 3)"),
    "labels as floats": (lambda: ggn((INPUTS, LABELS * 1.0)), "must be integer labels of shape"),
    "targets that would broadcast": (
        lambda: ggn(loss="squared_error"),
        "squared_error needs targets of the outputs' shape (24, 3), got (24,)",
    ),
    "weighted examples": (lambda: ggn((INPUTS, WEIGHTED)), "leave out examples of weight 0"),
    "outputs without examples": (
        lambda: ggn(network=lambda p, x: network(p, x).mean(0)),
        "must return an array of outputs of shape (24, ..., C)",
    ),
    "complex parameters": (
        lambda: ggn(params=jax.tree.map(lambda x: x + 1j, PARAMS)),
        "needs real parameters, got complex64 at first",
    ),
    "nothing selected": (lambda: ggn(select=lambda *_: False), "real and selected"),
    "an example that is not finite": (lambda: ggn(with_nan()), "training examples [18]"),
    "a loss of each example": (lambda: fisher(example_losses), "must return a real floating"),
    "a loss that ignores its examples": (
        lambda: fisher(lambda params, *_: loss_fn(params, INPUTS, LABELS)),
        "gradients of the first 24 training examples are all the same",
    ),
    "a loss without parameters": (
        lambda: fisher(lambda _, x, y: jnp.mean(x)),
        "all gradients of the training examples are zero",
    ),
    "a measure of no scalar": (
        lambda: ggn(damping=1.0).scores(TRAIN, measure=example_losses),
        "must return a real floating-point scalar",
    ),
    "no damping": (lambda: ggn(damping=0.0), "damping must be a number in (0"),
    "a mesh without blocks": (
        lambda: ggn(mesh=jax.make_mesh((8,), ("x",))),
        "needs a block_size",
    ),
    "a wrong block size": (lambda: ggn(block_size=0), "block_size must be an integer"),
    "a wrong number of directions": (lambda: ggn(num_directions=0), "num_directions must be"),
    "a wrong micro-batch": (lambda: ggn(micro_batch_size=0), "micro_batch_size must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_raises(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_batches_that_change_between_passes_are_noticed():
    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield INPUTS[: 24 - self.passes], LABELS[: 24 - self.passes]

    with pytest.raises(ValueError, match="gave 22 examples in one pass and 23 in another"):
        ggn(Shrinking())
