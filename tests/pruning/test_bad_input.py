"""Wrong input to pruning: a clear error, or a stated behaviour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import pruning

from . import problems


def prune(sparsity=0.5, params=None, grads=None, **options):
    params = problems.params() if params is None else params
    grads = problems.grads() if grads is None else grads
    return problems.prune(params, grads, sparsity, **options)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, np.nan])
def test_a_sparsity_lies_below_one(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0.0, 1.0\)"):
        prune(sparsity)
    with pytest.raises(ValueError, match=r"sparsity\['dense'\] must be a number"):
        prune({"dense": sparsity})


@pytest.mark.parametrize("damping", [0.0, -1e-5, np.inf])
def test_damping_is_positive(damping):
    with pytest.raises(ValueError, match="damping must be a number in"):
        prune(damping=damping)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "woodfisher"},
            "method must be one of 'obs', 'greedy', 'fisher', 'saliency', 'magnitude', 'random'",
        ),
        ({"update": "all"}, "update must be one of"),
        ({"distribution": "tree"}, "distribution must be one of 'global', 'uniform', 'erk'"),
        ({"min_density": 1.0}, r"min_density must be a number in \[0.0, 1.0\)"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"structure": pruning.NM(5, 4)}, "needs n <= m"),
        ({"structure": pruning.NM(0, 4)}, "n of NM"),
        ({"structure": (2, 4)}, "structure must be None, NM"),
        ({"structure": pruning.NM(2, 4, "1")}, "axis of NM"),
        ({"structure": pruning.NM(2, 4), "distribution": "erk"}, "leaves different densities"),
        ({"structure": pruning.OutputUnits(coupled=("a", "b"))}, "takes groups of paths"),
        ({"structure": pruning.OutputUnits(coupled=(("a", "b"),))}, "do not have: .'a', 'b'"),
        (
            {
                "structure": pruning.OutputUnits(coupled=(("dense/kernel", "dense/bias"),)),
                "min_density": 0.1,
            },
            "coupled units span several leaves",
        ),
        ({"sparsity": {"(": 0.5}}, "sparsity keys must be valid patterns for re.search"),
        (
            {"structure": pruning.NM(1, 3), "sparsity": None},
            "no selected leaf.*4 entries, not divisible by 3",
        ),
        ({"structure": pruning.NM(2, 4), "sparsity": 0.6}, "sparsity of at most 0.5"),
        ({"structure": pruning.WeightBlocks(5)}, "no selected leaf.*8 entries, not divisible by 5"),
        ({"method": "greedy"}, "needs a block_size"),
        ({"sparsity": None}, "sparsity=None needs structure=NM"),
        ({"sparsity": {"attention": 0.5}}, r"sparsity\['attention'\] matches no selected leaf"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        prune(**options)


def test_a_selection_of_nothing_is_an_error_with_the_paths():
    with pytest.raises(ValueError, match=r"chooses no leaf.*conv/bias, conv/kernel, dense/kernel"):
        prune(select=lambda path, leaf: False)


def test_integer_weights_are_refused():
    params = {"kernel": jnp.ones((2, 2), int)}
    with pytest.raises(ValueError, match="only real weights can be pruned, got int32 at kernel"):
        problems.prune(params, None, 0.5, method="magnitude", select=lambda *_: True)


def test_a_python_number_among_the_params_is_left_alone():
    params = {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2), "temperature": 1.0}
    result = pruning.prune(params, None, 0.5, method="magnitude")
    assert result.params["temperature"] == 1.0
    assert result.sparsity == 0.5
    assert pruning.mask_of_zeros(result.params)["temperature"]


@pytest.mark.parametrize("method", ["obs", "greedy", "fisher"])
def test_scores_of_the_loss_need_gradients(method):
    with pytest.raises(ValueError, match="needs grads, got None"):
        problems.prune(problems.params(), None, 0.5, method=method, block_size=4)
    with pytest.raises(ValueError, match="needs grads, got None"):
        problems.prune(problems.params(), None, 0.5, method="magnitude", update="joint")


def test_gradients_match_the_params():
    with pytest.raises(ValueError, match="a gradient must match params"):
        prune(grads={"kernel": jnp.ones((3, 2))})


@pytest.mark.parametrize("method", ["obs", "greedy"])
def test_a_gradient_that_is_not_finite_is_an_error(method):
    rows = problems.grads()
    rows["dense"]["kernel"] = rows["dense"]["kernel"].at[2, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"grads must be finite.*gradients \[2\]"):
        prune(grads=rows, method=method, block_size=8)


def test_a_mask_matches_and_is_of_bool():
    ones = jax.tree.map(jnp.ones_like, problems.params())
    with pytest.raises(ValueError, match=r"mask must be of bool.*got float32 at conv/bias"):
        prune(mask=ones)
    with pytest.raises(ValueError, match="mask must match params"):
        prune(mask={"dense": {"kernel": jnp.ones((8, 4), bool)}})


def test_a_target_below_the_present_sparsity_is_an_error():
    first = prune(0.5)
    with pytest.raises(ValueError, match=r"is below the current 0\.5 of conv/kernel, dense/kernel"):
        prune(0.4, params=first.params, mask=first.mask)


def test_the_present_sparsity_again_changes_nothing():
    first = prune(0.5)
    second = prune(0.5, params=first.params, mask=first.mask)
    for one, other in ((first.params, second.params), (first.mask, second.mask)):
        np.testing.assert_array_equal(problems.kernels(one), problems.kernels(other))


@pytest.mark.parametrize("method", ["obs", "greedy", "fisher"])
def test_a_weight_without_gradient_costs_nothing_but_the_damping(method):
    rows = problems.grads()
    rows["dense"]["kernel"] = rows["dense"]["kernel"].at[:, 3].set(0)
    params = problems.params()
    result = prune(4 / 56, params, rows, method=method, block_size=8, damping=1e-7)
    gone = np.flatnonzero(~np.asarray(result.mask["dense"]["kernel"]))
    np.testing.assert_array_equal(gone, [12, 13, 14, 15])
    np.testing.assert_allclose(
        problems.kernels(result.params)[:24], problems.kernels(params)[:24], rtol=1e-5
    )


def test_all_zero_gradients_are_magnitude_pruning():
    zeros = jax.tree.map(jnp.zeros_like, problems.grads())
    by_obs = prune(0.5, grads=zeros)
    by_magnitude = prune(0.5, method="magnitude")
    for one, other in ((by_obs.params, by_magnitude.params), (by_obs.mask, by_magnitude.mask)):
        np.testing.assert_array_equal(problems.kernels(one), problems.kernels(other))


def test_no_gradient_at_all_is_an_error():
    empty = jax.tree.map(lambda rows: rows[:0], problems.grads())
    with pytest.raises(ValueError, match="at least one gradient along the first axis"):
        prune(grads=empty)


def test_a_mask_that_has_pruned_everything_is_an_error():
    mask = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), problems.params())
    with pytest.raises(ValueError, match="mask leaves no unpruned weight"):
        prune(0.9, mask=mask)


def test_keys_of_sparsities_are_patterns():
    with pytest.raises(ValueError, match=r"keys must be valid patterns for re\.search, got 0"):
        prune({0: 0.5})


def test_a_leaf_without_known_outputs_needs_a_layout():
    params = {"scale": jnp.ones(())}
    with pytest.raises(ValueError, match=r"scale: its fan-in.*read as 'not a kernel'.*layout="):
        problems.prune(
            params,
            None,
            0.5,
            method="magnitude",
            structure=pruning.OutputUnits(),
            select=lambda *_: True,
        )


@pytest.mark.parametrize("sparsity", ["0.5", None, [0.5], "half"])
def test_a_sparsity_is_a_number(sparsity):
    with pytest.raises(ValueError, match=r"sparsity(\['dense'\])? must be a number in"):
        prune({"dense": sparsity})


@pytest.mark.parametrize("run", [prune, lambda params: pruning.prune_layer(params, params, 0.5)])
def test_inside_jit_it_says_where_it_runs(run):
    with pytest.raises(ValueError, match=r"outside jax.jit.*prune_on_schedule"):
        jax.jit(lambda params: run(params=params) if run is prune else run(params))(
            problems.params() if run is prune else jnp.eye(4)
        )


def test_a_leaf_that_is_no_array_is_named():
    params = {**problems.params(), "activation": jax.nn.relu}
    for run in (lambda: prune(params=params), lambda: pruning.mask_of_zeros(params)):
        with pytest.raises(ValueError, match=r"got .* at activation.*eqx.partition"):
            run()


@pytest.mark.parametrize("update", ["joint", "independent"])
def test_an_update_that_the_dtype_does_not_hold_is_an_error(update):
    params = {"kernel": jnp.full((3, 1), 6e4, jnp.float16)}
    grads = {"kernel": jnp.ones((3, 3, 1))}
    with pytest.raises(ValueError, match=r"a weight of kernel to .*overflows float16"):
        pruning.prune(params, grads, 0.34, damping=1e-4, update=update)


def test_nor_one_of_a_layer():
    kernel = jnp.full((2, 1), 6e4, jnp.float16)
    with pytest.raises(ValueError, match=r"a weight of kernel to .*overflows float16"):
        pruning.prune_layer(kernel, jnp.ones((8, 2)), 0.5)


def test_a_mask_that_leaves_nothing_of_a_layer_is_an_error():
    with pytest.raises(ValueError, match="mask keeps no weight"):
        pruning.prune_layer(jnp.ones((4, 3)), jnp.eye(4), None, mask=jnp.zeros((4, 3), bool))
