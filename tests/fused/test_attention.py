"""Attention with its statistics: values and gradients of every kernel that this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from stitchvm_ext.fused.attention import attention, attention_input_grad, select_queries

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
GPU_BACKENDS = [*BACKENDS, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def inputs(dtype=torch.float64, device="cpu", queries=7, dim=8):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, n, 4, dim) for n in (queries, 9, 9)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def plain(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def check(backend, q, k, v, **tolerance):
    grad = torch.randn_like(q)
    expected = plain(q, k, v)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, statistics = attention(q, k, v, backend)
        torch.testing.assert_close(out, expected, **tolerance)
        grads = attention_input_grad(grad, q, k, v, out, statistics, backend)
        torch.testing.assert_close(grads, expected_grads, **tolerance)
        # some queries alone: their gradient, as if the others did not exist
        rows = torch.tensor([0, 2, 6], device=q.device)
        some, some_statistics = select_queries(out, statistics, rows)
        grads = attention_input_grad(grad[:, rows], q[:, rows], k, v, some, some_statistics, backend)
    expected_grads = torch.autograd.grad(plain(q[:, rows], k, v), (q, k, v), grad[:, rows])
    expected_grads = (expected_grads[0][:, rows], *expected_grads[1:])
    torch.testing.assert_close(grads, expected_grads, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cpu(backend):
    check(backend, *inputs(), rtol=1e-12, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_cuda(backend):
    check(backend, *inputs(torch.bfloat16, "cuda", dim=64), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_the_gpu_kernels_take_what_they_are_given(backend):
    """Their signatures, on tensors without data."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 4, 64, dtype=torch.bfloat16, device="cuda") for n in (64, 40, 40))
        out, statistics = attention(q, k, v, backend)
        out, statistics = select_queries(out, statistics, slice(0, 33))
        grads = attention_input_grad(out, q[:, :33], k, v, out, statistics, backend)
        assert [g.shape for g in grads] == [(2, 33, 4, 64), (2, 40, 4, 64), (2, 40, 4, 64)]
