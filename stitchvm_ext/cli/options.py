"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..plan import ARCHITECTURES, DEVICES, TOWERS
from ..rewards.loading import KINDS
from ..sampling.guidance import SCHEDULES

RewardName = Literal[tuple(KINDS)]
BackboneName = Literal[tuple(ARCHITECTURES)]  # these three of the planner
TowerName = Literal[tuple(TOWERS)]
DeviceName = Literal[tuple(DEVICES)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def registry() -> tyro.constructors.ConstructorRegistry:
    """How tyro reads what it does not know itself: of a name or a callable, the name."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def schedule(info):
        if info.type != (str | Callable[[float], float]):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(sorted(SCHEDULES)) + "}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
        )

    return rules


@dataclass(frozen=True)
class Backbone:
    """The diffusion pipeline.

    Attributes:
        backbone: folder of a diffusers pipeline, its name owner/name on the Hugging Face Hub, or "playground" for the
            model that ships with this package.
        device: such as cuda, cuda:1 or cpu; "auto" is the GPU where there is one (under torchrun each process
            takes its own).
        dtype: of the pipeline's weights; "auto" is bfloat16 on cuda and float32 on the CPU.
    """

    backbone: str
    device: str = "auto"
    dtype: Dtype = "auto"

    @property
    def torch_device(self):
        """Raises ValueError where PyTorch does not know the device, or finds no GPU."""
        import torch

        has_gpu = torch.cuda.is_available()
        try:
            automatic = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu"  # as torchrun numbers processes
            device = torch.device(automatic if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(f"device: expected such as cuda, cuda:1 or cpu, got {self.device!r}") from error
        if device.type == "cuda" and not has_gpu:
            raise ValueError(f"device: expected cpu, as PyTorch finds no GPU, got {self.device!r}")
        return device

    def load(self, on_host: tuple[str, ...] = ()):
        """The pipeline, frozen, on its device, except for components whose names begin as in ``on_host``.

        Raises OSError where it cannot be loaded.
        """
        import torch
        from diffusers import DiffusionPipeline

        from .. import playground
        from ..backbones import backbone_of

        hide_loading_bars()
        device = self.torch_device
        name = self.dtype if self.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, name)
        if self.backbone == "playground":
            pipe = playground.load_pipeline()
            if dtype != torch.float32:
                pipe.to(dtype)
        else:
            try:
                with warnings.catch_warnings():  # newer releases call it dtype, older ones know no such argument
                    warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
                    pipe = DiffusionPipeline.from_pretrained(self.backbone, torch_dtype=dtype)
            except Exception as error:  # a missing or damaged file fails in any of half a dozen libraries
                message = str(error).strip() or type(error).__name__
                raise OSError(
                    f"backbone: {self.backbone} cannot be loaded as a diffusers pipeline: {message}"
                ) from error
        moved = [part for name, part in pipe.components.items() if not name.startswith(on_host)] if on_host else [pipe]
        for part in moved:
            if hasattr(part, "to"):
                part.to(device)
        pipe.set_progress_bar_config(disable=True)
        backbone_of(pipe).denoiser.eval().requires_grad_(False)
        pipe.vae.eval().requires_grad_(False)
        return pipe


@dataclass(frozen=True)
class Reward:
    """The clean reward.

    Attributes:
        reward: its kind.
        reward_path: its folder, file or name, as its kind has it; for some kinds there is a default.
        reward_options: what else the kind takes, each NAME=VALUE, such as head=sac.pth or label=cat.
    """

    reward: RewardName
    reward_path: str | None = None
    reward_options: tuple[str, ...] = ()

    def load(self, device, dtype=None):
        """The reward, frozen, on a device, in float32 or another dtype; None where no kind was named."""
        from ..rewards import load_reward

        if self.reward is None:
            return None
        hide_loading_bars()
        options: dict[str, Any] = {}
        for option in self.reward_options:
            name, found, value = option.partition("=")
            if not found:
                raise ValueError(f"reward_options: expected NAME=VALUE, got {option!r}")
            options[name] = int(value) if value.isdecimal() else value
        reward = load_reward(self.reward, self.reward_path, **options).to(device, dtype)
        return reward.eval().requires_grad_(False)


def parse_reward(text: str) -> Reward:
    """The reward that KIND[=PATH][,NAME=OPTION...] names."""
    first, *options = text.split(",")
    kind, _, path = first.partition("=")
    return Reward(kind, path or None, tuple(options))


@dataclass(frozen=True)
class OptionalReward(Reward):
    __doc__ = Reward.__doc__
    reward: RewardName | None = None


@dataclass(frozen=True)
class Size:
    """Size of the pictures.

    Attributes:
        height: in pixels; by default the pipeline's.
        width: in pixels; by default the pipeline's.
    """

    height: int | None = None
    width: int | None = None

    def pixels(self, pipe) -> tuple[int, int]:
        """(H, W). Raises ValueError for a size that the autoencoder does not divide."""
        from ..backbones import backbone_of

        backbone = backbone_of(pipe)
        height, width = (side * backbone.pixel_factor(pipe) for side in backbone.latent_size(pipe, *self.sides))
        return height, width

    @property
    def sides(self) -> tuple[int | None, int | None]:
        return self.height, self.width


Flat = tyro.conf.arg(name="")  # its fields are options of the command itself
BackboneOptions = Annotated[Backbone, Flat]
RewardOptions = Annotated[Reward, Flat]
OptionalRewardOptions = Annotated[OptionalReward, Flat]
SizeOptions = Annotated[Size, Flat]


def hide_loading_bars() -> None:
    """Loading takes a second: bars would only clutter."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def prompts_of(prompt: tuple[str, ...], prompts: Path | None) -> list:
    """Those of --prompt or of the file --prompts. Raises ValueError unless one of the two was given."""
    from ..sampling import read_prompts

    if bool(prompt) == (prompts is not None):
        raise ValueError("prompts: expected either --prompt TEXT ... or --prompts FILE")
    return read_prompts(list(prompt) if prompt else prompts)
