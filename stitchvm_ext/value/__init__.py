"""Value estimators for noisy latents: stitched, Tweedie, Monte Carlo and weighted sums; how a stitched one is made."""

from .base import ValueEstimator
from .finetune import FinetuneConfig, finetune
from .monte_carlo import MonteCarloValue
from .rollouts import cache_rollouts
from .scheduled import ScheduledValue
from .search import SearchResult, StitchCandidate, search_stitch
from .stitched import StitchedValue
from .stitching import stitch
from .sum import ValueSum
from .tweedie import TweedieValue

__all__ = [
    "FinetuneConfig",
    "MonteCarloValue",
    "ScheduledValue",
    "SearchResult",
    "StitchCandidate",
    "StitchedValue",
    "TweedieValue",
    "ValueEstimator",
    "ValueSum",
    "cache_rollouts",
    "finetune",
    "search_stitch",
    "stitch",
]
