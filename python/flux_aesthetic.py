"""FLUX.1 [dev] x LAION's aesthetic predictor: stitch, save, measure on AVA, sample under guidance.

    python python/flux_aesthetic.py --images photos --head sac+logos+ava1-l14-linearMSE.pth \\
        --annotations AVA.txt --eval-images AVA/images
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from diffusers import FluxPipeline

from stitchvm_ext import FinetuneConfig, guided_sample, load_reward, stitch
from stitchvm_ext.evaluation import evaluate_noise_levels, read_evaluation_set
from stitchvm_ext.value.folder import add_details


def main(
    images: Path,
    head: Path,
    annotations: Path,
    eval_images: Path,
    reward: str | None = None,
    backbone: str = "black-forest-labs/FLUX.1-dev",
    out: Path = Path("flux-aesthetic"),
    device: str = "cuda",
    size: int = 512,
    probe_images: int = 200,
    eval_limit: int = 500,
    prompt: str = "a red fox in the snow",
    steps: int = 28,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008 (frozen)
) -> None:
    """Stitch the aesthetic predictor onto FLUX.1 [dev].

    Args:
        images: folder of pictures to train on, which need no labels.
        head: the predictor's file, such as sac+logos+ava1-l14-linearMSE.pth.
        annotations: AVA.txt.
        eval_images: folder of AVA's pictures, 123.jpg and so on.
        reward: folder of the CLIP that the head reads; by default OpenAI's ViT-L/14 from open_clip.
        backbone: folder of a FLUX.1 pipeline, or its name on the Hub.
        out: folder for everything that is written.
        device: where to run.
        size: of the pictures to be sampled, in pixels.
        probe_images: pictures for the closed-form search.
        eval_limit: pictures to measure on.
        prompt: of the sampled pictures.
        steps: sampling steps.
        config: the finetuning.
    """
    aesthetic = load_reward("aesthetic", reward, head=head).to(device).eval().requires_grad_(False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(backbone, torch_dtype=dtype).to(device)

    value = stitch(
        pipe, aesthetic, images, size=size, work_dir=out / "work",
        probe_images=probe_images, config=config, backbone_licence="FLUX.1 [dev] Non-Commercial License",
    )  # fmt: skip
    value.save_pretrained(out / "value")

    data = read_evaluation_set("ava", annotations, eval_images).head(eval_limit)
    report = evaluate_noise_levels(pipe, {"stitched": value}, data, reward=aesthetic)
    report.save(out)
    add_details(out / "value", "accuracy by noise level", {report.data: report.card_entry("stitched")})
    print(report.table())

    for name, estimator in {"plain": None, "guided": value}.items():
        result = guided_sample(
            pipe, estimator, prompt, num_inference_steps=steps, guidance_scale=3.5, strength=0.2, height=size,
            width=size, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        result.images[0].save(out / f"{name}.png")


if __name__ == "__main__":
    tyro.cli(main)
