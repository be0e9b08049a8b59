"""``memory="low"``: what sampling does not need leaves the device, and comes back when it is done.

Each measure is a context manager that says in the report what it spares, or why it does not apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones import Condition, ConditioningTable, DiffusionBackbone
from ..backbones.conditioning import adaln_layers
from ..backbones.replay import can_replay
from ..fused.function import count_recomputed
from ..offload import is_offloaded
from ..value import StitchedValue, TweedieValue
from ..value.base import ValueEstimator

LEVELS = ("normal", "low")
TILE = 512  # pixels along an edge, at most, of a decoded tile: diffusers' own for SD 3.5 is a whole image of 1024


@dataclass(frozen=True)
class MemorySaving:
    """What one measure of ``memory="low"`` spares on the device.

    Attributes:
        measure: "text encoders", "modulation", "gradient" or "decode".
        bytes: counted, not read off an allocator; 0 where the measure does not apply.
        note: what the bytes are, or why there are none.
    """

    measure: str
    bytes: int
    note: str

    def __str__(self) -> str:
        return f"{self.measure}: {self.bytes / 2**20:.2f} MiB ({self.note})"


class MemoryReport:
    """Collects the savings, of each measure the largest."""

    def __init__(self, device: torch.device):
        self.savings: dict[str, MemorySaving] = {}
        self.suffix = "; on the CPU nothing leaves memory, this is what an accelerator would be spared"
        self.suffix = self.suffix if device.type == "cpu" else ""

    def add(self, measure: str, nbytes: int, note: str) -> None:
        known = self.savings.get(measure)
        if known is None or nbytes > known.bytes:
            self.savings[measure] = MemorySaving(measure, nbytes, note)

    def add_moved(self, measure: str, nbytes: int, note: str) -> None:
        """Of weights that went to the host."""
        self.add(measure, nbytes, note + self.suffix)


@contextmanager
def low_memory(
    pipe,
    backbone: DiffusionBackbone,
    value: ValueEstimator | None,
    sigmas: Tensor,
    condition: Condition,
    report: MemoryReport,
) -> Iterator[None]:
    """Around sampling and decoding, once the prompts are encoded; all is as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_without_text_encoders(pipe, report))
        stack.enter_context(_modulation_from_table(backbone, value, sigmas, condition, report))
        stack.enter_context(_recomputed_activations(value, report))
        report.add("decode", 0, "nothing was decoded")
        yield


# -- text encoders -----------------------------------------------------------------------------------------------------


@contextmanager
def _without_text_encoders(pipe, report: MemoryReport) -> Iterator[None]:
    named = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    encoders = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    kept = {name: reason for name, part in encoders.items() if (reason := _why_it_stays(part))}
    leaving = [part for name, part in encoders.items() if name not in kept]
    notes = [f"{len(leaving)} moved to the host"] if leaving else [] if kept else ["the pipeline has none"]
    notes += [f"{name} stays: {reason}" for name, reason in kept.items()]
    report.add_moved("text encoders", _weight_bytes(leaving), ", ".join(notes))
    devices = [next(part.parameters()).device for part in leaving]
    try:
        for part in leaving:
            part.to("cpu")
        yield
    finally:
        for part, device in zip(leaving, devices, strict=True):
            part.to(device)


def _why_it_stays(encoder: nn.Module) -> str | None:
    if is_offloaded(encoder) or getattr(encoder, "hf_device_map", None):
        return "its own hooks move it"
    if getattr(encoder, "is_quantized", False):
        return "quantised weights are not moved"
    if any(p.is_meta for p in encoder.parameters()):
        return "it has no weights"
    return None


def _weight_bytes(modules: list[nn.Module]) -> int:
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())


# -- modulation --------------------------------------------------------------------------------------------------------


@contextmanager
def _modulation_from_table(
    backbone: DiffusionBackbone,
    value: ValueEstimator | None,
    sigmas: Tensor,
    condition: Condition,
    report: MemoryReport,
) -> Iterator[None]:
    reason = _why_no_table(backbone, value)
    if reason is None:
        pooled = _pooled_embeddings(backbone, value, condition)
        linears = [norm.linear for norm in adaln_layers(backbone.denoiser)]
        rows = len(sigmas) * len(pooled)
        size = rows * pooled.element_size() * sum(linear.out_features for linear in linears)
        if size >= _weight_bytes(linears):
            reason = f"the table of {len(sigmas)} noise levels x {len(pooled)} texts would be larger than the weights"
    if reason is not None:
        report.add("modulation", 0, reason)
        yield
        return
    # With noise level 0, at which a stitched value may be asked last.
    with ConditioningTable(backbone.denoiser, 1000 * sigmas.to(backbone.device), pooled, release=True) as table:
        note = f"weights of {len(linears)} AdaLN layers, less a table of {table.nbytes} bytes"
        report.add_moved("modulation", table.replaced_bytes - table.nbytes, note)
        yield


def _why_no_table(backbone: DiffusionBackbone, value: ValueEstimator | None) -> str | None:
    denoiser = backbone.denoiser
    if type(denoiser).__name__ != "SD3Transformer2DModel":
        return f"not known for {type(denoiser).__name__}"
    if is_offloaded(denoiser):
        return "the transformer's own hooks move its weights"
    if not can_replay(denoiser, backbone.blocks):
        return "a compiled program or a CUDA graph holds the layers"
    if "forward" in denoiser.time_text_embed.__dict__:
        return "a table is installed already"
    for part in _parts(value):
        if part.backbone.denoiser is denoiser and not isinstance(part, StitchedValue | TweedieValue):
            return f"{type(part).__name__} may ask at noise levels of its own"
    return None


def _pooled_embeddings(backbone: DiffusionBackbone, value: ValueEstimator | None, condition: Condition) -> Tensor:
    """[P, D]: of every text that the transformer will read, once each."""
    encodings = [condition.cond, *([] if condition.uncond is None else [condition.uncond])]
    for part in _parts(value):
        if isinstance(part, StitchedValue) and part.depth > 0 and part.backbone.denoiser is backbone.denoiser:
            encodings.append(part.null_condition)
    pooled = [e["pooled_prompt_embeds"].to(backbone.device, backbone.dtype) for e in encodings]
    return torch.cat(pooled).unique(dim=0)


def _parts(value: ValueEstimator | None) -> list[ValueEstimator]:
    """The estimators that a sum or a schedule of values is made of, or the one itself."""
    if value is None:
        return []
    return [part for v in value.values for part in _parts(v)] if hasattr(value, "values") else [value]


# -- the gradient ------------------------------------------------------------------------------------------------------


@contextmanager
def _recomputed_activations(value: ValueEstimator | None, report: MemoryReport) -> Iterator[None]:
    stitched = [part for part in _parts(value) if isinstance(part, StitchedValue)]
    levels = [part.memory for part in stitched]
    try:
        for part in stitched:
            part.memory = "recompute"
        with count_recomputed() as spared:
            yield
    finally:
        for part, level in zip(stitched, levels, strict=True):
            part.memory = level
    note = "activations of fused blocks that are computed twice instead of kept"
    if spared.peak <= 0:
        note = "no gradient of a stitched value was taken through fused blocks"
    report.add("gradient", max(spared.peak, 0), note)


# -- the decoder -------------------------------------------------------------------------------------------------------


@contextmanager
def tiled_decode(vae: nn.Module, latents: Tensor, report: MemoryReport) -> Iterator[None]:
    """Around one decoding of ``latents``: a sample and a tile at a time, where the autoencoder can."""
    settings = {name: entry for name, entry in vae.__dict__.items() if name.startswith(("use_", "tile_"))}
    try:
        if hasattr(vae, "use_slicing"):
            vae.enable_slicing()
        if hasattr(vae, "use_tiling") and not vae.use_tiling:
            vae.enable_tiling()
            _limit_tile(vae)
        with _largest_layer(vae) as seen:
            yield
    finally:
        vae.__dict__.update(settings)
    part = seen.share_of(latents)
    if part is None or part >= 1:
        report.add("decode", 0, "decoded in one piece: the autoencoder cannot, or the image is one tile")
        return
    note = f"input and output of the decoder's largest layer, for {part:.3g} of the latents at a time"
    report.add("decode", round(seen.bytes * (1 / part - 1)), note)


def _limit_tile(vae: nn.Module) -> None:
    side, latent_side = getattr(vae, "tile_sample_min_size", 0), getattr(vae, "tile_latent_min_size", 0)
    if isinstance(side, int) and side > TILE:
        vae.tile_latent_min_size = TILE * latent_side // side
        vae.tile_sample_min_size = TILE


class _Largest:
    def __init__(self):
        self.bytes = 0
        self.shape: torch.Size | None = None  # of the largest input of the decoder

    def share_of(self, latents: Tensor) -> float | None:
        if self.shape is None:
            return None
        if len(self.shape) == 5:  # a video decoder goes frame by frame by itself
            own, all_latents = (s[0] * s[-2] * s[-1] for s in (self.shape, latents.shape))
        else:
            own, all_latents = self.shape.numel(), latents.numel()
        return own / all_latents


@contextmanager
def _largest_layer(vae: nn.Module) -> Iterator[_Largest]:
    """Within the ``with``, the layer of the autoencoder with the largest input and output is noted."""
    seen = _Largest()

    def layer(module, args, output):
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        seen.bytes = max(seen.bytes, sum(t.nbytes for t in tensors))

    def whole(module, args):
        if seen.shape is None or args[0].numel() > seen.shape.numel():
            seen.shape = args[0].shape

    handles = [m.register_forward_hook(layer) for m in vae.modules() if not any(True for _ in m.children())]
    if isinstance(getattr(vae, "decoder", None), nn.Module):
        handles.append(vae.decoder.register_forward_pre_hook(whole))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
