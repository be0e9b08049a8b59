"""Sampling under a value estimator: noise levels, transitions, the inference-time methods, and their front ends.

``guider`` and ``callbacks`` hold subclasses of diffusers' classes; they are imported by themselves, so that this
package does not import diffusers.
"""

from .best_of_n import BestOfN, sample_best_of_n
from .calibrate import Calibration, calibrate
from .dps import sample_dps
from .encoding import encode_prompts
from .fk import FK, sample_fk
from .guidance import MODES, SCHEDULES, Guidance
from .guided_sample import GuidedSampleOutput, guided_sample
from .hook import ValueGuide, apply_value_guidance, remove_value_guidance
from .memory import MemorySaving
from .methods import METHODS
from .prompt_file import Prompt, read_prompts
from .sample_prompts import sample_prompts
from .schedule import pipeline_sigmas
from .search import Search, sample_search
from .svdd import SVDD, sample_svdd
from .transitions import TRANSITIONS, Transition, get_transition

__all__ = [
    "FK",
    "METHODS",
    "MODES",
    "SCHEDULES",
    "SVDD",
    "TRANSITIONS",
    "BestOfN",
    "Calibration",
    "Guidance",
    "GuidedSampleOutput",
    "MemorySaving",
    "Prompt",
    "Search",
    "Transition",
    "ValueGuide",
    "apply_value_guidance",
    "encode_prompts",
    "calibrate",
    "get_transition",
    "guided_sample",
    "pipeline_sigmas",
    "read_prompts",
    "remove_value_guidance",
    "sample_best_of_n",
    "sample_dps",
    "sample_fk",
    "sample_prompts",
    "sample_search",
    "sample_svdd",
]
