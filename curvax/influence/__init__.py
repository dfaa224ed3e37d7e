"""Data attribution: which training examples a model's outputs on test examples are due to.

Influence functions on the inverse of the Gauss-Newton or the empirical Fisher matrix,
self-influence, which finds mislabelled examples, and the linear datamodeling score, which says how
good scores are.
"""

from curvax.influence._datamodel import LinearDatamodelingScore, linear_datamodeling_score
from curvax.influence._fit import empirical_fisher_influence, ggn_influence
from curvax.influence._function import InfluenceFunction
from curvax.influence._results import InfluenceScores, SelfInfluence

__all__ = [
    "InfluenceFunction",
    "InfluenceScores",
    "LinearDatamodelingScore",
    "SelfInfluence",
    "empirical_fisher_influence",
    "ggn_influence",
    "linear_datamodeling_score",
]
