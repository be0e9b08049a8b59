"""Fixtures for all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def exact_rms_norm(monkeypatch):
    """diffusers takes the variance of float64 tensors in float32; with this it is the formula itself."""
    from diffusers.models.normalization import RMSNorm

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)
