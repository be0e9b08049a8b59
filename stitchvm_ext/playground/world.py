"""The playground's world: captioned pictures of coloured shapes, and an exact checker that reads them back.

A picture is 64x64 RGB (uint8, ``[64, 64, 3]``) with one to three shapes on a flat or gently graded background. Captions
are "a large red circle", "two green triangles", "a small blue square and a yellow ring". The checker needs NumPy alone:
it segments the palette colours, matches silhouettes against templates, and compares the multiset of (colour, shape)
with the caption.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

SIZE = 64
COLORS = {
    "red": (222, 40, 44),
    "green": (44, 168, 60),
    "blue": (44, 80, 222),
    "yellow": (244, 220, 40),
    "purple": (150, 48, 196),
    "cyan": (48, 206, 222),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
COUNTS = {word: count for count, word in COUNT_WORDS.items()}
# Radii in pixels: (low, high) for each size word, None being an object whose caption does not name its size.
RADII = {"small": (8.0, 9.5), "large": (14.5, 18.0), None: (10.0, 13.0)}
HELD_OUT_EVERY = 10  # one distinct caption in ten is never trained on

PALETTE = np.array(list(COLORS.values()), np.float32) / 255
COLOR_NAMES = tuple(COLORS)
_ROWS, _COLS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
_TRIANGLE = np.array([[0, -1], [0.95, 0.75], [-0.95, 0.75]], np.float32)


@dataclass
class Shape:
    """One drawn object. ``size`` is the caption's size word or None; centre and radius are in pixels."""

    color: str
    shape: str
    size: str | None = None
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclass
class Picture:
    """One drawn sample: ``image`` uint8 [64, 64, 3], its caption and its objects."""

    image: np.ndarray
    caption: str
    objects: list[Shape]


# -------------------------------------------------------------------------------------------------------------- drawing


def _polygon_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points [..., 2] to a polygon [K, 2]."""
    nearest = np.full(points.shape[:-1], np.inf, np.float32)
    sign = np.ones(points.shape[:-1], np.float32)
    for here, before in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        edge, offset = before - here, points - here
        along = np.clip(offset @ edge / (edge @ edge), 0, 1)[..., None]
        nearest = np.minimum(nearest, ((offset - along * edge) ** 2).sum(-1))
        below, above = points[..., 1] >= here[1], points[..., 1] < before[1]
        left = edge[0] * offset[..., 1] > edge[1] * offset[..., 0]
        sign = np.where((below & above & left) | (~below & ~above & ~left), -sign, sign)
    return sign * np.sqrt(nearest)


def signed_distance(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Distance in pixels [64, 64] from each pixel centre to the outline, negative inside the shape."""
    p = np.stack([_COLS - x, _ROWS - y], -1) / radius
    if shape == "circle":
        d = np.hypot(p[..., 0], p[..., 1]) - 0.92
    elif shape == "square":
        d = np.abs(p).max(-1) - 0.80
    elif shape == "triangle":
        d = _polygon_distance(p, _TRIANGLE)
    elif shape == "ring":
        d = np.abs(np.hypot(p[..., 0], p[..., 1]) - 0.70) - 0.25
    elif shape == "cross":
        a = np.abs(p)
        d = np.minimum(np.maximum(a[..., 0] - 0.95, a[..., 1] - 0.33), np.maximum(a[..., 1] - 0.95, a[..., 0] - 0.33))
    else:
        raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")
    return d * radius


def _background(rng: np.random.Generator) -> np.ndarray:
    base = rng.choice([0.14, 0.5, 0.88]) + rng.uniform(-0.08, 0.08)
    start = base + rng.normal(0, 0.03, 3)
    stop = start + (rng.uniform(-0.08, 0.08) if rng.random() < 0.6 else 0)
    angle = rng.uniform(0, 2 * np.pi)
    blend = ((_COLS - SIZE / 2) * np.cos(angle) + (_ROWS - SIZE / 2) * np.sin(angle)) / SIZE + 0.5
    blend = np.clip(blend, 0, 1)[..., None]
    return np.clip(start * (1 - blend) + stop * blend, 0, 1).astype(np.float32)


def render(objects: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """Draw objects, anti-aliased, on a random background: uint8 [64, 64, 3]."""
    image = _background(rng)
    for o in objects:
        cover = np.clip(0.5 - signed_distance(o.shape, o.x, o.y, o.radius), 0, 1)[..., None]
        color = np.clip(PALETTE[COLOR_NAMES.index(o.color)] + rng.normal(0, 0.025, 3), 0, 1)
        image = image * (1 - cover) + color * cover
    return (image * 255 + 0.5).astype(np.uint8)


def _place(objects: list[Shape], rng: np.random.Generator) -> bool:
    """Give every object a centre so that none touch; False when no place was found."""
    for _ in range(200):
        for o in objects:
            o.x, o.y = rng.uniform(o.radius + 1, SIZE - 1 - o.radius, 2)
        if all(
            np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 1 for i, a in enumerate(objects) for b in objects[:i]
        ):
            return True
    return False


# ------------------------------------------------------------------------------------------------------------- captions


def caption_of(objects: list[Shape]) -> str:
    """The caption of a list of objects: equal objects are counted, different ones joined with "and"."""
    first = objects[0]
    size = f"{first.size} " if first.size else ""
    if len(objects) > 1 and all(o.kind == first.kind for o in objects):
        return f"{COUNT_WORDS[len(objects)]} {size}{first.color} {PLURALS[first.shape]}"
    return " and ".join(f"a {o.size + ' ' if o.size else ''}{o.color} {o.shape}" for o in objects)


def parse_caption(caption: str) -> list[Shape]:
    """The objects that a caption of this world names. Raises ValueError for any other text."""
    objects = []
    for part in caption.split(" and "):
        words = part.split()
        size = words.pop(1) if len(words) == 4 and words[1] in ("small", "large") else None
        if len(words) != 3 or words[0] not in COUNTS or words[1] not in COLORS:
            raise ValueError(
                f"caption: expected e.g. 'two red circles' or 'a large blue ring and a green cross', got {caption!r}"
            )
        shape = SINGULARS.get(words[2], words[2])
        if shape not in SHAPES:
            raise ValueError(f"caption: expected one of the shapes {SHAPES}, got {words[2]!r} in {caption!r}")
        objects += [Shape(words[1], shape, size) for _ in range(COUNTS[words[0]])]
    return objects


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the tenth of all captions that no model of the playground is trained on."""
    return zlib.crc32(caption.encode()) % HELD_OUT_EVERY == 0


def _random_objects(rng: np.random.Generator) -> list[Shape]:
    def one(p_sized: float) -> Shape:
        size = ("small", "large")[rng.integers(2)] if rng.random() < p_sized else None
        return Shape(COLOR_NAMES[rng.integers(len(COLOR_NAMES))], SHAPES[rng.integers(len(SHAPES))], size)

    layout = rng.choice(["one", "count", "pair"], p=[0.34, 0.26, 0.40])
    if layout == "one":
        objects = [one(0.5)]
    elif layout == "count":
        template, count = one(0.0), int(rng.integers(2, 4))
        template.size = "small" if count == 2 and rng.random() < 0.3 else None
        objects = [Shape(template.color, template.shape, template.size) for _ in range(count)]
    else:
        objects = [one(0.35), one(0.35)]
        while objects[0].kind == objects[1].kind:
            objects[1] = one(0.35)
    for o in objects:
        low, high = RADII[o.size]
        if layout == "count" and o.size is None:
            low, high = (8.0, 9.5) if len(objects) == 3 else (10.0, 11.5)
        elif layout == "pair":
            high = min(high, 15.5 if o.size == "large" else 12.0)
        o.radius = rng.uniform(low, high)
    return objects


def sample(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """Draw one captioned picture whose caption lies in the training split (default) or in the held-out split."""
    while True:
        objects = _random_objects(rng)
        caption = caption_of(objects)
        if is_held_out(caption) == held_out and _place(objects, rng):
            return Picture(render(objects, rng), caption, objects)


def dataset(count: int, seed: int, held_out: bool = False) -> list[Picture]:
    """``count`` captioned pictures; the same seed gives the same pictures."""
    rng = np.random.default_rng(seed)
    return [sample(rng, held_out) for _ in range(count)]


# -------------------------------------------------------------------------------------------------------------- checker

_TEMPLATE = 20  # silhouettes are compared on a 20x20 grid
# Area of each silhouette (holes filled) at radius 1, to read an object's radius from its pixel count.
_AREAS = {
    "circle": np.pi * 0.92**2,
    "square": 1.6**2,
    "triangle": 0.5 * 1.9 * 1.75,
    "ring": np.pi * 0.95**2,
    "cross": 4 * 0.95 * 0.33 * 2 - 0.66**2,
}


@dataclass
class Detection:
    """One object found; centre and radius in pixels, ``match`` its overlap (IoU) with the best template."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    match: float


@dataclass
class Check:
    """What holds of a picture against its caption: all objects (colour and shape), the colours, the count."""

    objects: bool
    colors: bool
    count: bool


def _shifted(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    out = np.zeros_like(mask)
    h, w = mask.shape
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = mask[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def _open2x2(mask: np.ndarray) -> np.ndarray:
    """Morphological opening with a 2x2 square: keeps the pixels that lie in some fully set 2x2 square."""
    corner = mask & _shifted(mask, -1, 0) & _shifted(mask, 0, -1) & _shifted(mask, -1, -1)
    return corner | _shifted(corner, 1, 0) | _shifted(corner, 0, 1) | _shifted(corner, 1, 1)


def _flood(seed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The 4-connected part of ``mask`` that ``seed`` reaches."""
    while True:
        grown = seed.copy()
        grown[1:] |= seed[:-1]
        grown[:-1] |= seed[1:]
        grown[:, 1:] |= seed[:, :-1]
        grown[:, :-1] |= seed[:, 1:]
        grown &= mask
        if np.array_equal(grown, seed):
            return grown
        seed = grown


def _components(mask: np.ndarray) -> list[np.ndarray]:
    parts, left = [], mask.copy()
    while left.any():
        seed = np.zeros_like(left)
        seed.flat[left.argmax()] = True
        part = _flood(seed, left)
        parts.append(part)
        left &= ~part
    return parts


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    border = np.zeros_like(mask)
    border[[0, -1]] = border[:, [0, -1]] = True
    return ~_flood(border & ~mask, ~mask)


def _resize_weights(size: int) -> np.ndarray:
    """Linear interpolation [20, size] between pixel centres."""
    at = np.clip((np.arange(_TEMPLATE) + 0.5) * size / _TEMPLATE - 0.5, 0, size - 1)
    low = np.minimum(np.floor(at).astype(int), max(size - 2, 0))
    weights = np.zeros((_TEMPLATE, size), np.float32)
    weights[np.arange(_TEMPLATE), low] = 1 - (at - low)
    weights[np.arange(_TEMPLATE), np.minimum(low + 1, size - 1)] += at - low
    return weights


def _silhouette(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, resized to 20x20."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
    return _resize_weights(box.shape[0]) @ box @ _resize_weights(box.shape[1]).T


_TEMPLATE_RADII = (8.0, 10.0, 13.0, 17.0)
_TEMPLATES = np.stack(
    [_silhouette(_open2x2(signed_distance(s, SIZE / 2, SIZE / 2, r) < 0)) for s in SHAPES for r in _TEMPLATE_RADII]
)


def detect(image: np.ndarray) -> list[Detection]:
    """Find the coloured objects of a picture: uint8 [64, 64, 3], or float in [0, 1]."""
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"image: expected shape ({SIZE}, {SIZE}, 3), got {tuple(image.shape)}")
    x = image.astype(np.float32) / 255 if image.dtype == np.uint8 else np.asarray(image, np.float32)
    nearest = ((x[:, :, None] - PALETTE) ** 2).sum(-1).argmin(-1)
    colored = x.max(-1) - x.min(-1) > 0.33
    found = []
    for c, name in enumerate(COLOR_NAMES):
        for part in _components(_open2x2(colored & (nearest == c))):
            if part.sum() < 30:
                continue
            filled = _fill_holes(part)
            has_hole = filled.sum() - part.sum() > 0.1 * filled.sum()
            mask = _silhouette(part if has_hole else filled)
            overlap = np.minimum(mask, _TEMPLATES).sum((1, 2)) / np.maximum(mask, _TEMPLATES).sum((1, 2))
            if overlap.max() < 0.55:  # the mixed-colour rim of another object is a thin sliver
                continue
            shape = SHAPES[int(overlap.argmax()) // len(_TEMPLATE_RADII)]
            ys, xs = np.nonzero(filled)
            radius = float(np.sqrt(filled.sum() / _AREAS[shape]))
            found.append(
                Detection(name, shape, float(xs.mean()) + 0.5, float(ys.mean()) + 0.5, radius, float(overlap.max()))
            )
    return found


def check(image: np.ndarray, caption: str) -> Check:
    """Read a picture back and compare it with its caption."""
    wanted, got = parse_caption(caption), detect(image)
    return Check(
        objects=Counter(o.kind for o in wanted) == Counter((d.color, d.shape) for d in got),
        colors=Counter(o.color for o in wanted) == Counter(d.color for d in got),
        count=len(wanted) == len(got),
    )


# ----------------------------------------------------------------------------------------------------- aesthetic target


def aesthetic(images):
    """A smooth, caption-independent "beauty" score that a small head on CLIP embeddings is trained to predict.

    Colourfulness, a subject balanced near the centre, contrast and brightness; differentiable.

    Args:
        images: tensor [B, 3, H, W] in [0, 1].
    Returns:
        tensor [B], about zero mean and unit variance over this world's pictures.
    """
    import torch

    r, g, b = images.unbind(1)
    rg, yb = r - g, 0.5 * (r + g) - b
    spread = (rg.flatten(1).var(1) + yb.flatten(1).var(1) + 1e-6).sqrt()
    mean = (rg.flatten(1).mean(1) ** 2 + yb.flatten(1).mean(1) ** 2 + 1e-6).sqrt()
    weight = (images.amax(1) - images.amin(1)) ** 2 + 1e-4
    ys = torch.linspace(-1, 1, images.shape[2], device=images.device)[None, :, None]
    xs = torch.linspace(-1, 1, images.shape[3], device=images.device)[None, None, :]
    total = weight.flatten(1).sum(1)
    cy, cx = (weight * ys).flatten(1).sum(1) / total, (weight * xs).flatten(1).sum(1) / total
    balance = torch.exp(-(cx**2 + cy**2) / (2 * 0.35**2))
    luminance = (0.299 * r + 0.587 * g + 0.114 * b).flatten(1)
    raw = 4 * (spread + 0.3 * mean) + 1.2 * balance + 2 * luminance.std(1) + luminance.mean(1)
    return (raw - 2.41) / 0.53
