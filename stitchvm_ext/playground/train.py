"""Train every model of the playground and pack the weights, in one command:

    python -m stitchvm_ext.playground.train --out stitchvm_ext/playground/weights

About two hours on two CPU cores. Every stage leaves its result in the work folder, and a rerun goes on with
the first stage that is missing (the generator with the last saved step). ``--steps-scale 0.01`` is a smoke test: a
hundredth of the pictures and of the steps. The generator stage alone can use several processes, once the stages before
it are done: ``torchrun --nproc_per_node N -m stitchvm_ext.playground.train --out DIR --work DIR --stage generator``.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import models, train_autoencoder, train_generator, train_reward, train_value, world

PICTURES, PICTURE_SEED = 48000, 1
VALIDATION_PICTURES, VALIDATION_SEED = 2000, 2  # of the held-out split; they also set the latents' shift and scale
DECODED_PICTURES = 8000  # reconstructions that the rewards are trained on beside the originals
AUTOENCODER_SEED, GENERATOR_SEED = 0, 0
REWARD_SEEDS = (0, 1)  # the target reward, the held-out reward
STAGES = ("data", "autoencoder", "latents", "generator", *(f"reward-{seed}" for seed in REWARD_SEEDS))
MAX_BYTES = 25_000_000


def save_atomically(value, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


class Training:
    """The stages. Each property is one stage's result, read from the work folder or made and stored there.

    Args:
        work: folder of the intermediate results.
        scale: share of the pictures and steps, for smoke tests.
        device: of the training steps; data and caches stay on the CPU.
    """

    def __init__(self, work: Path, scale: float = 1.0, device: str = "cpu"):
        if not 0 < scale <= 1:
            raise ValueError(f"steps-scale: expected a share in (0, 1], got {scale}")
        self.work, self.scale, self.device = work, scale, device
        work.mkdir(parents=True, exist_ok=True)
        settings = work / "settings.json"
        if settings.is_file() and json.loads(settings.read_text())["scale"] != scale:
            raise ValueError(
                f"work: {work} holds a run with another --steps-scale, {settings.read_text()}; expected {scale}"
            )
        settings.write_text(json.dumps({"scale": scale}))

    def scaled(self, number: int, least: int = 1) -> int:
        return max(least, round(number * self.scale))

    def _stage(self, name: str, make: Callable[[], dict]) -> dict:
        path = self.work / f"{name}.pt"
        if not path.is_file():
            save_atomically(make(), path)
        return torch.load(path, weights_only=True)

    @cached_property
    def data(self) -> dict:
        """images uint8 [N, 64, 64, 3], captions, covers [N, 64, 11], counts [N, 30]; validation images."""

        def make() -> dict:
            print("drawing the pictures", flush=True)
            pictures = world.dataset(self.scaled(PICTURES, 64), PICTURE_SEED)
            validation = world.dataset(self.scaled(VALIDATION_PICTURES, 64), VALIDATION_SEED, held_out=True)
            return {
                "images": torch.from_numpy(np.stack([p.image for p in pictures])),
                "captions": [p.caption for p in pictures],
                "covers": torch.from_numpy(np.stack([train_generator.patch_cover(p.objects) for p in pictures])),
                "counts": torch.tensor([train_reward.object_counts(p.objects) for p in pictures]),
                "validation": torch.from_numpy(np.stack([p.image for p in validation])),
            }

        return self._stage("data", make)

    @cached_property
    def autoencoder(self):
        def make() -> dict:
            steps = self.scaled(train_autoencoder.STEPS)
            model = train_autoencoder.train_autoencoder(self.data["images"], steps, AUTOENCODER_SEED, self.device)
            latents = train_autoencoder.encode_images(model, self.data["validation"])
            return {"model": model.state_dict(), "shift": float(latents.mean()), "scale": float(1 / latents.std())}

        state = self._stage("autoencoder", make)
        model = models.build_autoencoder()
        model.load_state_dict(state["model"])
        model.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
        return model.eval().to(memory_format=torch.channels_last)

    @cached_property
    def latents(self) -> dict:
        """Shifted and scaled latents [N, 4, 16, 16], and reconstructions of the first M, uint8 [M, 64, 64, 3]."""

        def make() -> dict:
            print("encoding the pictures", flush=True)
            shift, scale = self.autoencoder.config.shift_factor, self.autoencoder.config.scaling_factor
            latents = (train_autoencoder.encode_images(self.autoencoder, self.data["images"]) - shift) * scale
            first = latents[: self.scaled(DECODED_PICTURES, 64)]
            decoded = train_autoencoder.decode_latents(self.autoencoder, first / scale + shift)
            return {"latents": latents, "decoded": decoded}

        return self._stage("latents", make)

    @cached_property
    def generator(self) -> train_generator.Generator:
        return train_generator.train_generator(
            self.latents["latents"], self.data["captions"], self.data["covers"], self.work / "generator.pt",
            steps=self.scaled(train_generator.STEPS), hard_steps=self.scaled(train_generator.HARD_STEPS),
            seed=GENERATOR_SEED,
        )  # fmt: skip

    def reward(self, seed: int):
        """The CLIP and the aesthetic head of one seed."""

        def make() -> dict:
            clip, head = train_reward.train_reward(
                self.data["images"], self.latents["decoded"], self.data["captions"], self.data["counts"],
                self.data["covers"], steps=self.scaled(train_reward.STEPS), seed=seed, device=self.device,
            )  # fmt: skip
            return {"clip": clip.state_dict(), "head": head.state_dict()}

        state = self._stage(f"reward-{seed}", make)
        return reward_from_state(state["clip"], state["head"])

    def run(self, stage: str) -> None:
        if stage.startswith("reward-"):
            self.reward(int(stage.removeprefix("reward-")))
        else:
            getattr(self, stage)


def reward_from_state(clip_state: dict[str, Tensor], head_state: dict[str, Tensor]):
    """The CLIP and its aesthetic head from their state dicts."""
    from open_clip.model import CLIP

    clip, head = CLIP(**copy.deepcopy(models.CLIP_CONFIG)), models.build_aesthetic_head()
    clip.load_state_dict(clip_state)
    head.load_state_dict(head_state)
    return clip.eval(), head.eval()


def generator_from_state(state_path: Path) -> train_generator.Generator:
    """The running average that a generator's state file holds, at whatever step it stands."""
    generator = train_generator.Generator()
    generator.load_state_dict(torch.load(state_path, weights_only=True, map_location="cpu")["average"])
    return generator.eval()


# -------------------------------------------------------------------------------------------------------------- packing


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 copies, each checked to be finite."""
    halves = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in state.items()}
    for name, t in halves.items():
        if not torch.isfinite(t).all():
            raise FloatingPointError(f"{name}: not finite in float16")
    return halves


def save_pipeline(autoencoder, generator: train_generator.Generator, out: Path) -> None:
    """A StableDiffusion3Pipeline folder of diffusers, in float16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    halves = {}
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        halves[name] = copy.deepcopy(getattr(generator, name)).cpu().half()
        _half(halves[name].state_dict())
    tokenizer = models.build_tokenizer()
    vae = copy.deepcopy(autoencoder).to(memory_format=torch.contiguous_format).half()
    _half(vae.state_dict())
    # The stock class: what lies on disk is an ordinary SD3 folder that any diffusers program can load.
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=models.SCHEDULER_SHIFT), vae=vae, **halves,
        tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(out)  # fmt: skip


def save_reward(clip, head, out: Path) -> None:
    """A folder of open_clip with tokenizer and aesthetic head, in float16."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    model_config = copy.deepcopy(models.CLIP_CONFIG)
    model_config["text_cfg"]["hf_tokenizer_name"] = "stitchvm-playground"  # any name: the files lie in the folder
    preprocess = {
        "size": world.SIZE, "mode": "RGB", "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(_half(clip.state_dict()), out / "open_clip_model.safetensors", metadata={"format": "pt"})
    metadata = {"format": "pt", "activation": head.activation}
    save_file(_half(head.state_dict()), out / "aesthetic_head.safetensors", metadata=metadata)
    models.build_tokenizer().save_pretrained(out)


def check_out(out: Path) -> None:
    """Refuse to replace anything but older weights."""
    if out.exists() and not (
        out.is_dir() and (not any(out.iterdir()) or (out / "pipeline/model_index.json").is_file())
    ):
        raise OSError(f"out: expected a new or empty folder or older playground weights, got {out}")


def _readme(scale: float) -> str:
    share = "" if scale == 1 else f"\nA smoke test: only {scale:g} of the pictures and steps below were used.\n"
    return f"""# Weights of the StitchVM playground

Small models for demonstrations and tests. Licence: Apache-2.0, like the package.

- Origin: trained from scratch on procedurally drawn, captioned pictures of coloured shapes (`playground/world.py`,
  {PICTURES} pictures, seed {PICTURE_SEED}) by `python -m stitchvm_ext.playground.train`. No other data or weights were used.
{share}
| folder | what | trained for |
|---|---|---|
| pipeline/ | StableDiffusion3Pipeline without T5 (call the stock class with `max_sequence_length=0`): AutoencoderKL, SD3Transformer2DModel, two CLIP text encoders | autoencoder {train_autoencoder.STEPS} steps, seed {AUTOENCODER_SEED}; transformer and text encoders {train_generator.STEPS + train_generator.HARD_STEPS} steps of {train_generator.BATCH}, seed {GENERATOR_SEED} |
| reward/ | open_clip CLIP, and a scalar head on its normalised embedding in `aesthetic_head.safetensors` | {train_reward.STEPS} steps of {train_reward.BATCH}, seed {REWARD_SEEDS[0]} |
| held_out_reward/ | the same from another seed: nothing is guided by it or trained against it | {train_reward.STEPS} steps of {train_reward.BATCH}, seed {REWARD_SEEDS[1]} |
| value/ | the target reward stitched onto the transformer (`stitchvm_ext.stitch`) | {train_value.CONFIG.epochs} epochs of {train_value.TRAINING_PICTURES} pictures |
| value_vae_only/ | the baseline: the same reward stitched onto the VAE latent | {train_value.VAE_ONLY_CONFIG.epochs} epochs of the same |

Stored in float16, meant to be loaded in float32. The models know 25 words and nothing else.
"""  # noqa: E501


def pack(autoencoder, generator: train_generator.Generator, clips: list[tuple], out: Path, scale: float = 1.0) -> int:
    """Write the weights folder: pipeline/, reward/, held_out_reward/ in float16, and README.md. The value models come
    after.

    Args:
        autoencoder: AutoencoderKL with its shift and scaling factor in the configuration.
        generator: the running average.
        clips: (CLIP, aesthetic head) of the target and of the held-out reward.
        out: written under a temporary name, then renamed; replaces an older weights folder.

    Returns:
        bytes written, at most ``MAX_BYTES``.

    Raises:
        OSError: ``out`` is something else than an older weights folder.
        FloatingPointError: a weight that float16 cannot hold.
    """
    out = Path(out)
    check_out(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_pipeline(autoencoder, generator, partial / "pipeline")
    for (clip, head), name in zip(clips, ("reward", "held_out_reward"), strict=True):
        save_reward(clip, head, partial / name)
    (partial / "README.md").write_text(_readme(scale))
    for file in partial.rglob("*.json"):
        # transformers 5's new name for a class that every version knows by the old one
        file.write_text(file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)
    size = check_size(partial)
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return size


def check_size(folder: Path) -> int:
    """Bytes in a folder. Raises OSError where they are more than ``MAX_BYTES``."""
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if size > MAX_BYTES:
        raise OSError(f"out: expected at most {MAX_BYTES} bytes of weights, got {size} in {folder}")
    return size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stitchvm_ext.playground.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed weights")
    parser.add_argument(
        "--work", type=Path, default=Path("playground-training"), help="folder for intermediate results"
    )
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="share of the pictures and steps, for a smoke test"
    )
    parser.add_argument("--stage", choices=STAGES, help="run only up to this stage's result, and pack nothing")
    options = parser.parse_args(argv)

    check_out(options.out)
    training = Training(options.work, options.steps_scale, "cuda" if torch.cuda.is_available() else "cpu")
    if options.stage:
        training.run(options.stage)
        return
    autoencoder, generator = training.autoencoder, training.generator
    clips = [training.reward(seed) for seed in REWARD_SEEDS]
    pack(autoencoder, generator, clips, options.out, options.steps_scale)
    images = training.data["images"].permute(0, 3, 1, 2)
    for vae_only in (False, True):
        train_value.train_value(options.out, options.work / "value", images, vae_only, options.steps_scale)
    print(f"{options.out}: {check_size(options.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
