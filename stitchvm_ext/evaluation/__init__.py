"""How good a value is: public evaluation data, measures, and accuracy by noise level (METHOD.md §4)."""

from .formats import FORMATS, CaptionedImages, EvaluationSet, RankedImages, RatedImages, read_evaluation_set
from .images import image_files, read_images
from .metrics import preference_accuracy, retrieval_at_1, spearman, variance_explained
from .noise_levels import SIGMAS, evaluate_noise_levels
from .report import NoiseLevelReport

__all__ = [
    "FORMATS",
    "SIGMAS",
    "CaptionedImages",
    "EvaluationSet",
    "NoiseLevelReport",
    "RankedImages",
    "RatedImages",
    "evaluate_noise_levels",
    "image_files",
    "preference_accuracy",
    "read_evaluation_set",
    "read_images",
    "retrieval_at_1",
    "spearman",
    "variance_explained",
]
