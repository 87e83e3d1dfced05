"""Scores of explainers: one file per question, each metric a torchmetrics ``Metric`` over pure functions.

``image_metrics()`` and ``dictionary_metrics()`` list all of them; ``image_score`` and ``dictionary_score`` make the
record of ``scores.json`` from one fit per seed. docs/metrics.md defines each and says what it cannot show.

Importing this package imports torchmetrics (which itself imports torchvision and matplotlib where they are installed),
so it is imported where scores are made, never by ``import netgloss``.
"""

from netgloss.metrics.base import (
    DictionaryMetric,
    ImageMetric,
    Score,
    dictionary_metrics,
    dictionary_score,
    image_metrics,
    image_score,
    interval,
)
from netgloss.metrics.dictionary import (
    Collinearity,
    CollinearityMax,
    collinearity,
    cosines,
    nearest_cosine,
    random_dictionary,
)
from netgloss.metrics.faithfulness.agreement import (
    KL,
    AccuracyChange,
    Agreement,
    accuracy_change,
    agreement,
    decision_kept,
    kl_divergence,
    label_agreement,
    label_kl_divergence,
)
from netgloss.metrics.faithfulness.completeness import Completeness, completeness, completeness_value
from netgloss.metrics.faithfulness.concept_deletion import ConceptDeletion, ranked_curve
from netgloss.metrics.faithfulness.importance import contributions, explain_class
from netgloss.metrics.faithfulness.importance_agreement import importance_agreement, rank_correlation
from netgloss.metrics.faithfulness.masking import class_value, linear_value, masked_logits, through
from netgloss.metrics.faithfulness.shapley import shapley
from netgloss.metrics.faithfulness.sobol import sobol_total
from netgloss.metrics.fidelity import R2, R2FeatureMean, r2_feature_mean, r2_per_feature, r2_score
from netgloss.metrics.sparsity import L0, DeadShare, Hoyer, L0Share, dead_share, hoyer, l0
from netgloss.metrics.stability import (
    CodeCorrelation,
    Stability,
    concept_stability,
    matched_similarity,
    pair_interval,
    random_stability,
    shuffled_stability,
    stability,
)
from netgloss.metrics.upper import UpperError, upper_error

__all__ = [
    "KL",
    "L0",
    "R2",
    "AccuracyChange",
    "Agreement",
    "CodeCorrelation",
    "Collinearity",
    "CollinearityMax",
    "Completeness",
    "ConceptDeletion",
    "DeadShare",
    "DictionaryMetric",
    "Hoyer",
    "ImageMetric",
    "L0Share",
    "R2FeatureMean",
    "Score",
    "Stability",
    "UpperError",
    "accuracy_change",
    "agreement",
    "class_value",
    "collinearity",
    "completeness",
    "completeness_value",
    "concept_stability",
    "contributions",
    "cosines",
    "dead_share",
    "decision_kept",
    "dictionary_metrics",
    "dictionary_score",
    "explain_class",
    "hoyer",
    "image_metrics",
    "image_score",
    "importance_agreement",
    "interval",
    "kl_divergence",
    "l0",
    "label_agreement",
    "label_kl_divergence",
    "linear_value",
    "masked_logits",
    "matched_similarity",
    "nearest_cosine",
    "pair_interval",
    "r2_feature_mean",
    "r2_per_feature",
    "r2_score",
    "random_dictionary",
    "random_stability",
    "rank_correlation",
    "ranked_curve",
    "shapley",
    "shuffled_stability",
    "sobol_total",
    "stability",
    "through",
    "upper_error",
]
