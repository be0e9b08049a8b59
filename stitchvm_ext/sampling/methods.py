"""The inference-time methods by name: one function each, all of the same signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from .best_of_n import BestOfN, sample_best_of_n
from .dps import sample_dps
from .fk import FK, sample_fk
from .guidance import Guidance
from .search import Search, sample_search
from .svdd import SVDD, sample_svdd
from .task import Sampled


@dataclass(frozen=True)
class Method:
    """An inference-time method.

    Attributes:
        sample: ``(task, options) -> Sampled``.
        options: makes the options from keyword arguments.
        transition: what a step is where the caller says nothing.
    """

    sample: Callable[[Any, Any], Sampled]
    options: Callable[..., Any]
    transition: str


METHODS: dict[str, Method] = {
    "dps": Method(sample_dps, Guidance, "ode"),
    "fk": Method(sample_fk, FK, "flow_grpo"),
    "dps+fk": Method(sample_fk, partial(FK, guidance=Guidance()), "flow_grpo"),
    "best_of_n": Method(sample_best_of_n, BestOfN, "ode"),
    "svdd": Method(sample_svdd, SVDD, "flow_grpo"),
    "search": Method(sample_search, Search, "flow_grpo"),
}


def get_method(name: str) -> Method:
    """Raises ValueError for an unknown name, TypeError for no name."""
    if not isinstance(name, str):
        raise TypeError(f"method: expected one of {list(METHODS)}, got {type(name).__name__}")
    if name not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, got {name!r}")
    return METHODS[name]


def make_options(method: str, options: dict[str, Any]) -> Any:
    """The options of a method. Raises TypeError for one that it does not have."""
    make = get_method(method).options
    known = [f.name for f in fields(make.func if isinstance(make, partial) else make)]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: expected one of the options of method {method!r}, {known}")
    if isinstance(options.get("window"), list):
        options = {**options, "window": tuple(options["window"])}
    return make(**options)
