"""Small evaluation sets in the public formats, drawn by the playground."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from stitchvm_ext.playground import world


def pictures(count: int, seed: int = 11) -> list[world.Picture]:
    return world.dataset(count, seed, held_out=True)


def write_pictures(folder: Path, found: list[world.Picture], names: list[str], size=None) -> None:
    for picture, name in zip(found, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture.image)
        (image if size is None else image.resize(size)).save(folder / name)


def write_coco(folder: Path, count: int = 6, size=None) -> tuple[Path, Path]:
    """Annotations and picture folder: two captions each, the first the picture's own."""
    found = pictures(count)
    names = [f"{k:012d}.png" for k in range(count)]
    write_pictures(folder / "val", found, names, size)
    document = {
        "images": [{"id": 100 + k, "file_name": name, "height": 64, "width": 64} for k, name in enumerate(names)],
        "annotations": [
            {"id": 2 * k + n, "image_id": 100 + k, "caption": text}
            for k, p in enumerate(found)
            for n, text in enumerate((p.caption, f"{p.caption} on white"))
        ],
    }
    (folder / "captions.json").write_text(json.dumps(document))
    return folder / "captions.json", folder / "val"


def write_hpdv2(folder: Path, groups: int = 2, each: int = 3) -> tuple[Path, Path]:
    """As test.json: pictures for the first one's caption, which is ranked 1; the others follow as they come."""
    document = []
    for g in range(groups):
        found = pictures(each, seed=20 + g)
        names = [f"test/{g}_{k}.png" for k in range(each)]
        write_pictures(folder / "images", found, names)
        document.append({"prompt": found[0].caption, "image_path": names, "rank": list(range(1, each + 1))})
    (folder / "test.json").write_text(json.dumps(document))
    return folder / "test.json", folder / "images"


def write_ava(folder: Path, count: int = 5) -> tuple[Path, Path]:
    """As AVA.txt, with two tags and a challenge behind ten counts; its last picture is not in the folder."""
    write_pictures(folder / "images", pictures(count - 1), [f"{900 + k}.jpg" for k in range(count - 1)])
    lines = []
    for k in range(count):
        votes = [0] * 10
        votes[k], votes[9 - k] = 3, votes[9 - k] + 1
        lines.append(f"{k + 1} {900 + k} {' '.join(map(str, votes))} 1 22 1396")
    (folder / "AVA.txt").write_text("\n".join(lines) + "\n")
    return folder / "AVA.txt", folder / "images"
