"""Softmax attention that hands out what its backward needs, so that a block's backward can be written by hand.

Autograd's attention cannot be told to keep its output and statistics while queries, keys and values are recomputed.
These functions call the very kernels that ``F.scaled_dot_product_attention`` would choose, forward and backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> tuple[Tensor, tuple]:
    """``softmax(q kᵀ / sqrt(D)) v``.

    Args:
        q: [B, Nq, H, D]; k and v: [B, N, H, D]. Any strides with a contiguous last dimension.
        backend: the kernel; by default the one that PyTorch chooses for these tensors.

    Returns:
        [B, Nq, H, D]; and the statistics that :func:`attention_input_grad` takes: the log-sum-exp first, then what the
        kernel adds, tensors and integers.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    backend = choose(q, k, v) if backend is None else backend
    if backend == SDPBackend.FLASH_ATTENTION and q.device.type == "cpu":
        out, *statistics = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif backend == SDPBackend.FLASH_ATTENTION:
        # out, log-sum-exp, four sizes, two of the random state, a debug mask
        out, *statistics = aten._scaled_dot_product_flash_attention(q, k, v)[:8]
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, *statistics = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:8]
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        out, *statistics = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        scores = _scores(q, k)
        log_sum = scores.logsumexp(-1)
        out, statistics = (scores - log_sum[..., None]).exp().to(v.dtype) @ v, [log_sum]
    return out.transpose(1, 2), (*statistics,)


def attention_input_grad(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: tuple,
    backend: SDPBackend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes, from ``grad`` of :func:`attention`'s output. All [B, N, H, D]."""
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    backend = choose(q, k, v) if backend is None else backend
    log_sum, *rest = statistics
    if backend == SDPBackend.FLASH_ATTENTION and q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, log_sum, 0.0, False)
    elif backend == SDPBackend.FLASH_ATTENTION:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, log_sum, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
        )
    elif backend == SDPBackend.CUDNN_ATTENTION:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        seed, offset = rest
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, log_sum, seed, offset, 0.0, [True, True, True, False]
        )[:3]
    else:
        weights = (_scores(q, k) - log_sum[..., None]).exp()
        products = (grad.to(weights.dtype) @ v.to(weights.dtype).mT) - (grad * out).sum(-1, True, dtype=weights.dtype)
        inner = (weights * products / math.sqrt(q.shape[-1])).to(q.dtype)
        grads = inner @ k, inner.mT @ q, weights.to(grad.dtype).mT @ grad
    return tuple(t.transpose(1, 2) for t in grads)


def select_queries(out: Tensor, statistics: tuple, rows: Tensor | slice) -> tuple[Tensor, tuple]:
    """Output and statistics of some queries alone, as :func:`attention` would have given them for these queries."""
    queries = out.shape[1]
    log_sum, *rest = statistics  # [B, H, Nq] or [B, H, Nq, 1]
    out, log_sum = out[:, rows], log_sum[:, :, :queries][:, :, rows].contiguous()
    if len(rest) == 6:  # flash and cuDNN: the third is the number of queries
        rest[2] = out.shape[1]
    elif len(rest) == 2:  # memory-efficient: rows padded to a multiple of 32
        log_sum = F.pad(log_sum, (0, -log_sum.shape[2] % 32))
    return out, (log_sum, *rest)


def choose(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """The kernel that ``F.scaled_dot_product_attention`` uses for [B, H, N, D] tensors.

    It pads other head dimensions than multiples of 8 for the GPU kernels; here these take the plain formula.
    """
    if q.device.type != "cpu" and q.shape[-1] % 8:
        return SDPBackend.MATH
    return SDPBackend(torch._fused_sdp_choice(q, k, v))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """``q kᵀ / sqrt(D)`` in float32, or float64 for float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.shape[-1])
