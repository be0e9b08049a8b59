"""The drawn world and the checker that reads it back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from stitchvm_ext.playground import models, world


@pytest.fixture(scope="module")
def pictures() -> list[world.Picture]:
    return world.dataset(300, seed=77)


def test_checker_reads_fresh_pictures_back(pictures):
    checks = [world.check(p.image, p.caption) for p in pictures]
    for what in ("objects", "colors", "count"):
        assert np.mean([getattr(c, what) for c in checks]) >= 0.99


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("color", world.COLORS)
def test_every_kind_is_read_back_with_place_and_size(color, shape):
    rng = np.random.default_rng(3)
    for radius in (8.5, 12.0, 17.0):
        drawn = world.Shape(color, shape, x=30.0, y=33.0, radius=radius)
        (found,) = world.detect(world.render([drawn], rng))
        assert (found.color, found.shape) == (color, shape)
        assert (
            abs(found.x - 30) < 1.5 and abs(found.y - 33) < 0.15 * radius + 1 and abs(found.radius / radius - 1) < 0.15
        )


def _altered(picture: world.Picture, change: str) -> list[world.Shape]:
    objects = [world.Shape(**vars(o)) for o in picture.objects]
    if change == "color":
        objects[0].color = world.COLOR_NAMES[(world.COLOR_NAMES.index(objects[0].color) + 1) % len(world.COLORS)]
    elif change == "shape":
        objects[0].shape = world.SHAPES[(world.SHAPES.index(objects[0].shape) + 1) % len(world.SHAPES)]
    else:
        objects.pop()
    return objects


@pytest.mark.parametrize("change, still", [("color", "count"), ("shape", "colors"), ("count", None)])
def test_planted_errors_are_caught(pictures, change, still):
    """Pictures redrawn with one object wrong, against their old captions."""
    rng = np.random.default_rng(4)
    chosen = [p for p in pictures if len(p.objects) > 1][:60]
    checks = [world.check(world.render(_altered(p, change), rng), p.caption) for p in chosen]
    assert np.mean([c.objects for c in checks]) <= 0.02
    wrong = "objects" if change == "shape" else {"color": "colors"}.get(change, change)
    assert np.mean([getattr(c, wrong) for c in checks]) <= 0.02
    if still:
        assert np.mean([getattr(c, still) for c in checks]) >= 0.98


def test_empty_pictures_have_no_objects():
    rng = np.random.default_rng(5)
    assert all(world.detect(world.render([], rng)) == [] for _ in range(20))
    assert world.detect(rng.normal(0.5, 0.03, (64, 64, 3)).astype(np.float32)) == []


def test_float_and_uint8_pictures_read_the_same(pictures):
    for p in pictures[:20]:
        assert world.check(p.image, p.caption) == world.check(p.image.astype(np.float32) / 255, p.caption)


def test_captions_parse_to_their_objects(pictures):
    for p in pictures:
        assert Counter(o.kind for o in world.parse_caption(p.caption)) == Counter(o.kind for o in p.objects)
        assert world.caption_of(world.parse_caption(p.caption)) == p.caption


@pytest.mark.parametrize(
    "caption", ["", "a dog", "a red star", "four red circles", "a red circle and", "red circle", "a huge red ring"]
)
def test_other_texts_are_refused(caption):
    with pytest.raises(ValueError, match="caption: expected"):
        world.parse_caption(caption)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"image: expected shape \(64, 64, 3\), got \(3, 64, 64\)"):
        world.detect(np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="shape: expected one of"):
        world.signed_distance("star", 32, 32, 10)


def test_splits_share_no_caption_and_seeds_repeat(pictures):
    held_out = world.dataset(150, seed=78, held_out=True)
    assert not {p.caption for p in held_out} & {p.caption for p in pictures}
    assert all(world.is_held_out(p.caption) for p in held_out)
    again = world.dataset(20, seed=77)
    assert all(
        np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(again, pictures, strict=False)
    )
    captions = {
        world.caption_of([world.Shape(c, s, z)]) for c in world.COLORS for s in world.SHAPES for z in world.RADII
    }
    assert 0.02 < np.mean([world.is_held_out(c) for c in captions]) < 0.25


def test_aesthetic_target_is_standardised_and_differentiable(pictures):
    images = (
        torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float().div(255).requires_grad_()
    )
    score = world.aesthetic(images)
    assert abs(score.mean()) < 0.3 and 0.7 < score.std() < 1.3
    score.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()


def test_tokenizer_round_trip(pictures, tmp_path):
    tokenizer = models.build_tokenizer()
    captions = sorted({p.caption for p in pictures})
    ids = models.tokenize(tokenizer, captions)
    assert ids.shape == (len(captions), models.MAX_TOKENS)
    assert (ids[:, 0] == models.BOS_ID).all() and ((ids == models.EOS_ID).sum(1) == 1).all()
    assert ids.max() == models.EOS_ID == len(models.WORDS) - 1  # CLIP pools the text at the largest id
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == captions
    assert models.tokenize(tokenizer, [""])[0].tolist() == [models.BOS_ID, models.EOS_ID] + [models.PAD_ID] * 10
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert torch.equal(models.tokenize(AutoTokenizer.from_pretrained(tmp_path), captions), ids)
