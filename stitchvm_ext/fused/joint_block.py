"""Stable Diffusion 3's joint image-text block, fused: its forward from few passes over memory, and a backward for the
activations alone.

The block's weights are frozen, so the backward needs no layer inputs: it keeps the block's input, q, k, v, the
attention's output and statistics, the middle of the residual stream and the image MLP's pre-activation. At the
"recompute" level q, k, v and the pre-activation are made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.activation import KINDS, activation, activation_input_grad
from ..ops.qk_norm import QKV, qk_norm, qk_norm_input_grad
from ..ops.residual_norm import residual_norm, residual_norm_input_grad
from .attention import attention, attention_input_grad, select_queries
from .function import (
    Want,
    drop,
    linear_input_grad,
    load,
    named_statistics,
    refuse_second_derivative,
    save,
    select,
    statistics_of,
    undrop,
)
from .modulation import Modulation, modulation

MLP_KIND = KINDS["gelu_tanh"]
RECOMPUTED = ("q", "k", "v", "q_rstd", "k_rstd", "q2", "k2", "v2", "q_rstd2", "k_rstd2", "pre")


def joint_block(
    block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, want: Want
) -> tuple[Tensor | None, Tensor]:
    """diffusers' ``JointTransformerBlock.forward``: text [B, M, C] (None where it is not wanted) and image [B, N, C].

    Differentiable with respect to the two streams. ``temb`` [B, C] must not require grad.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or encoder_hidden_states.requires_grad)
    if needs_grad:
        image, text = _JointBlock.apply(hidden_states, encoder_hidden_states, block, temb, want)
    else:
        image, text = forward(block, hidden_states, encoder_hidden_states, temb, want, None)
    return text, image


class _JointBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, block, temb, want):
        state: dict[str, Any] = {"image": image}
        image, text_out = forward(block, image, text, temb, want, state)
        if ctx.needs_input_grad[1] or want.memory == "recompute":
            state["text"] = text
        if want.memory == "recompute":
            drop(ctx, state, RECOMPUTED, instead=0 if ctx.needs_input_grad[1] else text.nbytes)
        save(ctx, state)
        ctx.block, ctx.want = block, want
        ctx.set_materialize_grads(False)
        return image, text_out

    @staticmethod
    def backward(ctx, grad, text_grad):
        refuse_second_derivative()
        if ctx.want.memory == "recompute":
            undrop(ctx)
        image_grad, text_grad = backward(
            ctx.block, grad, text_grad, load(ctx), ctx.want, text_needs_grad=ctx.needs_input_grad[1]
        )
        return image_grad, text_grad, None, None, None


# -- the forward -------------------------------------------------------------------------------------------------------


class _Modulations(NamedTuple):
    """The vectors of one block, each [R, C], under diffusers' names."""

    image: Modulation  # shift, scale, gate, shift_mlp, scale_mlp, gate_mlp[, shift2, scale2, gate2]
    text: Modulation  # the same six, or (scale, shift) in a block whose text stream ends

    @property
    def text_norm(self) -> dict[str, Any]:
        if len(self.text.vectors) == 2:
            return {"scale": self.text.vectors[0], "shift": self.text.vectors[1], "rows": self.text.rows}
        return {"shift": self.text.vectors[0], "scale": self.text.vectors[1], "rows": self.text.rows}

    @property
    def image_norm(self) -> dict[str, Any]:
        shift, scale, _, _, _, _, *second = self.image.vectors
        norm = {"shift": shift, "scale": scale, "rows": self.image.rows}
        return {**norm, "shift2": second[0], "scale2": second[1]} if second else norm


def _modulations(block: nn.Module, temb: Tensor) -> _Modulations:
    return _Modulations(
        modulation(block.norm1, temb, 9 if block.attn2 is not None else 6),
        modulation(block.norm1_context, temb, 2 if block.context_pre_only else 6),
    )


def forward(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, want: Want, state: dict[str, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """Image and text stream after the block. What the backward needs is put into ``state``, if one is given."""
    m = _modulations(block, temb)
    gate, shift_mlp, scale_mlp, gate_mlp = m.image.vectors[2:6]
    gate2 = m.image.vectors[8] if block.attn2 is not None else None
    computed = want.rows if want.prune else None
    text_goes_on = not (block.context_pre_only or want.prune)
    keep = state.update if state is not None else lambda entries: None  # without a state nothing outlives its use

    y, y2, text_y = _normed(block, image, text, m)
    qkv = _joint_qkv(block.attn, y, text_y, computed, text_goes_on)
    del y, text_y
    out, statistics = attention(qkv.q, qkv.k, qkv.v)
    keep(_named("", qkv, out, statistics))
    del qkv
    n = image.shape[1] if computed is None else len(computed)
    branch = block.attn.to_out[0](out[:, :n].flatten(2))
    text_branch = block.attn.to_add_out(out[:, n:].flatten(2)) if text_goes_on else None
    branch2 = None
    if block.attn2 is not None:
        qkv = _second_qkv(block.attn2, y2, computed)
        out, statistics = attention(qkv.q, qkv.k, qkv.v)
        keep(_named("2", qkv, out, statistics))
        del qkv
        branch2 = block.attn2.to_out[0](out.flatten(2))
    del y2, out
    middle, y, _ = residual_norm(
        image if computed is None else image.index_select(1, computed),
        branch=branch, gate=gate, branch2=branch2, gate2=gate2,
        scale=scale_mlp, shift=shift_mlp, rows=m.image.rows, eps=block.norm2.eps,
    )  # fmt: skip
    pre = block.ff.net[0].proj(y)
    branch = block.ff.net[2](activation(pre, MLP_KIND))
    image_out, _, _ = residual_norm(middle, branch=branch, gate=gate_mlp, rows=m.image.rows)
    keep({"middle": middle, "pre": pre})
    del y, pre, branch, branch2

    text_out = None
    if text_goes_on:
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = m.text.vectors
        text_middle, y, _ = residual_norm(
            text, branch=text_branch, gate=gate,
            scale=scale_mlp, shift=shift_mlp, rows=m.text.rows, eps=block.norm2_context.eps,
        )  # fmt: skip
        text_pre = block.ff_context.net[0].proj(y)
        branch = block.ff_context.net[2](activation(text_pre, MLP_KIND))
        text_out, _, _ = residual_norm(text_middle, branch=branch, gate=gate_mlp, rows=m.text.rows)
        keep({"text_middle": text_middle})  # its pre-activation, a twelfth of the tokens, is made again

    if state is not None:
        state.update(modulations=m)
        if want.rows is not None and not want.prune:
            _restrict(state, want.rows)
    if computed is not None:
        image_out = torch.zeros_like(image).index_copy_(1, computed, image_out)
    return image_out, text_out


def _normed(block: nn.Module, image: Tensor, text: Tensor, m: _Modulations) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the joint attention, the image's own one (or None) and the joint one's text side read."""
    _, y, y2 = residual_norm(image, **m.image_norm, eps=block.norm1.norm.eps)
    _, text_y, _ = residual_norm(text, **m.text_norm, eps=block.norm1_context.norm.eps)
    return y, y2, text_y


def _joint_qkv(attn: nn.Module, y: Tensor, text_y: Tensor, rows: Tensor | None, text_queries: bool) -> QKV:
    """q, k, v of the joint attention; queries of the image's ``rows`` alone."""
    text_q = attn.add_q_proj(text_y) if text_queries else None
    return qk_norm(
        attn.to_q(select(y, rows)), attn.to_k(y), attn.to_v(y), heads=attn.heads,
        context=(text_q, attn.add_k_proj(text_y), attn.add_v_proj(text_y)), **_qk_weights(attn),
    )  # fmt: skip


def _second_qkv(attn: nn.Module, y: Tensor, rows: Tensor | None) -> QKV:
    """q, k, v of the image's own attention."""
    qkv = qk_norm(attn.to_q(select(y, rows)), attn.to_k(y), heads=attn.heads, **_qk_weights(attn, False))
    return qkv._replace(v=attn.to_v(y).unflatten(-1, (attn.heads, -1)))


# -- the backward ------------------------------------------------------------------------------------------------------


def backward(
    block: nn.Module,
    grad: Tensor | None,
    text_grad: Tensor | None,
    state: dict[str, Any],
    want: Want,
    text_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the block's image and text input from those of its outputs; None for a stream without one."""
    if grad is None and text_grad is None:
        return None, None
    image, m, rows = state["image"], state["modulations"], want.rows
    grad = torch.zeros_like(image) if grad is None else grad
    n = image.shape[1] if rows is None else len(rows)
    with_text_queries = rows is None and not block.context_pre_only
    if want.memory == "recompute":
        y, y2, text_y = _normed(block, image, state["text"], m)
        state.update(_named("", _joint_qkv(block.attn, y, text_y, rows, with_text_queries)))
        if block.attn2 is not None:
            state.update(_named("2", _second_qkv(block.attn2, y2, rows)))
        del y, y2, text_y
        state["pre"] = _pre_activation(block.ff, state["middle"], m.image, block.norm2.eps)

    _, _, gate, _, scale_mlp, gate_mlp, *second = m.image.vectors
    gate2 = second[2] if second else None
    middle_grad, branch_grad, branch2_grad = _mlp_input_grad(
        select(grad, rows), block.ff, state["pre"], state["middle"], block.norm2.eps, m.image.rows,
        gate_mlp=gate_mlp, scale_mlp=scale_mlp, gate=gate, gate2=gate2,
    )  # fmt: skip
    out_grad = linear_input_grad(branch_grad, block.attn.to_out[0])
    text_middle_grad = None
    if text_grad is not None:
        state["text_pre"] = _pre_activation(block.ff_context, state["text_middle"], m.text, block.norm2_context.eps)
        _, _, gate, _, scale_mlp, gate_mlp = m.text.vectors
        text_middle_grad, branch_grad, _ = _mlp_input_grad(
            text_grad, block.ff_context, state["text_pre"], state["text_middle"], block.norm2_context.eps, m.text.rows,
            gate_mlp=gate_mlp, scale_mlp=scale_mlp, gate=gate,
        )  # fmt: skip
        out_grad = torch.cat([out_grad, linear_input_grad(branch_grad, block.attn.to_add_out)], dim=1)
    elif with_text_queries:  # nobody read the text stream
        _keep_queries(state, slice(0, n))

    attn = block.attn
    tokens = image.shape[1]
    text_tokens = state["k"].shape[1] - tokens
    (q_grad, k_grad, text_q_grad, text_k_grad), v_grad = _attention_grad(
        attn, out_grad, state, "", text_q=0 if text_grad is None else text_tokens, text_k=text_tokens
    )
    y_grad = linear_input_grad(k_grad, attn.to_k)
    linear_input_grad(v_grad[:, :tokens], attn.to_v, into=y_grad)
    _add_query_grad(y_grad, q_grad, attn.to_q, rows)
    text_y_grad = None
    if text_needs_grad:
        text_y_grad = linear_input_grad(text_k_grad, attn.add_k_proj)
        linear_input_grad(v_grad[:, tokens:], attn.add_v_proj, into=text_y_grad)
        if text_q_grad is not None:
            linear_input_grad(text_q_grad, attn.add_q_proj, into=text_y_grad)
    y2_grad = None
    if block.attn2 is not None:
        attn = block.attn2
        out_grad = linear_input_grad(branch2_grad, attn.to_out[0])
        (q_grad, k_grad, _, _), v_grad = _attention_grad(attn, out_grad, state, "2")
        y2_grad = linear_input_grad(k_grad, attn.to_k)
        linear_input_grad(v_grad, attn.to_v, into=y2_grad)
        _add_query_grad(y2_grad, q_grad, attn.to_q, rows)

    if rows is not None:
        middle_grad = torch.zeros_like(image).index_copy_(1, rows, middle_grad)
    norm = m.image_norm
    image_grad, _, _ = residual_norm_input_grad(
        grad_residual=middle_grad, grad_y=y_grad, grad_y2=y2_grad, residual=image,
        scale=norm["scale"], scale2=norm.get("scale2"), rows=norm["rows"], eps=block.norm1.norm.eps,
    )  # fmt: skip
    if not text_needs_grad:
        return image_grad, None
    norm = m.text_norm
    text_grad, _, _ = residual_norm_input_grad(
        grad_residual=text_middle_grad, grad_y=text_y_grad, residual=state["text"],
        scale=norm["scale"], rows=norm["rows"], eps=block.norm1_context.norm.eps,
    )  # fmt: skip
    return image_grad, text_grad


def _mlp_input_grad(
    grad: Tensor, mlp: nn.Module, pre: Tensor, middle: Tensor, eps: float, rows: Tensor | None, *,
    gate_mlp: Tensor, scale_mlp: Tensor, gate: Tensor, gate2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Through ``middle + gate_mlp MLP(adaln(middle))``; then what the attention branches get: gate times that."""
    _, branch_grad, _ = residual_norm_input_grad(grad_residual=grad, gate=gate_mlp, rows=rows)
    pre_grad = activation_input_grad(linear_input_grad(branch_grad, mlp.net[2]), pre, MLP_KIND)
    return residual_norm_input_grad(
        grad_residual=grad, grad_y=linear_input_grad(pre_grad, mlp.net[0].proj), residual=middle,
        gate=gate, gate2=gate2, scale=scale_mlp, rows=rows, eps=eps,
    )  # fmt: skip


def _attention_grad(attn: nn.Module, out_grad: Tensor, state: dict[str, Any], which: str, text_q=0, text_k=0):
    """Gradients of the raw q, k, text q, text k [B, N, C], and of the joint v [B, S, C], from the output's."""
    q, k, v = (state[f"{name}{which}"] for name in "qkv")
    out, statistics = state[f"out{which}"], statistics_of(state, which)
    q_grad, k_grad, v_grad = attention_input_grad(out_grad.unflatten(-1, q.shape[2:]), q, k, v, out, statistics)
    joint = QKV(q, k, v, state[f"q_rstd{which}"], state[f"k_rstd{which}"])
    raw = qk_norm_input_grad(
        q_grad, k_grad, joint, context_q_tokens=text_q, context_k_tokens=text_k, **_qk_weights(attn, bool(text_k)),
    )  # fmt: skip
    return raw, v_grad.flatten(2)


def _add_query_grad(y_grad: Tensor, q_grad: Tensor, to_q: nn.Linear, rows: Tensor | None) -> None:
    if rows is None:
        linear_input_grad(q_grad, to_q, into=y_grad)
    else:
        y_grad.index_add_(1, rows, linear_input_grad(q_grad, to_q))


def _pre_activation(mlp: nn.Module, middle: Tensor, m: Modulation, eps: float) -> Tensor:
    """What the MLP's nonlinearity read in the forward, made again."""
    _, _, _, shift, scale, *_ = m.vectors
    return mlp.net[0].proj(residual_norm(middle, scale=scale, shift=shift, rows=m.rows, eps=eps)[1])


# -- the state ---------------------------------------------------------------------------------------------------------


def _named(which: str, qkv: QKV, out: Tensor | None = None, statistics: tuple = ()) -> dict[str, Any]:
    """Entries of a state for the joint attention (``which`` = "") or the second one ("2")."""
    names = {f"{name}{which}": value for name, value in qkv._asdict().items()}
    if out is not None:
        names[f"out{which}"] = out
    return {**names, **named_statistics(statistics, which)}


def _keep_queries(state: dict[str, Any], rows: Tensor | slice) -> None:
    """Restrict the queries of a state, and all that goes with them, to some image tokens."""
    for which in ("", "2"):
        if f"out{which}" not in state:
            continue
        for name in (f"q{which}", f"q_rstd{which}"):
            if name in state:
                state[name] = select(state[name], rows)
        out, statistics = select_queries(state[f"out{which}"], statistics_of(state, which), rows)
        state.update({f"out{which}": out, **named_statistics(statistics, which)})


def _restrict(state: dict[str, Any], rows: Tensor) -> None:
    """What the backward needs if only ``rows`` of the image stream have a gradient."""
    _keep_queries(state, rows)
    for name in ("middle", "pre"):
        state[name] = select(state[name], rows)
    state.pop("text_middle", None)


def _qk_weights(attn: nn.Module, with_text: bool = True) -> dict[str, Any]:
    norms = {"q_weight": attn.norm_q, "k_weight": attn.norm_k}
    if with_text:
        norms |= {"context_q_weight": attn.norm_added_q, "context_k_weight": attn.norm_added_k}
    return {name: None if norm is None else norm.weight for name, norm in norms.items()}
