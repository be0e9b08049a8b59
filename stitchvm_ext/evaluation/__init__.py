"""How good a value is: public evaluation data, measures, and accuracy by noise level (METHOD.md §4)."""

from .compare import Contender, compare
from .compare_report import Comparison
from .formats import FORMATS, CaptionedImages, EvaluationSet, RankedImages, RatedImages, read_evaluation_set
from .metrics import preference_accuracy, retrieval_at_1, spearman, variance_explained
from .noise_levels import SIGMAS, evaluate_noise_levels
from .report import NoiseLevelReport

__all__ = [
    "FORMATS",
    "SIGMAS",
    "CaptionedImages",
    "Comparison",
    "Contender",
    "EvaluationSet",
    "NoiseLevelReport",
    "RankedImages",
    "RatedImages",
    "compare",
    "evaluate_noise_levels",
    "preference_accuracy",
    "read_evaluation_set",
    "retrieval_at_1",
    "spearman",
    "variance_explained",
]
