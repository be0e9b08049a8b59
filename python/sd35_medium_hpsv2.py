"""SD 3.5 Medium x HPSv2: stitch, save, measure on HPDv2's test pictures, sample under guidance.

    python python/sd35_medium_hpsv2.py --images photos --reward HPS_v2.1_compressed.pt \\
        --annotations HPDv2/test.json --eval-images HPDv2/test
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline

from stitchvm_ext import FinetuneConfig, guided_sample, load_reward, stitch
from stitchvm_ext.evaluation import evaluate_noise_levels, read_evaluation_set
from stitchvm_ext.value.folder import add_details


def main(
    images: Path,
    reward: Path,
    annotations: Path,
    eval_images: Path,
    reward_model: str = "ViT-H-14",
    backbone: str = "stabilityai/stable-diffusion-3.5-medium",
    out: Path = Path("sd35-medium-hpsv2"),
    device: str = "cuda",
    size: int = 512,
    probe_images: int = 200,
    eval_limit: int = 450,
    prompt: str = "a red fox in the snow",
    steps: int = 28,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008 (frozen)
) -> None:
    """Stitch HPSv2 onto SD 3.5 Medium.

    Args:
        images: folder of pictures to train on, which need no labels.
        reward: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
        annotations: HPDv2's test.json.
        eval_images: the folder that its paths are relative to.
        reward_model: open_clip's name of the network in that file.
        backbone: folder of a Stable Diffusion 3.5 pipeline, or its name on the Hub.
        out: folder for everything that is written.
        device: where to run.
        size: of the pictures to be sampled, in pixels.
        probe_images: pictures for the closed-form search.
        eval_limit: pictures to measure on.
        prompt: of the sampled pictures.
        steps: sampling steps.
        config: the finetuning.
    """
    hps = load_reward("hpsv2", reward, model=reward_model).to(device).eval().requires_grad_(False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone, torch_dtype=dtype).to(device)

    value = stitch(
        pipe, hps, images, size=size, work_dir=out / "work", probe_images=probe_images,
        config=config, text_options={"max_sequence_length": 256}, backbone_licence="stabilityai-ai-community",
    )  # fmt: skip
    value.save_pretrained(out / "value")

    data = read_evaluation_set("hpdv2", annotations, eval_images).head(eval_limit)
    report = evaluate_noise_levels(pipe, {"stitched": value}, data, reward=hps)
    report.save(out)
    add_details(out / "value", "accuracy by noise level", {report.data: report.card_entry("stitched")})
    print(report.table())

    for name, estimator in {"plain": None, "guided": value}.items():
        result = guided_sample(
            pipe, estimator, prompt, num_inference_steps=steps, guidance_scale=4.5, strength=0.2, height=size,
            width=size, generator=torch.Generator().manual_seed(0), max_sequence_length=256,
        )  # fmt: skip
        result.images[0].save(out / f"{name}.png")


if __name__ == "__main__":
    tyro.cli(main)
