"""How an inference-time method and its options are given on the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from ..sampling import FK, METHODS, SVDD, BestOfN, Guidance, Search

MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class FKSteering(FK):
    __doc__ = FK.__doc__
    guidance: tyro.conf.Suppress[None] = None  # of "dps+fk" the options of dps


@dataclass(frozen=True)
class Method:
    """The inference-time method. Options of methods that are not chosen are refused.

    Attributes:
        method: "dps" guides by the value's gradient; "fk" steers weighted particles, "dps+fk" guided ones; "best_of_n"
            keeps the best of several samples, "svdd" the best of several proposals at every step; "search" proposes
            until the value improves, within a budget.
        dps: of dps and dps+fk.
        fk: of fk and dps+fk.
        best_of_n: of best_of_n.
        svdd: of svdd.
        search: of search.
    """

    method: MethodName = "dps"
    dps: Guidance = Guidance()
    fk: FKSteering = FKSteering()
    best_of_n: BestOfN = BestOfN()
    svdd: SVDD = SVDD()
    search: Search = Search()

    def options(self) -> dict[str, Any]:
        """The chosen method's, as keywords. Raises ValueError where another's were given."""
        chosen = self.method.split("+")
        for group in fields(self)[1:]:
            if group.name not in chosen and getattr(self, group.name) != group.default:
                raise ValueError(f"{group.name}: expected no options of it with --method {self.method}")
        options = vars(getattr(self, chosen[-1]))
        return {**options, "guidance": self.dps} if self.method == "dps+fk" else dict(options)


MethodOptions = Annotated[Method, tyro.conf.arg(name="")]
