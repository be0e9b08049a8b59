"""What a method will cost before anything is downloaded: counted on fake tensors from the true architectures."""

from .architectures import ARCHITECTURES, TOWERS
from .devices import DEVICES
from .planning import METHODS, plan
from .report import Plan

__all__ = ["ARCHITECTURES", "DEVICES", "METHODS", "TOWERS", "Plan", "plan"]
