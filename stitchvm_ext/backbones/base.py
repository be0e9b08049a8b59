"""The base class of diffusion backbones: one adapter per architecture, 5 to 30 lines each.

An adapter answers three questions about a diffusers transformer: which keyword arguments a latent, a noise level and
a text become; what token grid a latent has; and how texts are encoded. Everything else (truncation, features,
velocity, the shared prefix) is written once, here.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..fused.function import Want, is_compiled
from ..fused.fused_forward import FusedForward, fused_blocks
from .condition import Condition, Encoding

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


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Every block of a transformer in running order."""
    return [block for name in BLOCK_LISTS if name in transformer._modules for block in transformer._modules[name]]


def _sample_weights(block: nn.Module, count: int = 8) -> list[float]:
    """A few entries of the block's first matrix: enough to tell two trainings apart, stable under rounding to
    bfloat16.
    """
    matrix = next(p for p in block.parameters() if p.ndim == 2)
    return [round(v, 6) for v in matrix.detach().flatten()[:: max(1, matrix.numel() // count)][:count].float().tolist()]


def truncate(transformer: nn.Module, depth: int) -> nn.Module:
    """A shell of ``transformer`` that runs only its first ``depth`` blocks. It shares every parameter and copies none.

    The tokens that leave the last kept block are read from ``shell.norm_out.tokens`` after a call.
    """
    shell = copy.copy(transformer)
    shell._modules = dict(transformer._modules)
    # A hooked or compiled original carries an instance-level forward that would run the whole model.
    shell.__dict__.pop("forward", None)
    shell.__dict__["_compiled_call_impl"] = None
    left = depth
    for name in BLOCK_LISTS:
        if name in shell._modules:
            blocks = list(shell._modules[name])
            shell._modules[name] = nn.ModuleList(blocks[:left])
            left = max(0, left - len(blocks))
    shell._modules["norm_out"] = _Tap(shell._modules["norm_out"])
    return shell


class DiffusionBackbone:
    """A frozen diffusion transformer seen as a stack of blocks over image tokens.

    Latents are [B, C, H, W]; sigma is a float or a tensor [B] in [0, 1], 1 = noise; tokens are [B, N, width] in
    row-major order of the token grid. Subclasses set ``image_tokens_index`` (where a block's output holds the image
    tokens) and implement :meth:`inputs`, :meth:`encode_text` and :meth:`grid`.
    """

    image_tokens_index: int = 1

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.depth = len(blocks_of(transformer))
        self._shells: dict[int, nn.Module] = {}

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Channels of an image token."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError

    def grid(self, latent_hw: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of a latent of size (H, W). Raises ValueError for a size that the patches do not divide."""
        raise NotImplementedError

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        """The transformer's keyword arguments, ``return_dict`` aside."""
        raise NotImplementedError

    def read_inputs(self, call: dict[str, Any]) -> tuple[Tensor, float, Encoding, bool]:
        """The inverse of :meth:`inputs`, for a pipeline's call: latents, sigma, encoding, and whether the call
        holds nothing that changes the blocks (ControlNet residuals, attention arguments).
        """
        raise NotImplementedError

    def encode_text(self, pipe, prompts: list[str], **options) -> Encoding:
        """Encode texts by the pipeline's own text encoders, one row each."""
        raise NotImplementedError

    # -- identity ------------------------------------------------------------------------------------------------------

    def fingerprint(self, depth: int) -> dict[str, Any]:
        """What a saved value model remembers of the backbone: its class, width and depth, and a few weights of each
        kept block.
        """
        return {
            "class": type(self.transformer).__name__,
            "width": self.width,
            "depth": self.depth,
            "latent_channels": self.latent_channels,
            "weights": [_sample_weights(block) for block in blocks_of(self.transformer)[:depth]],
        }

    def check_fingerprint(self, expected: dict[str, Any], depth: int) -> None:
        """Raises ValueError unless this backbone is the one that ``expected`` was taken from, whatever its dtype."""
        got = self.fingerprint(depth)
        for name in ("class", "width", "depth", "latent_channels"):
            if got[name] != expected[name]:
                raise ValueError(
                    f"pipe: the value model was made for a backbone with {name} {expected[name]}, got {got[name]}"
                )
        for number, (mine, theirs) in enumerate(zip(got["weights"], expected["weights"], strict=True), 1):
            if not torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=2**-6, atol=1e-4):
                raise ValueError(
                    f"pipe: the value model was made for other backbone weights; they differ in block {number}"
                )

    # -- written once --------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def null_condition(self, pipe, **options) -> Encoding:
        """One row: the empty prompt through the pipeline's text encoders (METHOD.md §2)."""
        return self.encode_text(pipe, [""], **options)

    def check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth (i): expected a number of kept blocks in 1..{self.depth}, got {depth}")

    def check_latents(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """Validate a call's latents and return sigma as a float32 tensor [B]."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents: expected shape [B, {self.latent_channels}, H, W], got {list(latents.shape)}")
        if not latents.is_floating_point():
            raise TypeError(f"latents: expected a floating-point tensor, got {latents.dtype}")
        if latents.device != self.device:
            raise ValueError(f"latents: expected them on {self.device}, where the backbone is, got {latents.device}")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] != latents.shape[0]):
            raise ValueError(f"sigma: expected one noise level or {latents.shape[0]}, got shape {list(sigma.shape)}")
        if not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(
                f"sigma: expected noise levels in [0, 1], got {sigma.min().item():g}..{sigma.max().item():g}"
            )
        return sigma.expand(latents.shape[0])

    def truncated(self, depth: int) -> nn.Module:
        """The shell of the first ``depth`` blocks, made once per depth."""
        self.check_depth(depth)
        if depth not in self._shells:
            self._shells[depth] = truncate(self.transformer, depth)
        return self._shells[depth]

    def features(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        encoding: Encoding,
        depth: int,
        *,
        rows: Tensor | None = None,
        memory: str = "save",
    ) -> Tensor:
        """Image tokens [B, N, width] after block ``depth``: ``u_{<=i}(z_t, t)`` of METHOD.md §2.

        The transformer is taken as frozen: the tokens are differentiable with respect to the latents alone. Blocks that
        the fused ops know run on them.

        Args:
            rows: int64 [R], the tokens that the caller reads; what the others hold is not defined. The last block then
                computes no others, forward and backward, and no text stream.
            memory: what fused blocks keep for the backward, "save" or "recompute".
        """
        sigma = self.check_latents(latents, sigma)
        shell = self.truncated(depth)
        with frozen(self.transformer), fused_blocks(*self._prefix(depth, rows, memory, prune=True)):
            shell(**self.inputs(latents, sigma, encoding), return_dict=False)
        tokens, shell.norm_out.tokens = shell.norm_out.tokens, None
        return tokens

    def fused(self):
        """A context in which every block that the fused ops know runs on them, whoever calls the transformer.

        Blocks that are fused already keep their memory level; a compiled transformer is left as it is.
        """
        if is_compiled(self.transformer):
            return nullcontext()
        blocks = [b for b in blocks_of(self.transformer) if not isinstance(b.__dict__.get("forward"), FusedForward)]
        return fused_blocks(blocks, [Want()] * len(blocks))

    def _prefix(self, depth: int, rows: Tensor | None, memory: str, prune: bool) -> tuple[list[nn.Module], list[Want]]:
        """The first ``depth`` blocks and what each has to yield."""
        wants = [Want(memory=memory)] * (depth - 1) + [Want(rows, prune, memory)]
        return blocks_of(self.transformer)[:depth], wants

    def all_features(self, latents: Tensor, sigma: float | Tensor, encoding: Encoding) -> list[Tensor]:
        """Image tokens after every block, from one forward pass."""
        sigma = self.check_latents(latents, sigma)
        kept: list[Tensor] = []
        index = self.image_tokens_index
        keep = lambda module, args, output: kept.append(output[index] if isinstance(output, tuple) else output)  # noqa: E731
        handles = [block.register_forward_hook(keep) for block in blocks_of(self.transformer)]
        try:
            self.transformer(**self.inputs(latents, sigma, encoding), return_dict=False)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def velocity(self, latents: Tensor, sigma: float | Tensor, encoding: Encoding) -> Tensor:
        """u_t(z_t), an estimate of ``E[eps - z_0 | z_t]`` (METHOD.md §1), like ``latents``."""
        sigma = self.check_latents(latents, sigma)
        return self.transformer(**self.inputs(latents, sigma, encoding), return_dict=False)[0]

    def branches(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity, both in one call as diffusers' pipelines make it; the second is None
        without classifier-free guidance.
        """
        sigma = self.check_latents(latents, sigma)
        if condition.guidance_scale <= 1:
            return self.velocity(latents, sigma, condition.cond), None
        both = {name: torch.cat([condition.uncond[name], t]) for name, t in condition.cond.items()}
        uncond, cond = self.velocity(torch.cat([latents] * 2), sigma.repeat(2), both).chunk(2)
        return cond, uncond

    def guided_velocity(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        """Velocity with classifier-free guidance."""
        return condition.guide(*self.branches(latents, sigma, condition))

    def velocity_and_features(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        encoding: Encoding,
        depth: int,
        *,
        rows: Tensor | None = None,
        memory: str = "save",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One full forward pass that also yields differentiable features: the shared prefix.

        The first ``depth`` blocks run with autograd on, the rest without, so the pass costs what a plain one costs and
        keeps the activations of the prefix alone. ``rows`` and ``memory`` as for :meth:`features`; the forward is
        whole, the backward of the last block looks at ``rows`` only.

        Returns:
            velocity like ``latents`` (detached); tokens [B, N, width] after block ``depth``; the leaf that they are
            differentiable with respect to, a copy of ``latents``.
        """
        sigma = self.check_latents(latents, sigma)
        self.check_depth(depth)
        index = self.image_tokens_index
        captured: list[Tensor] = []

        def cut(module, args, output):
            captured.append(output[index] if isinstance(output, tuple) else output)
            torch.set_grad_enabled(False)
            if isinstance(output, tuple):
                return tuple(o.detach() if isinstance(o, Tensor) else o for o in output)
            return output.detach()

        with torch.inference_mode(False):
            leaf = latents.detach().clone().requires_grad_()
        handle = blocks_of(self.transformer)[depth - 1].register_forward_hook(cut)
        prefix = fused_blocks(*self._prefix(depth, rows, memory, prune=False))
        try:
            with frozen(self.transformer), torch.inference_mode(False), torch.enable_grad(), prefix:
                velocity = self.transformer(**self.inputs(leaf, sigma, encoding), return_dict=False)[0]
        finally:
            handle.remove()
        return velocity.detach(), captured[0], leaf


@contextmanager
def frozen(module: nn.Module):
    """No parameter of ``module`` requires a gradient inside the block; restored afterwards."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
