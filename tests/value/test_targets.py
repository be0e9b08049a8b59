"""The cache of latents and teacher outputs: what is computed when, and what is found again."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from stitchvm_ext.data import TensorImages
from stitchvm_ext.value.sharded import ShardedTensors
from stitchvm_ext.value.targets import cache_targets
from tests import tiny


class Counted(TensorImages):
    """Images that count how often each is decoded, and that may end the run at one of them."""

    def __init__(self, images, captions=None, breaks_at=None):
        super().__init__(images, captions)
        self.decoded, self.breaks_at = [], breaks_at

    def load(self, records):
        for record in records:
            number = int(record.name.split()[1])
            if number == self.breaks_at:
                raise KeyboardInterrupt
            self.decoded.append(number)
        return super().load(records)


def cache(folder, pipe, rewards, source, **options):
    return cache_targets(folder, pipe, rewards, source, batch_size=3, shard_size=5, progress=False, **options)


def test_rows_are_latents_and_the_teachers_outputs(pipe, reward, images, tmp_path):
    targets = cache(tmp_path, pipe, reward, images, skip=3)
    index = torch.tensor([0, 7, 20, 4])  # of several shards, out of order
    latents, [(tokens, embeddings)] = targets.batch(index)
    with torch.no_grad():
        output = reward.output(images[3:][index])
    assert len(targets) == len(images) - 3 and latents.shape == (4, 4, 16, 16)
    torch.testing.assert_close(embeddings, output.normalized)
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens.float(), output.tokens, rtol=1e-3, atol=1e-2)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["count"] == 21 and manifest["tensors"]["latents"] == {"dtype": "F32", "shape": [4, 16, 16]}
    assert manifest["identity"]["images"] == TensorImages(images).identity()
    with safe_open(tmp_path / "latents" / "00004.safetensors", "pt") as last:
        assert last.get_slice("latents").get_shape() == [1, 4, 16, 16]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_row_is_read_from_its_own_shard_alone(pipe, reward, images, tmp_path):
    cache(tmp_path, pipe, reward, images)
    latents = ShardedTensors(tmp_path / "latents")
    latents.rows(torch.tensor([6, 8, 11]))
    assert sorted(latents._open) == [1, 2]


def test_an_interrupted_run_goes_on_at_the_next_shard(pipe, reward, images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "cut", pipe, reward, Counted(images, breaks_at=13))
    again = Counted(images)
    targets = cache(tmp_path / "cut", pipe, reward, again)
    assert again.decoded == list(range(10, 24))
    whole = cache(tmp_path / "whole", pipe, reward, images)
    every = torch.arange(24)
    for a, b in zip(targets.batch(every)[1][0], whole.batch(every)[1][0], strict=True):
        assert torch.equal(a, b)
    assert targets.digest == whole.digest
    once_more = Counted(images)
    cache(tmp_path / "cut", pipe, reward, once_more)
    assert once_more.decoded == []


def test_other_images_are_computed_anew(pipe, reward, images, tmp_path):
    every = torch.arange(14)
    before = cache(tmp_path, pipe, reward, images[:14]).batch(every)[0]
    first = cache(tmp_path, pipe, reward, images)
    after = cache(tmp_path, pipe, reward, images[:14].flip(0))
    torch.testing.assert_close(after.batch(every)[0], before.flip(0))
    assert len(after) == 14 and len(list((tmp_path / "latents").glob("*.safetensors"))) == 3
    assert first.digest != after.digest


def test_another_reward_leaves_the_latents_as_they_are(pipe, images, tmp_path):
    """A reward retrained under the same name has targets of its own."""
    old, new = tiny.tiny_reward(), copy.deepcopy(tiny.tiny_reward())
    with torch.no_grad():
        new.visual.proj.mul_(-1)
    assert old.describe() == new.describe()
    before = cache(tmp_path, pipe, old, images)
    stamp = (tmp_path / "latents" / "00000.safetensors").stat().st_mtime_ns
    after = cache(tmp_path, pipe, [new, old], images)
    assert (tmp_path / "latents" / "00000.safetensors").stat().st_mtime_ns == stamp
    every = torch.arange(24)
    (_, mirrored), (_, same) = after.batch(every)[1]
    torch.testing.assert_close(mirrored, -before.batch(every)[1][0][1])
    assert torch.equal(same, before.batch(every)[1][0][1])


def test_captions_are_stored_and_encoded(pipe, reward, images, tmp_path):
    captions = [f"a red circle and {n % 5} squares" for n in range(24)]
    options = {"max_sequence_length": 0}
    source = TensorImages(images, captions)
    targets = cache(tmp_path, pipe, reward, source, skip=2, text_options=options)
    assert targets.latents.texts() == captions[2:]
    from stitchvm_ext.backbones import backbone_of

    expected = backbone_of(pipe).encode_text(pipe, [captions[8], captions[21]], **options)
    found = targets.encodings(torch.tensor([6, 19]))
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows)
    with pytest.raises(ValueError, match="expected a caption for every image"):
        cache(tmp_path / "bare", pipe, reward, TensorImages(images), text_options=options)


def test_targets_that_overflow_name_their_image(pipe, images, tmp_path):
    reward = copy.deepcopy(tiny.tiny_reward())
    with torch.no_grad():
        reward.visual.ln_post.weight.mul_(1e7)
    with pytest.raises(FloatingPointError, match="tokens of image 4 are not finite"):
        cache(tmp_path, pipe, reward, TensorImages(images), skip=4)


def test_a_broken_shard_is_named(pipe, reward, images, tmp_path):
    cache(tmp_path, pipe, reward, images)
    path = tmp_path / "latents" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match="00001.safetensors cannot be read"):
        ShardedTensors(tmp_path / "latents").rows(torch.tensor([6]))
