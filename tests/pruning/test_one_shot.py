"""Pruning in steps: schedules, recomputed gradients, fine-tuning between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax import pruning

from . import problems

loss_fn = problems.regression_loss


def one_shot(sparsity=0.5, **options):
    params, batches = problems.regression()
    options = {"num_grads": 8, "recomputations": 3, "progress": False, **options}
    return params, batches, pruning.prune_one_shot(loss_fn, params, batches, sparsity, **options)


def test_densities_fall_by_the_same_factor():
    densities = 1 - np.array([0.2, *pruning.geometric_sparsities(0.2, 0.9, 5)])
    np.testing.assert_allclose(densities[1:] / densities[:-1], (0.1 / 0.8) ** (1 / 5))


def test_the_cubic_schedule_starts_fast_and_ends_slowly():
    sparsities = [0.1, *pruning.polynomial_sparsities(0.1, 0.9, 4)]
    expected = [0.9 - 0.8 * (1 - j / 4) ** 3 for j in range(5)]
    np.testing.assert_allclose(sparsities, expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_recomputations_are_single_steps_with_new_gradients(sparsity):
    params, batches, result = one_shot(sparsity)
    mask, predicted = None, 0.0
    for step in pruning.geometric_sparsities(0.0, sparsity, 3):
        grads = pruning.collect_gradients(loss_fn, params, batches, 8, mask=mask)
        single = pruning.prune(params, grads, step, mask=mask)
        params, mask = single.params, single.mask
        predicted += single.predicted_loss_change
    jax.tree.map(np.testing.assert_array_equal, result.mask, mask)
    jax.tree.map(np.testing.assert_array_equal, result.params, params)
    assert result.predicted_loss_change == pytest.approx(predicted)
    assert result.sparsity == pytest.approx(sparsity, abs=1 / 80)


def test_aux_of_the_loss_is_dropped():
    params, batches, result = one_shot()
    other = pruning.prune_one_shot(
        lambda *args: (loss_fn(*args), {"metric": 1.0}),
        params,
        batches,
        0.5,
        num_grads=8,
        recomputations=3,
        has_aux=True,
    )
    jax.tree.map(np.testing.assert_array_equal, other.mask, result.mask)


def test_a_start_from_a_mask_goes_on_from_its_density():
    _, batches, first = one_shot(0.5)
    second = pruning.prune_one_shot(
        loss_fn,
        first.params,
        batches,
        0.75,
        mask=first.mask,
        num_grads=8,
        recomputations=2,
    )
    assert second.sparsity == pytest.approx(0.75)
    for before, after in zip(*map(jax.tree.leaves, (first.mask, second.mask)), strict=True):
        assert np.all(np.asarray(before) >= np.asarray(after))


def test_sparsities_by_pattern_and_n_of_m_reach_their_targets():
    _, _, by_pattern = one_shot({"first": 0.5, "second": 0.25})
    assert [layer.sparsity for layer in by_pattern.layers] == pytest.approx([0.5, 0.25])
    _, _, by_group = one_shot(
        None, structure=pruning.NM(1, 2), select=lambda path, leaf: path == "first/kernel"
    )
    assert by_group.layers[0].sparsity == 0.5


def test_patterns_of_one_sparsity_start_each_from_its_own():
    """Of two leaves with one target, one is pruned already and the other is not."""
    params, batches = problems.regression()
    first = pruning.prune(params, None, {"second": 0.5}, method="magnitude")
    result = pruning.prune_one_shot(
        loss_fn,
        first.params,
        batches,
        {"second": 0.5, "first": 0.5},
        mask=first.mask,
        num_grads=8,
        recomputations=3,
    )
    assert [layer.sparsity for layer in result.layers] == [0.5, 0.5]


def test_magnitudes_need_neither_gradients_nor_steps():
    params, _ = problems.regression()
    result = pruning.prune_one_shot(None, params, [], 0.5, method="magnitude")
    expected = pruning.prune(params, None, 0.5, method="magnitude")
    jax.tree.map(np.testing.assert_array_equal, result.mask, expected.mask)
    assert result.predicted_loss_change is None


def trained():
    """The regression at a minimum of its training loss, and gradients of examples there."""
    params, batches = problems.regression()
    inputs, targets = (jnp.concatenate(parts) for parts in zip(*batches, strict=True))
    tx = optax.adam(0.02)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, inputs, targets), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(1000):
        params, state = step(params, state)
    return params, inputs, targets


def test_obs_with_recomputation_beats_magnitude():
    params, inputs, targets = trained()
    batches = [(inputs, targets)]

    def loss_after(**options):
        result = pruning.prune_one_shot(loss_fn, params, batches, 0.5, num_grads=128, **options)
        return float(loss_fn(result.params, inputs, targets))

    magnitude = loss_after(method="magnitude")
    once = loss_after(per_example=True, recomputations=1, damping=1e-3)
    often = loss_after(per_example=True, recomputations=16, damping=1e-3)
    assert often < magnitude
    assert often < once


def test_gradual_pruning_fine_tunes_after_each_step():
    params, batches = problems.regression()
    seen = []

    def fine_tune(params, mask):
        seen.append(1 - np.mean(np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)])))
        tx = pruning.keep_pruned(mask, optax.adam(0.01))
        state = tx.init(params)
        for batch in batches[:3]:
            updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
            params = optax.apply_updates(params, updates)
        return params

    result = pruning.prune_gradually(
        loss_fn,
        params,
        batches,
        pruning.polynomial_sparsities(0.0, 0.8, 3),
        fine_tune,
        num_grads=8,
        recomputations=2,
    )
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert result.sparsity == pytest.approx(0.8)
    for leaf, kept in zip(*map(jax.tree.leaves, (result.params, result.mask)), strict=True):
        assert np.all(np.asarray(leaf)[~np.asarray(kept)] == 0)


class TestBadInput:
    def test_fine_tuning_that_brings_weights_back(self):
        params, batches = problems.regression()
        with pytest.raises(ValueError, match="not zero, at first/kernel: wrap its optimizer"):
            pruning.prune_gradually(
                loss_fn, params, batches, [0.5], lambda *_: params, method="magnitude"
            )

    def test_gradual_pruning_needs_a_target(self):
        with pytest.raises(ValueError, match="sparsities must name at least one target"):
            pruning.prune_gradually(loss_fn, *problems.regression(), [], lambda p, m: p)

    @pytest.mark.parametrize(
        "options", [{"recomputations": 0}, {"num_grads": 0}, {"num_grads": 1.5}]
    )
    def test_counts_are_positive_integers(self, options):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            one_shot(**options)

    def test_fewer_batches_than_gradients(self):
        with pytest.raises(ValueError, match="batches gave 16 gradients"):
            one_shot(num_grads=17)

    def test_a_target_below_the_present(self):
        _, batches, first = one_shot(0.5)
        with pytest.raises(ValueError, match=r"below the current 0\.5"):
            pruning.prune_one_shot(loss_fn, first.params, batches, 0.25, mask=first.mask)

    def test_an_unknown_option(self):
        with pytest.raises(TypeError, match="block_sizes"):
            one_shot(block_sizes=3)

    @pytest.mark.parametrize("ends", [(-0.1, 0.5), (0.5, 0.4), (0.5, 1.0)])
    def test_schedules_rise_within_zero_and_one(self, ends):
        for schedule in (pruning.geometric_sparsities, pruning.polynomial_sparsities):
            with pytest.raises(ValueError, match="must be a number in"):
                schedule(*ends, 3)
            with pytest.raises(ValueError, match="num_steps must be"):
                schedule(0.0, 0.5, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "oBs"},
        {"distribution": "tree"},
        {"update": "all"},
        {"damping": -1.0},
        {"method": "greedy", "block_size": None},
        {"block_sizes": 3},
    ],
)
def test_options_are_checked_before_a_gradient_is_taken(options):
    def batches():
        raise AssertionError("a batch was taken")
        yield

    params, _ = problems.regression()
    with pytest.raises((ValueError, TypeError), match=next(reversed(options))):
        pruning.prune_one_shot(loss_fn, params, batches(), 0.5, num_grads=2, **options)


def test_each_layer_goes_down_from_where_it_is():
    params = {"first": jnp.ones((10, 10)), "second": jnp.ones((10, 10))}
    mask = {
        "first": jnp.arange(100).reshape(10, 10) >= 90,  # a tenth is left
        "second": jnp.ones((10, 10), bool),
    }
    seen = []

    def loss_fn(params, x):
        return x * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def batches(params):
        seen.append([float(jnp.mean(leaf == 0)) for leaf in jax.tree.leaves(params)])
        return [1.0]

    result = pruning.prune_one_shot(
        loss_fn,
        params,
        batches,
        0.9,
        method="fisher",
        distribution="uniform",
        mask=mask,
        recomputations=2,
        num_grads=1,
    )
    assert [layer.sparsity for layer in result.layers] == pytest.approx([0.9, 0.9])
    np.testing.assert_allclose(seen, [[0.9, 0.0], [0.9, 1 - 0.1**0.5]], atol=0.011)
