"""The predicted peak of small models is the peak that is measured when the library runs them."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch

from stitchvm_ext.plan.count import count
from stitchvm_ext.plan.pieces import Pieces
from stitchvm_ext.plan.scenarios import Scenarios
from tests.plan.memory_run import BATCH, DEPTH, RESOLUTION, playground
from tests.programs import run_program


@pytest.fixture(scope="module")
def scenarios():
    with pytest.MonkeyPatch.context() as patch:
        architecture = playground(patch.setitem)
        yield Scenarios(Pieces(architecture, ["playground"], RESOLUTION, depth=DEPTH, layer=1), BATCH)


@pytest.fixture(scope="module")
def measured():
    """Peaks in bytes by what ran."""
    if not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/statm").exists():
        pytest.skip("needs glibc and /proc")
    return json.loads(run_program(Path(__file__).with_name("memory_run.py")))


def test_tweedie(scenarios, measured):
    assert scenarios.tweedie(checkpoint=False, cond_only=False).peak == pytest.approx(measured["tweedie"], rel=0.1)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_stitched(scenarios, measured, memory):
    assert scenarios.shared(memory).peak == pytest.approx(measured[f"shared, {memory}"], rel=0.1)
    assert scenarios.value_grad(memory).peak == pytest.approx(measured[f"own, {memory}"], rel=0.1)


def test_kept_and_freed_memory_is_counted_to_the_byte():
    def forward():
        a = torch.ones(1000)
        b = a * 2
        return b.view(10, 100), a + 1  # a goes, its kin stay

    cost = count(forward)
    assert (cost.peak, cost.kept) == (12000, 8000)
