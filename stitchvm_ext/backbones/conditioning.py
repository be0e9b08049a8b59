"""Modulation tables: every AdaLN vector of a noise schedule, computed once before sampling.

All samples of a step share the noise level, and what AdaLN layers read besides is the pooled text embedding alone. So
their output is a table over (noise level, text), and their weights, a third of SD3.5's, need not be on the device while
sampling (METHOD.md §5).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..fused.modulation import RowLookup, TableLinear
from ..offload import is_offloaded
from .base import DiffusionBackbone
from .truncate import blocks_of


def precompute_conditioning(pipe, sigmas, pooled_prompt_embeds: Tensor, *, release: bool = False) -> ConditioningTable:
    """Compute all modulation vectors of a schedule and let the transformer read them from the table.

    Denoiser and value model share the table, since they share the transformer's modules. Until :meth:`remove` (or the
    end of a ``with`` block) a forward pass at another noise level or with another pooled embedding raises ValueError.

    Args:
        pipe: a pipeline, a transformer or a :class:`DiffusionBackbone`, of the SD3 family.
        sigmas: noise levels in [0, 1], tensor [T] or a list; a trailing 0 is left out.
        pooled_prompt_embeds: [P, D], one row per text: those of the prompts, of the negative prompt, and of the null
            text where a value model does not share it. Repeated rows are stored once.
        release: move the AdaLN layers' weights to the host; :meth:`remove` brings them back.

    Returns:
        The installed table, a context manager.

    Raises:
        TypeError: a backbone whose AdaLN layers are not known.
        ValueError: no noise level, or pooled embeddings of another shape; a table is installed already; or the
            transformer's weights are offloaded, and need no table to leave the device.
    """
    from . import backbone_of  # the registry imports the adapters, and they this package

    backbone = pipe if isinstance(pipe, DiffusionBackbone) else backbone_of(pipe)
    transformer = backbone.denoiser
    if type(transformer).__name__ != "SD3Transformer2DModel":
        raise TypeError(f"pipe: expected a transformer of the SD3 family, got {type(transformer).__name__}")
    if is_offloaded(transformer):
        raise ValueError("pipe: expected a transformer that stays on its device, got one whose own hooks offload it")
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device=backbone.device).flatten()
    sigmas = sigmas[sigmas > 0]
    if not len(sigmas) or bool((sigmas > 1).any()):
        raise ValueError(f"sigmas: expected noise levels in (0, 1], got {sigmas.tolist()}")
    width = transformer.config.pooled_projection_dim
    if not isinstance(pooled_prompt_embeds, Tensor) or pooled_prompt_embeds.shape[1:] != (width,):
        got = getattr(pooled_prompt_embeds, "shape", type(pooled_prompt_embeds).__name__)
        raise ValueError(f"pooled_prompt_embeds: expected shape [P, {width}], got {got}")
    pooled = pooled_prompt_embeds.to(backbone.device, backbone.dtype).unique(dim=0)
    return ConditioningTable(transformer, 1000 * sigmas, pooled, release)


class ConditioningTable:
    """The tables of a transformer's AdaLN layers, in the place of their linear layers. See
    :func:`precompute_conditioning`.
    """

    @torch.no_grad()
    def __init__(self, transformer: nn.Module, timesteps: Tensor, pooled: Tensor, release: bool):
        self.embedder, self.release = transformer.time_text_embed, release
        self._check_free()
        steps, texts = len(timesteps), len(pooled)
        temb = self.embedder(timesteps.repeat_interleave(texts), pooled.repeat(steps, 1))
        self.lookup = RowLookup(timesteps, pooled, temb.shape[-1])
        self.norms = adaln_layers(transformer)
        self.linears = [norm.linear for norm in self.norms]
        self.tables = [TableLinear(norm.linear(norm.silu(temb)), self.lookup) for norm in self.norms]
        self.install()

    def _check_free(self) -> None:
        if "forward" in self.embedder.__dict__:
            raise ValueError("pipe: it reads a modulation table already; call remove() on that one first")

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(layer.table.nbytes for layer in self.tables)

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the weights that the tables stand in for."""
        return sum(p.nbytes for linear in self.linears for p in linear.parameters())

    def install(self) -> None:
        """Let the transformer read from the tables: done by :func:`precompute_conditioning`, needed after a removal."""
        self._check_free()
        for norm, linear, table in zip(self.norms, self.linears, self.tables, strict=True):
            norm.linear = table
            if self.release:
                linear.to("cpu")
        self.embedder.forward = self.lookup

    def remove(self) -> None:
        """Put the AdaLN layers back, on the device where they were. Does nothing the second time."""
        if self.embedder.__dict__.get("forward") is not self.lookup:
            return
        del self.embedder.forward
        for norm, linear, table in zip(self.norms, self.linears, self.tables, strict=True):
            norm.linear = linear.to(table.table.device)

    def __enter__(self) -> ConditioningTable:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def adaln_layers(transformer: nn.Module) -> list[nn.Module]:
    """Modules with ``linear`` and ``silu`` whose input is the timestep and pooled text embedding alone."""
    norms = [norm for block in blocks_of(transformer) for norm in (block.norm1, block.norm1_context)]
    return [*norms, transformer.norm_out]
