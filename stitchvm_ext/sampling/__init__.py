"""Sampling under a value estimator: noise levels, transitions, gradient guidance, and its two front ends."""

from .dps import sample_dps
from .guidance import MODES, SCHEDULES, Guidance
from .guided_sample import GuidedSampleOutput, guided_sample
from .hook import ValueGuide, apply_value_guidance, remove_value_guidance
from .schedule import pipeline_sigmas
from .transitions import TRANSITIONS, Transition, get_transition

__all__ = [
    "MODES",
    "SCHEDULES",
    "TRANSITIONS",
    "Guidance",
    "GuidedSampleOutput",
    "Transition",
    "ValueGuide",
    "apply_value_guidance",
    "get_transition",
    "guided_sample",
    "pipeline_sigmas",
    "remove_value_guidance",
    "sample_dps",
]
