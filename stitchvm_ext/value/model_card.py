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
        *(f"| {name} | {_text(value)} |" for name, value in details.items() if not isinstance(value, dict)),
        "",
        "```python",
        "from stitchvm_ext import StitchedValue",
        "",
        'value = StitchedValue.from_pretrained("this folder", pipe)',
        "```",
        "",
        *_accuracy(details.get("accuracy by noise level", {})),
        *_closed_form(details.get("closed-form search")),
        *_settings(details.get("training settings")),
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


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(_text, line))} |" for line in lines] + [""]


def _accuracy(found: dict[str, dict[str, Any]]) -> list[str]:
    """A table per evaluation set, as ``NoiseLevelReport.card_entry`` wrote it."""
    lines = ["## Accuracy by noise level", ""] if found else []
    for data, entry in found.items():
        height, width = entry["size"]
        lines.append(f"{data}: {entry['images']} images of {height} x {width} pixels.")
        if entry["clean"] is not None:
            lines[-1] += f" The clean reward's own {entry['metric']} is {entry['clean']:.3f}."
        names = [name for name in entry["rows"][0] if name != "sigma"]
        rows = [[_text(row["sigma"]), *(f"{row[name]:.3f}" for name in names)] for row in entry["rows"]]
        lines += ["", *_table(["noise level", *names], rows)]
    return lines


def _closed_form(search: dict[str, Any] | None) -> list[str]:
    """Rows i, columns j, as :class:`SearchResult` summarises them."""
    if search is None:
        return []
    cells = {(cell["depth"], cell["layer"]): cell for cell in search["cells"]}
    depths, layers = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    pick = tuple(search["pick"])

    def text(cell: tuple[int, int]) -> str:
        found = f"{cells[cell]['mse']:.4f} ({cells[cell]['unexplained']:.3f})"
        return f"**{found}**" if cell == pick else found

    rows = [[i, *(text((i, j)) for j in layers)] for i in depths]
    return [
        "## Closed-form search",
        "",
        "Mean squared error (and fraction of variance unexplained) of the least-squares stitch from backbone depth i",
        f"to reward block j on held-out images, {search['tokens']} tokens. The search's pick is in bold.",
        "",
        *_table(["i", *(f"j = {j}" for j in layers)], rows),
    ]


def _settings(config: dict[str, Any] | None) -> list[str]:
    if config is None:
        return []
    return ["## Training settings", "", *_table(["setting", "value"], [[k, v] for k, v in config.items()])]
