"""Fixtures for all tests, and how many workers of pytest-xdist share the machine."""

from __future__ import annotations

import os

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Before PyTorch is imported: workers divide the cores, as do the programs that their tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What ``-n auto`` means. A worker may hold several GB: four of them fit next to each other."""
    return min(CORES, 4)


@pytest.fixture
def exact_rms_norm(monkeypatch):
    """diffusers takes the variance of float64 tensors in float32; with this it is the formula itself."""
    from diffusers.models.normalization import RMSNorm

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)
