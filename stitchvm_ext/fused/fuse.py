"""Run a transformer's blocks fused, and back."""

from __future__ import annotations

from torch import nn

from ..backbones.truncate import blocks_of
from .function import Want
from .fused_forward import FusedForward, is_joint_block
from .step_graph import StepGraph


def fuse(transformer: nn.Module, *, memory: str = "save", cuda_graph: bool = False) -> int:
    """Let every block of a diffusers transformer run on the fused ops, with the same parameters, until :func:`unfuse`.

    Sampling then makes fewer passes over memory; where gradients are wanted (frozen weights), they come from a backward
    for the activations alone. A block that carries adapters or quantised layers, is trained, or is called with
    attention arguments or under autocast, runs as it is.

    Args:
        transformer: with ``JointTransformerBlock``s, the blocks of Stable Diffusion 3 and 3.5.
        memory: what a pass with gradients keeps: "save" or "recompute", see :class:`Want`.
        cuda_graph: on a CUDA device, capture whole passes without gradients as CUDA graphs, see :class:`StepGraph`.

    Returns:
        The number of fused blocks.

    Raises:
        ValueError: none of the blocks can be fused; or an unknown memory level.
    """
    want = Want(memory=memory)
    blocks = blocks_of(transformer)
    unfuse(transformer)
    fused = [block for block in blocks if is_joint_block(block)]
    if not fused:
        kinds = sorted({type(block).__name__ for block in blocks})
        raise ValueError(
            "transformer: expected JointTransformerBlocks (SD 3, SD 3.5) with plain linear layers, got "
            f"{', '.join(kinds) or type(transformer).__name__}"
        )
    for block in fused:
        block.forward = FusedForward(block, want)
    if cuda_graph:
        transformer.forward = StepGraph(transformer)
    return len(fused)


def unfuse(transformer: nn.Module) -> None:
    """Undo :func:`fuse`. Does nothing where it was not called."""
    for module in transformer.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward | StepGraph):
            del module.forward
