"""open_clip's pre-norm vision transformer block, fused: few passes over memory, a backward for activations alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.activation import KINDS, activation, activation_input_grad
from ..ops.residual_norm import residual_norm, residual_norm_input_grad
from .attention import attention, attention_input_grad
from .function import (
    Want,
    drop,
    is_compiled,
    is_frozen,
    is_plain_linear,
    linear_input_grad,
    load,
    named_statistics,
    refuse_second_derivative,
    save,
    select,
    statistics_of,
    undrop,
)

ACTIVATIONS = {"QuickGELU": KINDS["quick_gelu"], "GELU": KINDS["gelu"]}


def is_vit_block(block: nn.Module, tokens: Tensor) -> bool:
    """Whether :func:`vit_block` computes what this module computes: open_clip's standard block, frozen, unadapted."""
    if torch.is_autocast_enabled(tokens.device.type) or is_compiled(block):
        return False
    if type(block).__name__ != "ResidualAttentionBlock" or hasattr(block, "ln_1_kv") or "forward" in block.__dict__:
        return False
    attn, act = block.attn, block.mlp.gelu
    return (
        type(attn) is nn.MultiheadAttention
        and type(attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
        and attn.batch_first
        and attn.in_proj_weight is not None
        and attn.in_proj_bias is not None
        and attn.bias_k is None
        and (attn.dropout == 0 or not attn.training)
        and type(block.ln_1).__name__ == type(block.ln_2).__name__ == "LayerNorm"
        and block.ln_1.bias is not None
        and type(act).__name__ in ACTIVATIONS
        and getattr(act, "approximate", "none") == "none"
        and is_plain_linear(block.mlp.c_fc)
        and is_plain_linear(block.mlp.c_proj)
        and is_frozen(block)
    )


def vit_block(block: nn.Module, tokens: Tensor, memory: str = "save", rows: Tensor | None = None) -> Tensor:
    """open_clip's ``ResidualAttentionBlock`` on tokens [B, N, C], differentiable with respect to them.

    With ``rows``, int64 [R], only these tokens are computed; the others come out as zeros.
    """
    want = Want(rows, prune=rows is not None, memory=memory)
    if torch.is_grad_enabled() and tokens.requires_grad:
        return _VitBlock.apply(tokens, block, want)
    return forward(block, tokens, want, None)


class _VitBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, block, want):
        state: dict[str, Any] = {"tokens": tokens}
        out = forward(block, tokens, want, state)
        if want.memory == "recompute":
            drop(ctx, state, ("q", "k", "v", "pre"))
        save(ctx, state)
        ctx.block, ctx.want = block, want
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        if ctx.want.memory == "recompute":
            undrop(ctx)
        return backward(ctx.block, grad, load(ctx), ctx.want), None, None


def forward(block: nn.Module, tokens: Tensor, want: Want, state: dict[str, Any] | None) -> Tensor:
    """Tokens after the block. What the backward needs is put into ``state``, if one is given."""
    q, k, v = _qkv(block, tokens, want.rows)
    out, statistics = attention(q, k, v)
    middle, y, _ = residual_norm(
        select(tokens, want.rows), branch=block.attn.out_proj(out.flatten(2)), gate=_layer_scale(block.ls_1),
        scale=block.ln_2.weight[None], shift=block.ln_2.bias[None], affine=True, eps=block.ln_2.eps,
    )  # fmt: skip
    pre = block.mlp.c_fc(y)
    branch = block.mlp.c_proj(activation(pre, _kind(block)))
    if state is not None:
        state.update(q=q, k=k, v=v, out=out, middle=middle, pre=pre)
        state.update(named_statistics(statistics))
    result, _, _ = residual_norm(middle, branch=branch, gate=_layer_scale(block.ls_2))
    return result if want.rows is None else torch.zeros_like(tokens).index_copy_(1, want.rows, result)


def backward(block: nn.Module, grad: Tensor, state: dict[str, Any], want: Want) -> Tensor:
    """The gradient of the block's input from that of its output, both [B, N, C]."""
    tokens, middle, rows = state["tokens"], state["middle"], want.rows
    q, k, v = _qkv(block, tokens, rows) if want.memory == "recompute" else (state[name] for name in "qkv")
    pre = block.mlp.c_fc(_norm(block.ln_2, middle)) if want.memory == "recompute" else state["pre"]
    grad = select(grad, rows)
    branch_grad = _scaled(grad, block.ls_2)
    pre_grad = activation_input_grad(linear_input_grad(branch_grad, block.mlp.c_proj), pre, _kind(block))
    middle_grad, branch_grad, _ = residual_norm_input_grad(
        grad_residual=grad, grad_y=linear_input_grad(pre_grad, block.mlp.c_fc), residual=middle,
        gate=_layer_scale(block.ls_1), scale=block.ln_2.weight[None], affine=True, eps=block.ln_2.eps,
    )  # fmt: skip
    branch_grad = middle_grad if branch_grad is None else branch_grad
    out_grad = linear_input_grad(branch_grad, block.attn.out_proj).unflatten(-1, q.shape[2:])
    q_grad, k_grad, v_grad = attention_input_grad(out_grad, q, k, v, state["out"], statistics_of(state))
    weight, width = block.attn.in_proj_weight, tokens.shape[-1]
    if rows is None:
        y_grad = torch.stack([q_grad, k_grad, v_grad], dim=2).flatten(2) @ weight
    else:
        y_grad = torch.stack([k_grad, v_grad], dim=2).flatten(2) @ weight[width:]
        y_grad.index_add_(1, rows, q_grad.flatten(2) @ weight[:width])
        middle_grad = torch.zeros_like(tokens).index_copy_(1, rows, middle_grad)
    return residual_norm_input_grad(
        grad_residual=middle_grad, grad_y=y_grad, residual=tokens,
        scale=block.ln_1.weight[None], affine=True, eps=block.ln_1.eps,
    )[0]  # fmt: skip


def _qkv(block: nn.Module, tokens: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, R or N, H, D], k and v [B, N, H, D], in one product or, for some queries, two."""
    y = _norm(block.ln_1, tokens)
    weight, bias, width = block.attn.in_proj_weight, block.attn.in_proj_bias, tokens.shape[-1]
    heads = (block.attn.num_heads, width // block.attn.num_heads)
    if rows is None:
        return F.linear(y, weight, bias).unflatten(-1, (3, *heads)).unbind(2)
    q = F.linear(y.index_select(1, rows), weight[:width], bias[:width]).unflatten(-1, heads)
    return q, *F.linear(y, weight[width:], bias[width:]).unflatten(-1, (2, *heads)).unbind(2)


def _kind(block: nn.Module) -> int:
    return ACTIVATIONS[type(block.mlp.gelu).__name__]


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return residual_norm(x, scale=norm.weight[None], shift=norm.bias[None], affine=True, eps=norm.eps)[1]


def _layer_scale(scale: nn.Module) -> Tensor | None:
    return scale.gamma[None] if hasattr(scale, "gamma") else None


def _scaled(grad: Tensor, scale: nn.Module) -> Tensor:
    gate = _layer_scale(scale)
    return grad if gate is None else residual_norm_input_grad(grad_residual=grad, gate=gate)[1]
