"""`stitchvm align`: train a LoRA of the generator to raise a value."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..training import DPOConfig, DPOTrainer, DraftConfig, DraftTrainer, NFTConfig, NFTTrainer, TrainingConfig
from .options import BackboneOptions, OptionalRewardOptions, hide_loading_bars, parse_reward

TRAINERS = {"nft": NFTTrainer, "draft": DraftTrainer, "dpo": DPOTrainer}
PRESETS = {"12gb": lambda settings: settings.for_12_gb()}
MethodName = Literal[tuple(TRAINERS)]
PresetName = Literal[tuple(PRESETS)]
EVAL_SHARE, EVAL_PROMPTS = 8, 16  # by default a prompt in eight, at most so many, is kept for evaluation


@dataclass(frozen=True)
class Alignment:
    """The method and its settings. Settings of a method that is not chosen are refused.

    Attributes:
        method: "nft" is DiffusionNFT, online reinforcement learning on the forward process; "draft" is DRaFT, the
            reward's gradient through a rollout's last steps; "dpo" is Diffusion-DPO on samples that the reward ranks.
        nft: settings of nft.
        draft: settings of draft.
        dpo: settings of dpo.
        preset: "12gb" for SD 3.5 Medium at 512 pixels on a card of 12 GB, as predicted and not yet tried on one:
            settings that others on the command line come before, text encoders that stay on the host, and values and
            rewards in the pipeline's precision.
    """

    method: MethodName
    nft: NFTConfig = NFTConfig()
    draft: DraftConfig = DraftConfig()
    dpo: DPOConfig = DPOConfig()
    preset: PresetName | None = None

    @classmethod
    def of(cls, preset: PresetName | None) -> Alignment:
        """All methods' settings before any were given on the command line."""
        settings_of = {group.name: type(group.default) for group in fields(cls) if group.name in TRAINERS}
        start = PRESETS[preset] if preset else lambda settings: settings()
        return cls(tyro.MISSING, **{name: start(settings) for name, settings in settings_of.items()}, preset=preset)

    def config(self) -> TrainingConfig:
        """The chosen method's. Raises ValueError where another's were given."""
        start = self.of(self.preset)
        for name in TRAINERS:
            if name != self.method and getattr(self, name) != getattr(start, name):
                raise ValueError(f"{name}: expected no settings of it with --method {self.method}")
        return getattr(self, self.method)


AlignmentOptions = Annotated[Alignment, tyro.conf.arg(name="")]


def with_preset(command: Callable, arguments: Sequence[str]) -> Callable:
    """The command with the settings of the ``--preset`` among the arguments as its defaults, which every setting that
    is given comes before. Without one, or with one that tyro will refuse, the command itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    preset = parser.parse_known_args(arguments)[0].preset
    return functools.partial(command, alignment=Alignment.of(preset)) if preset in PRESETS else command


def align(
    backbone: BackboneOptions,
    reward: OptionalRewardOptions,
    alignment: AlignmentOptions,
    prompts: Path,
    held_out: tuple[str, ...],
    out: Path,
    value: tuple[str, ...] = (),
    eval_prompts: Path | None = None,
    trackers: tuple[str, ...] | None = None,
) -> None:
    """Train a LoRA of the generator to raise a stitched value, or the clean reward, on prompts.

    Writes metrics.jsonl, curves.png, sample grids, checkpoints and at the end pytorch_lora_weights.safetensors, which a
    stock pipeline loads by load_lora_weights. Interrupted, the same command goes on where it stopped. On several GPUs:
    torchrun --nproc-per-node 8 -m stitchvm_ext.cli align ...

    Args:
        prompts: text file to train on, one prompt per line.
        held_out: clean rewards that are measured and not trained on, which shows whether the trained one is being
            tricked: each KIND, KIND=PATH or KIND=PATH,NAME=OPTION, kinds as for --reward.
        out: folder of the run.
        value: folders of value models, or owner/name on the Hub, to train on; several are added up. "playground" is the
            embedded one. Without one, --reward is trained on, which decodes every sample.
        eval_prompts: text file of held-out prompts, each drawn in every evaluation; by default the last eighth of
            PROMPTS, at most 16, which then are not trained on.
        trackers: accelerate's, which get the log as well: tensorboard, wandb, mlflow and others, by default tensorboard
            where it is installed; without a name behind it none.
    """
    import torch

    from ..training import CleanReward, PromptDataset
    from ..training.trackers import choose_trackers

    if bool(value) == (reward.reward is not None):
        raise ValueError("value: expected either --value FOLDER ... or --reward KIND")
    config = alignment.config()
    choose_trackers(trackers)
    texts = PromptDataset(prompts).texts
    texts, held_out_texts = _split(texts) if eval_prompts is None else (texts, PromptDataset(eval_prompts).texts)
    hide_loading_bars()
    device = backbone.torch_device
    on_host = ("text_encoder",) if config.offload_text_encoders else ()
    on_host += ("transformer", "unet") if config.shard_frozen_weights else ()
    pipe = backbone.load(on_host)
    dtype = pipe.dtype if alignment.preset else torch.float32
    judges = {name: parse_reward(name).load(device, dtype) for name in held_out}
    scorer = reward.load(device, dtype)
    trainer = TRAINERS[alignment.method](
        pipe,
        CleanReward(pipe, scorer) if scorer is not None else _load_values(value, pipe, dtype, device),
        texts,
        config,
        output_dir=out,
        held_out=judges,
        eval_prompts=held_out_texts,
        trackers=trackers,
    )
    rows = trainer.train()
    if not trainer.state.is_main_process:
        return
    for name in sorted({name for row in rows for name in row if name.startswith(("reward/", "held_out/"))}):
        numbers = [row[name] for row in rows if name in row]
        print(f"{name:40s} {numbers[0]:.4g} -> {numbers[-1]:.4g}")
    print(f"wrote the LoRA of {config.iterations} iterations into {out}")


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Prompts to train on, and those kept for evaluation: the last ones, and no text that is trained on."""
    count = min(EVAL_PROMPTS, -(-len(texts) // EVAL_SHARE))
    kept = texts[-count:]
    trained = [text for text in texts[:-count] if text not in kept]
    if not trained:
        raise ValueError(f"prompts: expected at least 2 different ones, one of them to evaluate, got {len(texts)}")
    return trained, kept


def _load_values(names: tuple[str, ...], pipe, dtype, device):
    from .. import playground
    from ..value import StitchedValue, ValueSum

    values = [
        playground.load_value(pipe) if name == "playground" else StitchedValue.from_pretrained(name, pipe, dtype)
        for name in names
    ]
    values = [value.to(device) for value in values]  # a denoiser that is to be split is on the host meanwhile
    return values[0] if len(values) == 1 else ValueSum([(value, 1.0) for value in values])
