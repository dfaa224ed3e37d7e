"""Batches of any form that loaders give: arguments, counts of examples, parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning, spectrum
from curvax.curvature._batches import num_examples, parts

pytestmark = pytest.mark.oldest

WEIGHTS = jnp.array([1.0, -1.0])
INPUTS = np.arange(10.0, dtype=np.float32).reshape(5, 2)
TARGETS = np.ones(5, np.float32)


def loss(weights, inputs, targets):
    return jnp.mean((inputs @ weights - targets) ** 2)


def gradients(fun, batches, **options):
    return pruning.collect_gradients(fun, WEIGHTS, batches, 1, **options)


def product(fun, batches, **options):
    return spectrum.hessian_operator(fun, WEIGHTS, batches, **options)(WEIGHTS)


@pytest.mark.parametrize("use", [gradients, product])
def test_a_list_is_taken_as_a_tuple(use):
    expected = use(loss, [(INPUTS, TARGETS)])
    np.testing.assert_array_equal(use(loss, [[INPUTS, TARGETS]]), expected)


@pytest.mark.parametrize("use", [gradients, product])
def test_a_dictionary_is_one_argument(use):
    def of_dict(weights, batch):
        return loss(weights, batch["image"], batch["label"])

    batch = {"image": INPUTS, "label": TARGETS}
    np.testing.assert_array_equal(use(of_dict, [batch]), use(loss, [(INPUTS, TARGETS)]))


class Tensor:
    """As another framework has it: no array of JAX or NumPy."""

    shape = (5, 2)


@pytest.mark.parametrize("use", [gradients, product])
@pytest.mark.parametrize("batch", [(Tensor(), TARGETS), [INPUTS, Tensor()], Tensor()])
def test_a_tensor_of_another_framework_gets_a_sentence(use, batch):
    with pytest.raises(ValueError, match=r"a batch holds a .*Tensor at .*jax.tree.map\(np.asarray"):
        use(loss, [batch])


def test_first_axes_that_disagree_are_an_error_that_names_batch_weight():
    classes = np.ones(3, np.float32)

    def weighted(weights, inputs, targets, classes):
        return loss(weights, inputs, targets) * jnp.sum(classes)

    batch = INPUTS, TARGETS, classes
    with pytest.raises(ValueError, match="5 at 0, 5 at 1, 3 at 2: pass batch_weight="):
        product(weighted, [batch])
    named = product(weighted, [batch], batch_weight=lambda inputs, *_: len(inputs))
    np.testing.assert_allclose(named, 3 * product(loss, [(INPUTS, TARGETS)]), rtol=1e-6)


def test_examples_are_counted_on_any_argument_and_scalars_have_none():
    key = jax.random.key(0)
    assert num_examples((1.0, key, {"x": INPUTS}, TARGETS), "") == 5
    assert num_examples((1.0, key), "") is None


def test_parts_cut_arrays_and_hand_over_scalars_whole():
    cut = list(parts((INPUTS, {"y": TARGETS}, 2.0), 2))
    assert [count for _, count in cut] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([part[0] for part, _ in cut]), INPUTS)
    assert all(part[2] == 2.0 for part, _ in cut)


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, {"per_example": True}])
def test_scalars_belong_to_every_part_of_a_batch(options):
    def scaled(weights, inputs, targets, scale):
        return scale * loss(weights, inputs, targets)

    rows = gradients(scaled, [(INPUTS, TARGETS, 2.0)], **options)
    np.testing.assert_allclose(rows, 2 * gradients(loss, [(INPUTS, TARGETS)], **options), rtol=1e-6)
