"""The truncated shell: a diffusers model that runs only its first blocks and shares every parameter."""

from __future__ import annotations

import copy

from torch import Tensor, nn

# The names under which diffusers' transformers keep their blocks, in the order in which they run.
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


class _Tap(nn.Module):
    """Stands before the final norm of a truncated transformer and keeps the tokens that enter it."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.tokens: Tensor | None = None

    def forward(self, tokens: Tensor, *args, **kwargs):
        self.tokens = tokens
        return self.norm(tokens, *args, **kwargs)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Every block of a transformer, or of a U-Net (down, middle, up), in running order."""
    if "down_blocks" in denoiser._modules:
        middle = [denoiser.mid_block] if denoiser.mid_block is not None else []
        return [*denoiser.down_blocks, *middle, *denoiser.up_blocks]
    return [block for name in BLOCK_LISTS if name in denoiser._modules for block in denoiser._modules[name]]


def truncate(transformer: nn.Module, depth: int) -> nn.Module:
    """A shell of ``transformer`` that runs only its first ``depth`` blocks. It shares every parameter and copies none.

    The tokens that leave the last kept block are read from ``shell.norm_out.tokens`` after a call.
    """
    shell = shell_of(transformer)
    left = depth
    for name in BLOCK_LISTS:
        if name in shell._modules:
            blocks = list(shell._modules[name])
            shell._modules[name] = nn.ModuleList(blocks[:left])
            left = max(0, left - len(blocks))
    shell._modules["norm_out"] = _Tap(shell._modules["norm_out"])
    return shell


def truncate_unet(unet: nn.Module, depth: int) -> nn.Module:
    """A shell of a ``UNet2DConditionModel`` that runs its first ``depth`` down blocks and returns the feature map that
    leaves the last of them. It shares every parameter and copies none.
    """
    shell = shell_of(unet)
    shell._modules["down_blocks"] = nn.ModuleList(list(unet.down_blocks)[:depth])
    shell._modules["mid_block"] = None
    shell._modules["up_blocks"] = nn.ModuleList()
    shell._modules["conv_norm_out"] = None
    shell._modules["conv_out"] = nn.Identity()
    return shell


def shell_of(module: nn.Module) -> nn.Module:
    """A copy with a module table of its own, over the same modules."""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    # A hooked or compiled original carries an instance-level forward that would run the whole model.
    shell.__dict__.pop("forward", None)
    shell.__dict__["_compiled_call_impl"] = None
    return shell
