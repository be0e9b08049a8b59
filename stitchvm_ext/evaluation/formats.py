"""Public evaluation data as they are published: MSCOCO captions, HPDv2, AVA. Pictures stay on disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metrics import number_captions, preference_accuracy, retrieval_at_1, spearman


@dataclass(frozen=True)
class EvaluationSet(ABC):
    """Pictures, and what people said of them.

    Attributes:
        name: of the data, for tables and the model card.
        images: N paths.
        prompts: N texts that a value scores the pictures for; None where the data have none.
    """

    name: str
    images: list[Path]
    prompts: list[str] | None

    metric = ""  # what ``measure`` returns
    by_embedding = False  # it compares image embeddings, not scores

    @abstractmethod
    def measure(self, scores: Tensor, embeddings: Tensor | None = None, texts: Tensor | None = None) -> float:
        """The metric of scores [N], or of normalised embeddings [N, D] and those of ``self.texts`` [M, D]."""

    @abstractmethod
    def head(self, count: int) -> EvaluationSet:
        """About the first ``count`` pictures: no group of pictures is cut in two."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class CaptionedImages(EvaluationSet):
    """Every picture has one or more captions. A value scores it for one: its own, or every second time another's."""

    captions: list[list[str]]

    metric = "R@1"
    by_embedding = True

    @classmethod
    def of(cls, name: str, images: list[Path], captions: list[list[str]]) -> CaptionedImages:
        """With prompts so that every second picture is scored for a caption of another: a reward that varies."""
        count = len(images)
        prompts = [captions[k if k % 2 else (k + count // 2) % count][0] for k in range(count)]
        return cls(name, images, prompts, captions)

    @property
    def texts(self) -> list[str]:
        return number_captions(self.captions)[0]

    def measure(self, scores: Tensor, embeddings: Tensor | None = None, texts: Tensor | None = None) -> float:
        return retrieval_at_1(embeddings, texts, number_captions(self.captions)[1])

    def head(self, count: int) -> CaptionedImages:
        return self.of(self.name, self.images[:count], self.captions[:count])


@dataclass(frozen=True)
class RankedImages(EvaluationSet):
    """Groups of pictures for one prompt each, ranked by people: ``ranks`` [N], smaller is better."""

    ranks: Tensor
    group_sizes: list[int]

    metric = "preference accuracy"

    def measure(self, scores: Tensor, embeddings: Tensor | None = None, texts: Tensor | None = None) -> float:
        return preference_accuracy(scores, self.ranks, self.group_sizes)

    def head(self, count: int) -> RankedImages:
        groups = max(1, sum(end <= count for end in accumulate(self.group_sizes)))
        end = sum(self.group_sizes[:groups])
        return RankedImages(
            self.name, self.images[:end], self.prompts[:end], self.ranks[:end], self.group_sizes[:groups]
        )


@dataclass(frozen=True)
class RatedImages(EvaluationSet):
    """Pictures with people's mean ratings [N], larger is better."""

    ratings: Tensor

    metric = "Spearman with people's ratings"

    def measure(self, scores: Tensor, embeddings: Tensor | None = None, texts: Tensor | None = None) -> float:
        return spearman(scores, self.ratings)

    def head(self, count: int) -> RatedImages:
        prompts = None if self.prompts is None else self.prompts[:count]
        return RatedImages(self.name, self.images[:count], prompts, self.ratings[:count])


# -- the formats -------------------------------------------------------------------------------------------------------


def read_coco(annotations: Path, images: Path) -> CaptionedImages:
    """MSCOCO's captions_val2017.json and its folder of pictures. Pictures without a caption are left out."""
    document = _read_json(annotations, dict, "MSCOCO captions with 'images' and 'annotations'")
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(str(annotation["caption"]).strip())
        chosen = [image for image in document["images"] if captions[image["id"]]]
        paths = [images / image["file_name"] for image in chosen]
    except (KeyError, TypeError) as error:
        raise ValueError(f"annotations: {annotations} does not fit MSCOCO captions: {error!r}") from error
    return CaptionedImages.of("MSCOCO captions", _existing(paths), [captions[image["id"]] for image in chosen])


def read_hpdv2(annotations: Path, images: Path) -> RankedImages:
    """HPDv2's test.json (``image_path`` and ``rank``, 1 or 0 the best) or train.json (``file_path`` and
    ``human_preference``, 1 for the preferred picture), and the folder that its paths are relative to.
    """
    groups = _read_json(annotations, list, "HPDv2's list of prompts with images and ranks")
    paths: list[Path] = []
    prompts: list[str] = []
    ranks: list[float] = []
    sizes: list[int] = []
    for number, group in enumerate(groups):
        try:
            files = group["image_path"] if "image_path" in group else group["file_path"]
            order = group["rank"] if "rank" in group else [-p for p in group["human_preference"]]
            prompt = str(group["prompt"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"annotations: entry {number} of {annotations} does not fit HPDv2: {error!r}") from error
        if len(files) != len(order):
            raise ValueError(
                f"annotations: expected a rank for each of the {len(files)} images of entry {number} in {annotations}, "
                f"got {len(order)}"
            )
        paths += [images / file for file in files]
        prompts += [prompt] * len(files)
        ranks += map(float, order)
        sizes.append(len(files))
    return RankedImages("HPDv2", _existing(paths), prompts, torch.tensor(ranks), sizes)


def read_ava(annotations: Path, images: Path) -> RatedImages:
    """AVA.txt (per line: index, image id, how many gave 1, 2, ... 10 points, tags) and a folder of ``<id>.jpg``.

    Pictures that are not in the folder are left out: many of AVA's are no longer to be had.
    """
    paths: list[Path] = []
    ratings: list[float] = []
    for number, line in enumerate(_read_text(annotations).splitlines(), 1):
        if not line.strip():
            continue
        try:
            _, image, *votes = (int(field) for field in line.split()[:12])
            total = sum(votes)
            rating = sum(points * count for points, count in enumerate(votes, 1)) / total
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"annotations: line {number} of {annotations} does not fit AVA.txt: {error}") from error
        if len(votes) != 10:
            raise ValueError(f"annotations: expected ten counts in line {number} of {annotations}, got {len(votes)}")
        path = images / f"{image}.jpg"
        if path.is_file():
            paths.append(path)
            ratings.append(rating)
    if not paths:
        raise OSError(f"images: expected files such as {image}.jpg in {images}, found none of {annotations}")
    return RatedImages("AVA", paths, None, torch.tensor(ratings))


FORMATS: dict[str, Callable[[Path, Path], EvaluationSet]] = {"coco": read_coco, "hpdv2": read_hpdv2, "ava": read_ava}


def read_evaluation_set(format: str, annotations: str | Path, images: str | Path) -> EvaluationSet:
    """An evaluation set from its annotation file and its folder of pictures; ``format`` is one of ``FORMATS``.

    Raises:
        ValueError: an unknown format, or annotations that do not fit it.
        OSError: a missing file or folder.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {sorted(FORMATS)}, got {format!r}")
    if not Path(images).is_dir():
        raise OSError(f"images: expected a folder of pictures, got {images}, which is not there")
    return FORMATS[format](Path(annotations), Path(images))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"annotations: {path} cannot be read: {error}") from error


def _read_json(path: Path, kind: type, expected: str):
    try:
        document = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"annotations: expected {expected} in {path}, got no JSON: {error}") from error
    if not isinstance(document, kind) or not document:
        raise ValueError(f"annotations: expected {expected} in {path}, got {type(document).__name__}")
    return document


def _existing(paths: list[Path]) -> list[Path]:
    """The paths; OSError where some are missing, which says how many and names three."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise OSError(f"images: {len(missing)} of {len(paths)} are missing: {', '.join(islice(missing, 3))}")
    if not paths:
        raise ValueError("annotations: expected at least one picture, got none")
    return paths
