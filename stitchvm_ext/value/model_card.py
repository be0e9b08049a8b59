"""The README.md that travels with a saved value model."""

from __future__ import annotations

from typing import Any


def model_card(config: dict[str, Any]) -> str:
    """Markdown: what was stitched to what, how it was trained, how to load it, and whose licences it inherits."""
    reward, backbone, details = config["reward"], config["backbone"], config["details"]
    reference = reward.get("reference") or {}
    reward_name = " ".join(filter(None, (reward["class"], reference.get("name"), reference.get("pretrained"))))
    licences = {"backbone": backbone.get("licence"), "reward": reward.get("licence")}
    lines = [
        "---",
        "library_name: stitchvm_ext",
        "tags: [stitched-value-model, diffusion, reward-model]",
        "---",
        f"# Stitched value model: {backbone['class']} to {reward['class']}",
        "",
        "Scores noisy diffusion latents directly: the first blocks of a frozen diffusion backbone, a small stitching",
        "layer, and a pretrained reward from one of its blocks on (StitchVM, arXiv 2605.19804). It holds the stitch",
        "and the reward's suffix; the backbone comes from the pipeline that it is loaded onto.",
        "",
        "| | |",
        "|---|---|",
        f"| backbone blocks kept (i) | {config['depth']} |",
        f"| reward block entered (j) | {config['layer']} |",
        f"| latent size | {config['latent_size'][0]} x {config['latent_size'][1]} |",
        f"| reward | {reward_name} |",
        *(f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in details.items()),
        "",
        "```python",
        "from stitchvm_ext import StitchedValue",
        "",
        'value = StitchedValue.from_pretrained("this folder", pipe)',
        "```",
        "",
        "## Licence",
        "",
        "A stitched model is a derivative of both networks it was made from and inherits the licences of both:",
        "",
        *(
            f"- {part}: {licence or 'not recorded; see the licence of the original weights'}"
            for part, licence in licences.items()
        ),
        "",
        "## Limits",
        "",
        "Trained on noisy latents of images at the size above; at very high noise every value model falls back to the",
        "mean reward.",
        "Optimising a value hard enough finds its errors: watch a reward that is not optimised.",
    ]
    return "\n".join(lines) + "\n"
