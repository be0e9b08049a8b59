"""Value estimators for noisy latents: stitched, Tweedie and Monte Carlo; how a stitched one is made."""

from .base import ValueEstimator
from .finetune import FinetuneConfig, finetune
from .monte_carlo import MonteCarloValue
from .search import SearchResult, StitchCandidate, search_stitch
from .stitched import StitchedValue
from .stitching import stitch
from .tweedie import TweedieValue

__all__ = [
    "FinetuneConfig",
    "MonteCarloValue",
    "SearchResult",
    "StitchCandidate",
    "StitchedValue",
    "TweedieValue",
    "ValueEstimator",
    "finetune",
    "search_stitch",
    "stitch",
]
