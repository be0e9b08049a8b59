"""Lets diffusers' joint blocks run fused: which modules these are, and the forward that stands in for theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..offload import hooked_device, weights_leave
from .function import Want, is_compiled, is_frozen, is_plain_linear
from .joint_block import joint_block

QK_NORM_EPS = 1e-6  # what ops.qk_norm adds by default


def is_joint_block(block: nn.Module) -> bool:
    """Whether :func:`joint_block` computes what this module computes: diffusers' block, with plain linear layers."""
    forward = block.__dict__.get("forward")  # somebody else's hook on the block's forward would be lost
    ours = (forward is None or isinstance(forward, FusedForward)) and not is_compiled(block)
    return ours and type(block).__name__ == "JointTransformerBlock" and _is_standard(block)


class FusedForward:
    """Stands in for ``JointTransformerBlock.forward``."""

    def __init__(self, block: nn.Module, want: Want):
        self.block, self.want = block, want

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        plain = (
            bool(joint_attention_kwargs)
            or torch.is_autocast_enabled(hidden_states.device.type)
            or (torch.is_grad_enabled() and (temb.requires_grad or not is_frozen(self.block)))
            or weights_leave()
            or hooked_device(self.block.attn.to_q) is not None  # offloaded by layer: there only while it is called
        )
        if plain:
            return type(self.block).forward(
                self.block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
        return joint_block(self.block, hidden_states, encoder_hidden_states, temb, self.want)


@contextmanager
def fused_blocks(blocks: Sequence[nn.Module], wants: Sequence[Want]) -> Iterator[None]:
    """Within the ``with``, blocks that can be fused run fused and yield what is wanted; hooks on them still run."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, want in zip(blocks, wants, strict=True):
            if is_joint_block(block):
                block.forward = FusedForward(block, want)
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            if isinstance(block.__dict__.get("forward"), FusedForward):
                del block.forward
                if old is not None:
                    block.forward = old


def _is_standard(block: nn.Module) -> bool:
    """A block as diffusers builds it for SD3, SD3.5 Medium and Large (no dropout), whose parts are all plain."""
    attentions = [block.attn, *([block.attn2] if block.attn2 is not None else [])]
    linears = [block.ff.net[0].proj, block.ff.net[2], *_linears(block.attn, block.context_pre_only)]
    if block.attn2 is not None:
        linears += [getattr(block.attn2, name) for name in ("to_q", "to_k", "to_v")] + [block.attn2.to_out[0]]
    if not block.context_pre_only:
        linears += [block.ff_context.net[0].proj, block.ff_context.net[2]]
    return (
        all(is_plain_linear(linear) for linear in linears)
        and all(type(attn.processor).__name__ == "JointAttnProcessor2_0" for attn in attentions)
        and all(_is_plain_qk_norm(attn) for attn in attentions)
        and getattr(block.ff.net[0], "approximate", None) == "tanh"
        and block._chunk_size is None
    )


def _linears(attn: nn.Module, text_ends: bool) -> list[nn.Module]:
    names = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", *([] if text_ends else ["to_add_out"])]
    return [attn.to_out[0], *(getattr(attn, name) for name in names)]


def _is_plain_qk_norm(attn: nn.Module) -> bool:
    """No norm, or RMSNorm with weights of which none is zero: the backward divides by them."""
    norms = [getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    return all(norm is None or (_is_plain_rms_norm(norm) and _has_no_zero(norm)) for norm in norms)


def _is_plain_rms_norm(norm: nn.Module) -> bool:
    plain = type(norm).__name__ == "RMSNorm" and norm.weight is not None and norm.bias is None
    return plain and norm.eps == QK_NORM_EPS


_checked: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()  # norm -> its weight when looked at


def _has_no_zero(norm: nn.Module) -> bool:
    """Looked at once for a state of the weight: on a GPU every look is a synchronisation."""
    weight = norm.weight
    if isinstance(weight, FakeTensor):  # shapes alone, for counting: taken to be as the published ones are
        return True
    if weight.is_inference():  # made in inference mode: it does not tell its changes
        return not bool((weight == 0).any())
    state = weight.data_ptr(), weight._version
    if _checked.get(norm) != state:
        if bool((weight == 0).any()):
            return False
        _checked[norm] = state
    return True
