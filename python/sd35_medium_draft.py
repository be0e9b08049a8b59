"""SD 3.5 Medium x (DFN-CLIP + HPSv2): stitch both, then DRaFT through their values, at 512 pixels.

    python python/sd35_medium_draft.py --images photos --hps HPS_v2.1_compressed.pt --prompts hpdv2_prompts.txt

The value models land in OUT/dfn-clip and OUT/hpsv2, the run in OUT/draft: curves.png, samples and, at the end, a LoRA
that `pipe.load_lora_weights` loads. With --clean the rewards themselves are trained on, for comparison. On several
GPUs, with the value models at hand: torchrun --nproc-per-node 8 -m stitchvm_ext.cli align --method draft ...
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline

from stitchvm_ext import (
    CleanReward,
    DraftConfig,
    DraftTrainer,
    FinetuneConfig,
    RewardSum,
    ValueSum,
    load_reward,
    stitch,
)
from stitchvm_ext.training import PromptDataset

DRAFT = DraftConfig(stop_window=(3, 7), mixed_precision="bf16")  # of 10 steps, through the last one


def main(
    images: Path,
    hps: Path,
    prompts: Path,
    dfn: str = "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
    hps_model: str = "ViT-H-14",
    held_out: str = "yuvalkirstain/PickScore_v1",
    backbone: str = "stabilityai/stable-diffusion-3.5-medium",
    out: Path = Path("sd35-medium-aligned"),
    device: str = "cuda",
    size: int = 512,
    probe_images: int = 200,
    eval_prompts: int = 32,
    clean: bool = False,
    stitching: FinetuneConfig = FinetuneConfig(),  # noqa: B008 (frozen)
    config: DraftConfig = DRAFT,
) -> None:
    """Align SD 3.5 Medium by DRaFT: the gradient of the value, or of the rewards, through the last step of a rollout.

    Args:
        images: folder of pictures to stitch on, which need no labels.
        hps: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
        prompts: text file with one prompt per line; the paper's are HPDv2's.
        dfn: folder of DFN-CLIP, or its name on the Hub.
        hps_model: open_clip's name of the network in the HPSv2 file.
        held_out: folder of PickScore, or its name on the Hub: measured and not trained on.
        backbone: folder of a Stable Diffusion 3.5 pipeline, or its name on the Hub.
        out: folder for everything that is written.
        device: where to run.
        size: of the pictures, in pixels.
        probe_images: pictures for the closed-form search.
        eval_prompts: how many of the last prompts are kept for evaluation.
        clean: train on the rewards themselves, which read decoded samples.
        stitching: the values' finetuning.
        config: the alignment. With --clean the rollouts go to the end.
    """
    frozen = lambda reward: reward.to(device).eval().requires_grad_(False)  # noqa: E731
    rewards = [frozen(load_reward("dfn-clip", dfn)), frozen(load_reward("hpsv2", hps, model=hps_model))]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone, torch_dtype=dtype).to(device)
    settings = {**vars(config), "height": size, "width": size, "max_sequence_length": 256}

    if clean:
        value, folder = CleanReward(pipe, RewardSum([(reward, 1.0) for reward in rewards])), out / "draft-clean"
        settings["stop_window"] = None
    else:
        values = stitch(
            pipe, rewards, images, size=size, work_dir=out / "work", probe_images=probe_images, config=stitching,
            text_options={"max_sequence_length": 256}, backbone_licence="stabilityai-ai-community",
        )  # fmt: skip
        for name, one in zip(("dfn-clip", "hpsv2"), values, strict=True):
            one.save_pretrained(out / name)
        value, folder = ValueSum([(one, 1.0) for one in values]), out / "draft"

    texts = PromptDataset(prompts).texts
    judges = {"dfn-clip": rewards[0], "hpsv2": rewards[1], "pickscore": frozen(load_reward("pickscore", held_out))}
    trainer = DraftTrainer(
        pipe, value, texts[:-eval_prompts], DraftConfig(**settings), output_dir=folder, held_out=judges,
        eval_prompts=texts[-eval_prompts:],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    tyro.cli(main)
