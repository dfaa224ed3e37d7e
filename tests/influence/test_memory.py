"""What is in memory at a time is bounded, and neither bound changes a score."""

import jax
import numpy as np
import pytest

from curvax import influence
from tests.influence.problems import TEST, TRAIN, examples, loss_fn, make_params, network


def ggn(**options):
    return influence.ggn_influence(
        network, "softmax_cross_entropy", make_params(dtype=np.float32), TRAIN, **options
    )


class Watched:
    """Batches that note how many bytes of arrays are alive whenever one is read."""

    def __init__(self, number):
        """Takes how many there are."""
        self.number, self.most = number, 0

    def __iter__(self):
        for seed in range(self.number):
            self.most = max(self.most, sum(array.nbytes for array in jax.live_arrays()))
            yield examples(16, seed, np.float32)


@pytest.mark.parametrize("options", [{}, {"block_size": 6}])
def test_a_stream_takes_no_more_memory_for_more_examples(options):
    most = []
    for number in (3, 12):
        batches = Watched(number)
        function = influence.empirical_fisher_influence(
            loss_fn, make_params(dtype=np.float32), batches, micro_batch_size=8, **options
        )
        function.scores(TEST)
        function.self_influence()
        most.append(batches.most)
        del function
    assert most[1] <= 1.1 * most[0]


def test_test_examples_are_taken_in_groups_that_fit():
    function = ggn(damping=0.1)
    whole = function.scores(TEST).scores
    problem = function._problem._replace(memory_bytes=2 * 24 * 4 * 2)  # of two gradients, twice
    grouped = influence.InfluenceFunction(function.inverse, 0.1, function.num_train, problem)
    np.testing.assert_allclose(grouped.scores(TEST).scores, whole, rtol=1e-5, atol=1e-6)


def test_an_inverse_that_does_not_fit_says_how_many_bytes_it_would_take():
    with pytest.raises(ValueError, match=r"6,912 bytes, more than memory_bytes=3,000: pass block_"):
        ggn(memory_bytes=3000)


def test_the_block_size_that_it_advises_fits():
    ggn(memory_bytes=3000, block_size=10, damping=0.1)
    with pytest.raises(ValueError, match="pass block_size=10 or less"):
        ggn(memory_bytes=3000)
