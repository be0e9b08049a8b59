"""How good the playground's models are: does the generator draw what a caption says, does the autoencoder keep it, does
the CLIP tell captions apart.

    python -m stitchvm_ext.playground.evaluate --out pictures.png

Captions come from the held-out split, which no model was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation.metrics import number_captions, retrieval_at_1, variance_explained
from . import load_pipeline, load_reward, world
from .train_autoencoder import reconstruction_quality

CAPTION_SEED = 3  # neither the training nor the validation pictures' seed
REWARD_PICTURES = 1000


def kind_of(caption: str) -> str:
    """What a caption asks for: "one" object, a "count" of equal ones, or a "pair" of different ones."""
    objects = world.parse_caption(caption)
    if len(objects) == 1:
        return "one"
    return "count" if all(o.kind == objects[0].kind for o in objects) else "pair"


def held_out_captions(count: int, seed: int = CAPTION_SEED) -> list[str]:
    """Captions as the world draws them, all from the held-out split."""
    return [picture.caption for picture in world.dataset(count, seed, held_out=True)]


def sample_images(
    pipe, captions: list[str], steps: int = 28, guidance_scale: float = 3.0, seed: int = 0, batch_size: int = 16
) -> np.ndarray:
    """One picture per caption, uint8 [N, 64, 64, 3]; caption k starts from the noise of ``seed + k`` in any batch."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(captions), batch_size), desc="pictures"):
        batch = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(batch))]
        drawn = pipe(
            batch, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="np"
        )
        images.append((drawn.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def checker_accuracy(images: np.ndarray, captions: list[str]) -> dict[str, dict[str, float]]:
    """Share of pictures whose objects, colours and count are right, over all captions and by kind.

    Returns:
        ``{"all" | kind: {"objects", "colors", "count", "pictures"}}``, the last being how many there were.
    """
    if len(images) != len(captions):
        raise ValueError(f"captions: expected {len(images)}, one per picture, got {len(captions)}")
    checks = [world.check(image, caption) for image, caption in zip(images, captions, strict=True)]
    kinds = np.array([kind_of(caption) for caption in captions])
    accuracy = {}
    for kind in ("all", "one", "count", "pair"):
        chosen = [c for c, k in zip(checks, kinds, strict=True) if kind in ("all", k)]
        if chosen:
            accuracy[kind] = {
                w: float(np.mean([getattr(c, w) for c in chosen])) for w in ("objects", "colors", "count")
            }
            accuracy[kind]["pictures"] = len(chosen)
    return accuracy


def generator_accuracy(
    pipe, captions: list[str], steps: int = 28, guidance_scale: float = 3.0, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Draw one picture per caption and read it back; see :func:`checker_accuracy`."""
    return checker_accuracy(sample_images(pipe, captions, steps, guidance_scale, seed), captions)


@torch.no_grad()
def reward_accuracy(clip, aesthetic, pictures: list[world.Picture], batch_size: int = 100) -> dict[str, float]:
    """How well a CLIP reward and its aesthetic head do on pictures.

    Returns:
        ``r_at_1``: share of pictures whose best-scoring text, among all distinct captions, is their own;
        ``aesthetic_r2``: of the head against :func:`world.aesthetic`.
    """
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 255
    texts, own = number_captions([[p.caption] for p in pictures])
    embedding = torch.cat([clip.output(b.to(clip.device)).normalized for b in images.split(batch_size)])
    score: Tensor = torch.cat([aesthetic(b.to(aesthetic.device)) for b in images.split(batch_size)]).cpu()
    target = world.aesthetic(images)
    return {
        "r_at_1": retrieval_at_1(embedding, clip.encode_condition(texts), own),
        "aesthetic_r2": variance_explained(score, target),
        "captions": len(texts),
    }


def picture_grid(images: np.ndarray, captions: list[str], columns: int = 12, zoom: int = 2):
    """A PIL image of all pictures, each in a green frame where its objects are right and a red one where not."""
    from PIL import Image

    rows, cell = -(-len(images) // columns), zoom * world.SIZE + 6
    grid = Image.new("RGB", (columns * cell, rows * cell), "white")
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        frame = Image.new(
            "RGB", (cell - 2, cell - 2), (60, 160, 70) if world.check(image, caption).objects else (210, 50, 50)
        )
        frame.paste(Image.fromarray(image).resize((cell - 6, cell - 6), Image.Resampling.NEAREST), (2, 2))
        grid.paste(frame, (k % columns * cell + 1, k // columns * cell + 1))
    return grid


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stitchvm_ext.playground.evaluate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--captions", type=int, default=432, help="held-out captions to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=None, help="a folder that playground.train wrote")
    parser.add_argument("--out", type=Path, default=None, help="write the pictures to this PNG")
    options = parser.parse_args(argv)
    if options.captions < 1:
        raise ValueError(f"--captions: expected at least 1, got {options.captions}")

    captions = held_out_captions(options.captions)
    pipe = load_pipeline(options.weights).to("cuda" if torch.cuda.is_available() else "cpu")
    images = sample_images(pipe, captions, options.steps, options.guidance_scale, options.seed)
    print(f"{'captions':>10} {'pictures':>8} {'objects':>8} {'colors':>8} {'count':>8}")
    for kind, row in checker_accuracy(images, captions).items():
        print(f"{kind:>10} {row['pictures']:8d} {row['objects']:8.3f} {row['colors']:8.3f} {row['count']:8.3f}")
    pictures = world.dataset(REWARD_PICTURES, CAPTION_SEED, held_out=True)
    found = reconstruction_quality(pipe.vae.cpu(), pictures)
    print(f"autoencoder: {found['psnr']:.1f} dB, objects right in {found['objects']:.3f} of the reconstructions")
    for held_out in (False, True):
        rewards = [load_reward(kind, held_out, options.weights) for kind in ("clip", "aesthetic")]
        found = reward_accuracy(*rewards, pictures)
        print(
            f"{'held-out ' if held_out else ''}reward: image-to-text R@1 {found['r_at_1']:.3f} "
            f"among {found['captions']} captions, aesthetic R2 {found['aesthetic_r2']:.3f}"
        )
    if options.out is not None:
        partial = options.out.with_name(options.out.name + ".partial")
        picture_grid(images, captions).save(partial, format="PNG")
        partial.replace(options.out)


if __name__ == "__main__":
    main()
