"""The base class of diffusion backbones: one adapter per architecture, 10 to 40 lines each.

An adapter answers three questions about a diffusers model: which keyword arguments a latent, a noise level and a text
become; what token grid a latent has; and how texts are encoded. Everything else (truncation, features, velocity, the
shared prefix) is written once, here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..fused.function import Want, is_compiled
from ..fused.fused_forward import FusedForward, fused_blocks
from ..measure import count, phase
from ..offload import kept_for_backward, offload_device, partial_pass
from . import latents as autoencoder
from .condition import Condition, Encoding, stack_rows
from .process import ForwardProcess, RectifiedFlow
from .replay import map_outputs
from .truncate import blocks_of, truncate


class DiffusionBackbone:
    """A frozen diffusion model seen as a stack of blocks over image tokens.

    Latents are [B, C, H, W], of video models [B, C, T, H, W]; sigma is a float or a tensor [B] in [0, 1], the time of
    the rectified flow with 1 = noise, whatever process the model was trained on (see :class:`ForwardProcess`). Tokens
    are [B, N, width] in row-major order of the token grid, frame by frame. Subclasses implement :meth:`inputs`,
    :meth:`encode_text` and :meth:`grid`, and say where a block's output holds the image tokens.

    Attributes:
        denoiser: the pipeline's own transformer or U-Net.
        blocks: all its blocks in running order; those that carry adapters or hooks included.
        depth: how many places there are to cut: after block 1, 2, ... depth.
        process: the forward process.
    """

    truncate = staticmethod(truncate)  # makes the shell of the first blocks
    image_tokens_index: int = 1  # where a block's output tuple holds the image tokens; they are the last ones there
    is_video: bool = False
    text_options: tuple[str, ...] = ()  # names of the options of :meth:`encode_text`
    max_shift: float = 1.15  # of dynamic shifting, where the scheduler's configuration has none
    even_sigmas: bool = False  # the pipeline gives the scheduler sigmas 1 .. 1/T to shift, in place of its own
    float32_noise: bool = False  # the pipeline draws noise in float32, not in the denoiser's dtype
    distilled_guidance: bool = False  # guidance_scale is an input of the model, "guidance" in the text options
    rescale_guidance: Callable[[Tensor, Tensor], Tensor] | None = None  # of a :class:`Condition`

    def __init__(self, denoiser: nn.Module, process: ForwardProcess | None = None):
        self.denoiser = denoiser
        self.blocks = blocks_of(denoiser)
        self.depth = len(self.blocks)
        self.process = process or RectifiedFlow()
        self._shells: dict[int, tuple[dict[str, nn.Module], nn.Module]] = {}

    @classmethod
    def from_pipe(cls, pipe, denoiser: nn.Module) -> DiffusionBackbone:
        """The adapter of a pipeline's denoiser, or of a bare one (``pipe`` is then the denoiser itself)."""
        return cls(denoiser)

    # -- what a subclass says ------------------------------------------------------------------------------------------

    def width(self, depth: int = 1) -> int:
        """Channels of an image token after block ``depth``."""
        config = self.denoiser.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        """Token grid (h, w) after block ``depth`` of a latent of size (H, W): of one frame.

        Raises ValueError for a size that the patches do not divide.
        """
        raise NotImplementedError

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        """The denoiser's keyword arguments, ``return_dict`` aside, for latents in the model's own scale.

        Args:
            latents: what ``process.model_latents`` returned.
            sigma: float32 [B]; the model's time is ``process.timestep(sigma)``.
        """
        raise NotImplementedError

    def unpack(self, output: Tensor, latents: Tensor) -> Tensor:
        """The denoiser's first output in the shape of the latents: undoes what :meth:`inputs` did to them."""
        return output

    def pack(self, velocity: Tensor) -> Tensor:
        """The inverse of :meth:`unpack`."""
        return velocity

    def read_inputs(self, call: dict[str, Any]) -> tuple[Tensor, float, Encoding, bool]:
        """The inverse of :meth:`inputs`, for a pipeline's call: latents, sigma, encoding, and whether the call
        holds nothing that changes the blocks (ControlNet residuals, attention arguments).
        """
        raise TypeError(
            f"transformer: the calls of a pipeline with {type(self.denoiser).__name__} cannot be guided from within; "
            "use guided_sample"
        )

    def encode_text(self, pipe, prompts: list[str], **options) -> Encoding:
        """Encode texts by the pipeline's own text encoders, one row each."""
        raise NotImplementedError

    def encode_negative(self, pipe, prompts: list[str], **options) -> Encoding:
        """Encode negative prompts, for a pipeline that treats them otherwise (without a system prompt, say)."""
        return self.encode_text(pipe, prompts, **options)

    def timestep_options(self, config: dict[str, Any], steps: int, latent_hw: tuple[int, int]) -> dict[str, Any]:
        """How the pipeline calls ``scheduler.set_timesteps(num_inference_steps=steps, ...)``, beyond that.

        Args:
            config: the scheduler's.
        """
        options = {}
        if config.get("use_dynamic_shifting"):
            options["mu"] = shift_for_tokens(config, self.grid(latent_hw), self.max_shift)
        if self.even_sigmas and not config.get("use_flow_sigmas"):
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        return options

    def latent_size(self, pipe, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(H, W) of the latents of an image of some size in pixels, by default the pipeline's.

        Raises ValueError for a size that the autoencoder does not divide.
        """
        factor, defaults = self.pixel_factor(pipe), self.default_latent_size(pipe)
        sizes = []
        for name, side, default in zip(("height", "width"), (height, width), defaults, strict=True):
            if side is not None and side % factor:
                raise ValueError(f"{name}: expected a multiple of {factor} pixels, got {side}")
            sizes.append(default if side is None else side // factor)
        return tuple(sizes)

    def latent_frames(self, pipe, num_frames: int) -> int:
        """Frames T of the latents of a video of ``num_frames`` (video models only)."""
        factor = pipe.vae_scale_factor_temporal
        if (num_frames - 1) % factor:
            raise ValueError(f"num_frames: expected 1 + a multiple of {factor}, got {num_frames}")
        return (num_frames - 1) // factor + 1

    def pixel_factor(self, pipe) -> int:
        """Pixels per latent position along each axis."""
        return pipe.vae_scale_factor

    def default_latent_size(self, pipe) -> tuple[int, int]:
        return (getattr(pipe, "default_sample_size", None) or self.denoiser.config.sample_size,) * 2

    # -- the autoencoder -----------------------------------------------------------------------------------------------

    def encode_images(self, vae, images: Tensor) -> Tensor:
        """z_0 = E(x_0), float32, of images [B, 3, H, W] (or for video models also [B, 3, F, H, W]) in [0, 1]."""
        latents = autoencoder.encode_images(vae, images)
        if self.is_video or latents.ndim == 4:
            return latents
        return latents.squeeze(2)  # an image model with a video autoencoder

    def decode_latents(self, vae, latents: Tensor) -> Tensor:
        """D(z_0): float32 images [B, 3, H, W], of video models frames [B, 3, F, H, W]; differentiable, not clamped."""
        count("decoder", len(latents))
        with phase("decode"), kept_for_backward(vae):
            images = autoencoder.decode_latents(vae, latents)
        return images if self.is_video or images.ndim == 4 else images.squeeze(2)

    # -- written once --------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser is computed; its weights may be elsewhere meanwhile."""
        return offload_device(self.denoiser) or next(self.denoiser.parameters()).device

    def null_condition(self, pipe, **options) -> Encoding:
        """One row: the empty prompt through the pipeline's text encoders (METHOD.md §2), as its unconditional branch
        reads it.
        """
        return self.encode_negative(pipe, [""], **options)

    def on(self, denoiser: nn.Module) -> DiffusionBackbone:
        """The same adapter on another denoiser of the same architecture: a view of this one, for example."""
        other = copy.copy(self)
        other.denoiser, other.blocks, other._shells = denoiser, blocks_of(denoiser), {}
        return other

    def check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth (i): expected a number of kept blocks in 1..{self.depth}, got {depth}")

    def check_latents(self, latents: Tensor, sigma: float | Tensor) -> Tensor:
        """Validate a call's latents and return sigma as a float32 tensor [B]."""
        dims, shape = (5, "[B, {}, T, H, W]") if self.is_video else (4, "[B, {}, H, W]")
        if latents.ndim != dims or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents: expected shape {shape.format(self.latent_channels)}, got {list(latents.shape)}")
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

    def call_inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        """The denoiser's keyword arguments for flow latents."""
        return self.inputs(self.process.model_latents(latents, sigma), sigma, encoding)

    def image_tokens(self, output, latents: Tensor, depth: int) -> Tensor:
        """Image tokens [B, N, width] of what block ``depth`` returned, or of the tokens alone."""
        tokens = output[self.image_tokens_index] if isinstance(output, tuple) else output
        return tokens[:, -self._token_count(latents, depth) :].to(self.dtype)

    def _token_count(self, latents: Tensor, depth: int) -> int:
        h, w = self.grid(tuple(latents.shape[-2:]), depth)
        return h * w * (latents.shape[2] if self.is_video else 1)

    def truncated(self, depth: int) -> nn.Module:
        """The shell of the first ``depth`` blocks, made once per depth, and anew where a module beside the blocks has
        been replaced: an adapter on the embedders of latents or texts replaces them.
        """
        self.check_depth(depth)
        made_of, shell = self._shells.get(depth, (None, None))
        if made_of != self.denoiser._modules:
            shell = self.truncate(self.denoiser, depth)
            self._shells[depth] = (dict(self.denoiser._modules), shell)
        return shell

    def run_prefix(self, latents: Tensor, sigma: Tensor, encoding: Encoding, depth: int) -> Tensor:
        """Image tokens after block ``depth``; no later block runs."""
        shell = self.truncated(depth)
        shell(**self.call_inputs(latents, sigma, encoding), return_dict=False)
        tokens, shell.norm_out.tokens = shell.norm_out.tokens, None
        return self.image_tokens(tokens, latents, depth)

    def features(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        encoding: Encoding,
        depth: int,
        *,
        rows: Tensor | None = None,
        memory: str = "save",
        whole: bool = False,
    ) -> Tensor:
        """Image tokens [B, N, width] after block ``depth``: ``u_{<=i}(z_t, t)`` of METHOD.md §2.

        The denoiser is taken as frozen: the tokens are differentiable with respect to the latents alone. Blocks that
        the fused ops know run on them.

        Args:
            rows: int64 [R], the tokens that the caller reads; what the others hold is not defined. The last block then
                computes no others, forward and backward, and no text stream.
            memory: what fused blocks keep for the backward, "save" or "recompute".
            whole: compute the last block whole all the same, for a pass that goes on from there.
        """
        return self.features_at(latents, sigma, encoding, [depth], rows=rows, memory=memory, whole=whole)[depth]

    def features_at(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        encoding: Encoding,
        depths: Sequence[int],
        *,
        rows: Tensor | None = None,
        memory: str = "save",
        whole: bool = False,
    ) -> dict[int, Tensor]:
        """Image tokens after each of several blocks, from one pass that ends at the deepest.

        As :meth:`features`; ``rows`` are those that the caller reads after the deepest block.
        """
        sigma = self.check_latents(latents, sigma)
        deepest, found = self._deepest(depths), {}
        count("prefix", len(latents))
        blocks = fused_blocks(*self._prefix(deepest, None if whole else rows, memory, prune=not whole))
        offloading = partial_pass(self.denoiser, self.blocks[:deepest])
        taps = self._taps(set(depths) - {deepest}, latents, found)
        kept = kept_for_backward(self.denoiser, alone=True)
        with phase("prefix"), frozen(self.denoiser), taps, blocks, offloading, kept:
            found[deepest] = self.run_prefix(latents, sigma, encoding, deepest)
        return found

    def _deepest(self, depths: Sequence[int]) -> int:
        for depth in depths:
            self.check_depth(depth)
        return max(depths)

    @contextmanager
    def _taps(self, depths: set[int], latents: Tensor, found: dict[int, Tensor]) -> Iterator[None]:
        """Within the ``with``, image tokens after these blocks go into ``found``."""

        def keep(depth: int):
            def hook(module, args, output):
                found[depth] = self.image_tokens(output, latents, depth)

            return hook

        handles = [self.blocks[depth - 1].register_forward_hook(keep(depth)) for depth in sorted(depths)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def fused(self):
        """A context in which every block that the fused ops know runs on them, whoever calls the denoiser.

        Blocks that are fused already keep their memory level; a compiled denoiser is left as it is.
        """
        if is_compiled(self.denoiser):
            return nullcontext()
        blocks = [b for b in self.blocks if not isinstance(b.__dict__.get("forward"), FusedForward)]
        return fused_blocks(blocks, [Want()] * len(blocks))

    def _prefix(self, depth: int, rows: Tensor | None, memory: str, prune: bool) -> tuple[list[nn.Module], list[Want]]:
        """The first ``depth`` blocks and what each has to yield."""
        wants = [Want(memory=memory)] * (depth - 1) + [Want(rows, prune, memory)]
        return self.blocks[:depth], wants

    def velocity(self, latents: Tensor, sigma: float | Tensor, encoding: Encoding) -> Tensor:
        """u_t(z_t), an estimate of ``E[eps - z_0 | z_t]`` (METHOD.md §1), like ``latents``."""
        sigma = self.check_latents(latents, sigma)
        with phase("denoiser"), kept_for_backward(self.denoiser):
            output = self.denoiser(**self.call_inputs(latents, sigma, encoding), return_dict=False)[0]
        return self.process.velocity(self.unpack(output, latents), latents, sigma)

    def branches(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity, both in one call as diffusers' pipelines make it; the second is None
        without classifier-free guidance.
        """
        sigma = self.check_latents(latents, sigma)
        if condition.guidance_scale <= 1:
            return self.velocity(latents, sigma, condition.cond), None
        both = stack_rows([condition.uncond, condition.cond])
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
        velocity, found, leaf = self.velocity_and_features_at(
            latents, sigma, encoding, [depth], rows=rows, memory=memory
        )
        return velocity, found[depth], leaf

    def velocity_and_features_at(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        encoding: Encoding,
        depths: Sequence[int],
        *,
        rows: Tensor | None = None,
        memory: str = "save",
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """:meth:`velocity_and_features` with the tokens after each of several blocks; autograd is on up to the deepest.

        ``rows`` are the tokens that the caller reads after the deepest block.
        """
        sigma = self.check_latents(latents, sigma)
        deepest = self._deepest(depths)
        found: dict[int, Tensor] = {}

        def cut(module, args, output):
            found[deepest] = self.image_tokens(output, latents, deepest)
            torch.set_grad_enabled(False)
            running.close()
            running.enter_context(phase("rest of denoiser"))
            return map_outputs(Tensor.detach, output)

        with torch.inference_mode(False):
            leaf = latents.detach().clone().requires_grad_()
        handle = self.blocks[deepest - 1].register_forward_hook(cut)
        taps = self._taps(set(depths) - {deepest}, latents, found)
        prefix = fused_blocks(*self._prefix(deepest, rows, memory, prune=False))
        running = ExitStack()
        try:
            with (
                running,
                frozen(self.denoiser),
                torch.inference_mode(False),
                torch.enable_grad(),
                taps,
                prefix,
                kept_for_backward(self.denoiser, alone=True),
            ):
                running.enter_context(phase("prefix"))
                output = self.denoiser(**self.call_inputs(leaf, sigma, encoding), return_dict=False)[0]
        finally:
            handle.remove()
        velocity = self.process.velocity(self.unpack(output.detach(), latents), latents, sigma)
        return velocity, found, leaf


def patch_grid(latent_hw: tuple[int, int], patch: int) -> tuple[int, int]:
    """Grid of patches of a latent of size (H, W). Raises ValueError for a size that they do not divide."""
    h, w = (side // patch for side in latent_hw)
    if (h * patch, w * patch) != tuple(latent_hw) or not (h and w):
        raise ValueError(f"latents: expected height and width to be multiples of {patch}, got {tuple(latent_hw)}")
    return h, w


def shift_for_tokens(config: dict[str, Any], grid: tuple[int, int], max_shift: float) -> float:
    """``mu`` of dynamic shifting, by diffusers' own formula; ``max_shift`` is for a configuration without one."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(
        grid[0] * grid[1],
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )


@contextmanager
def frozen(module: nn.Module):
    """No parameter of ``module`` requires a gradient inside the block; restored afterwards."""
    # By name: offloading puts other parameter objects in their place.
    trainable = [(m, name) for m in module.modules() for name, p in m._parameters.items() if _is_trainable(p)]
    for owner, name in trainable:
        owner._parameters[name].requires_grad_(False)
    try:
        yield
    finally:
        for owner, name in trainable:
            owner._parameters[name].requires_grad_(True)


def _is_trainable(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad
