"""LoRA adapters of a denoiser through peft, and views of it without them or with one merged in.

A view is a copy of the denoiser's module tables over the same parameters, in which every adapted layer is a plain
linear one. It costs no second forward path through adapters, its blocks can run fused, and nothing that is done to it
touches the denoiser: merging one adapter never has to be undone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..backbones.truncate import shell_of
from .sharding import whole

_SELF = r"(to_q|to_k|to_v|to_out\.0)"
_JOINT = r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_JOINT_BLOCKS = rf"transformer_blocks\.\d+\.attn\.{_JOINT}"

TARGETS = {
    "Flux2Transformer2DModel": _JOINT_BLOCKS,
    "FluxTransformer2DModel": _JOINT_BLOCKS,
    "HunyuanImageTransformer2DModel": _JOINT_BLOCKS,
    "HunyuanVideoTransformer3DModel": _JOINT_BLOCKS,
    "Lumina2Transformer2DModel": rf"layers\.\d+\.attn\.{_SELF}",
    "QwenImageTransformer2DModel": _JOINT_BLOCKS,
    "SD3Transformer2DModel": _JOINT_BLOCKS,  # "attn" alone: the dual attention of SD3.5 Medium, attn2, stays as it is
    "SanaTransformer2DModel": rf"transformer_blocks\.\d+\.attn[12]\.{_SELF}",
    "UNet2DConditionModel": rf".*\.attn[12]\.{_SELF}",
    "WanTransformer3DModel": rf"blocks\.\d+\.attn[12]\.{_SELF}",
}
"""Regular expressions of the adapted layers' whole names, by the denoiser's class."""


def add_adapters(
    denoiser: nn.Module, names: tuple[str, ...], rank: int, alpha: int, targets: str | None = None, seed: int = 0
) -> None:
    """Freeze the denoiser and add adapters of equal weights, float32, the first of them active and trainable.

    The weights follow from ``seed``; the adapted layers are unchanged by them, since B starts at zero.

    Raises:
        ImportError: peft is missing.
        TypeError: diffusers has no adapters for this class, or its targets are not known and not given.
        ValueError: it carries adapters already, or no layer matches ``targets``.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("training: LoRA needs `pip install stitchvm_ext[training]`") from error
    kind = type(denoiser).__name__
    targets = targets or TARGETS.get(kind)
    if targets is None or not hasattr(denoiser, "add_adapter"):
        raise TypeError(f"pipe: expected a denoiser that takes adapters, one of {sorted(TARGETS)}, got {kind}")
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            f"pipe: expected a denoiser without adapters, got {sorted(denoiser.peft_config)}; "
            "pipe.fuse_lora() and pipe.unload_lora_weights() make one that was loaded part of it"
        )
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        torch.manual_seed(seed)
        try:
            for name in names:
                denoiser.add_adapter(config, adapter_name=name)
        except ValueError as error:
            denoiser._hf_peft_config_loaded = False  # diffusers notes an adapter before there is one
            raise ValueError(f"lora_targets: expected a pattern of layers, got {targets!r}: {error}") from error
    denoiser.set_adapter(names[0])
    for layer in lora_layers(denoiser):
        for part in (layer.lora_A, layer.lora_B):
            part.float()
    for name in names[1:]:
        copy_adapter(denoiser, names[0], name)


def lora_layers(denoiser: nn.Module) -> Iterator[nn.Module]:
    """peft's LoRA layers of a denoiser, in the order of its modules."""
    from peft.tuners.lora import LoraLayer

    return (module for module in denoiser.modules() if isinstance(module, LoraLayer))


def adapter_parameters(denoiser: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters by name, the adapter's own left out of it: the same names for every adapter."""
    parts = [f".lora_{part}.{adapter}." for part in "AB"]
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in denoiser.named_parameters()
        if any(part in name for part in parts)
    }


@torch.no_grad()
def copy_adapter(denoiser: nn.Module, source: str, target: str, keep: float = 0.0) -> None:
    """``target <- keep * target + (1 - keep) * source``, in place."""
    from_ = adapter_parameters(denoiser, source)
    for name, parameter in adapter_parameters(denoiser, target).items():
        if keep:
            parameter.lerp_(from_[name], 1 - keep)
        else:
            parameter.copy_(from_[name])


@torch.no_grad()
def drift(denoiser: nn.Module, adapter: str = "default") -> float:
    """How far an adapter takes the weights: the root mean square over layers of ``|s B A| / |W|`` (Frobenius norms)."""
    ratios = []
    for layer in lora_layers(denoiser):
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        # |B A|² = trace(B'B A A'), two matrices of the rank's size
        square = ((b.mT @ b) * (a @ a.mT)).sum() * layer.scaling[adapter] ** 2
        ratios.append(square / whole(layer.get_base_layer().weight).float().square().sum())
    return math.sqrt(torch.stack(ratios).mean().item())


# -- views -------------------------------------------------------------------------------------------------------------


def base_view(denoiser: nn.Module) -> nn.Module:
    """The denoiser as it was before adapters were added, whichever are active; every parameter is shared with it."""
    return lora_view(denoiser, lambda layer: layer.get_base_layer())


class MergedView:
    """The denoiser with one adapter merged into its weights, for passes without a gradient.

    The merged layers' weights are copies, in the base's dtype: for SD 3.5 Medium in bfloat16 0.9 GB. In bfloat16 what
    the adapter adds is rounded with the weight that it is added to.

    Attributes:
        denoiser: the view.
    """

    def __init__(self, denoiser: nn.Module):
        self.layers: list[tuple[nn.Module, nn.Linear]] = []
        self.denoiser = lora_view(denoiser, self._replace)

    def _replace(self, layer: nn.Module) -> nn.Linear:
        base = layer.get_base_layer()
        merged = shell_of(base)
        merged._parameters = dict(base._parameters)  # the bias is shared
        merged.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.layers.append((layer, merged))
        return merged

    @torch.no_grad()
    def set_to(self, adapter: str) -> None:
        """Merge this adapter's present weights. The same weights give the same sums, bit for bit."""
        for layer, merged in self.layers:
            base = whole(layer.get_base_layer().weight)
            merged.weight.copy_(base.float() + layer.get_delta_weight(adapter).float())


def lora_view(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The module with something in the place of each of its LoRA layers; all else is shared with it."""
    from peft.tuners.lora import LoraLayer

    if isinstance(module, LoraLayer):
        return replace(module)
    children = {name: None if child is None else lora_view(child, replace) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    view = shell_of(module)
    view._modules = children
    return view


# -- files -------------------------------------------------------------------------------------------------------------


def export_weights(pipe, folder, adapter: str = "default") -> None:
    """Write ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights(folder)`` of a stock pipeline loads.

    The adapter's rank, scale and targets are in the file's metadata. Raises OSError where it cannot be written.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError

    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    denoiser = getattr(pipe, name)
    weights: dict[str, Tensor] = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    metadata = {f"{name}_lora_adapter_metadata": denoiser.peft_config[adapter].to_dict()}
    try:
        pipe.save_lora_weights(folder, **{f"{name}_lora_layers": weights}, **metadata)
    except SafetensorError as error:  # of a full disk, and no OSError
        raise OSError(f"LoRA: its weights could not be written into {folder} ({error})") from error
