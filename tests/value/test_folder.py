"""Saved values elsewhere: on the Hub, and beside another backbone of the same latent space."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext import StitchedValue, guided_sample, search_stitch
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.value.stitching import untrained_value
from tests import tiny

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture
def value(pipe, reward, images):
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, max_sequence_length=0)
    latents = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, reward, latents, images, null, layers=[1], progress=False)
    return untrained_value(pipe, reward, search, 2, 1, (16, 16), null, {"max_sequence_length": 0})


@pytest.fixture
def other_pipe(pipe):
    """Another, deeper transformer on the same autoencoder, as SD 3.5 Large beside Medium."""
    other = copy.copy(pipe)
    other.transformer = tiny.tiny_transformer(seed=7, depth=5)
    return other


def sample(pipe, value, **options):
    options = {"num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 0, **options}
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    return guided_sample(pipe, value, PROMPTS, generator=generators, progress=False, **options)


def test_a_value_guides_another_backbone_of_its_latent_space(value, other_pipe):
    plain = sample(other_pipe, None)
    guided = sample(other_pipe, value, strength=0.3)
    assert (plain.latents - guided.latents).abs().max() > 0.02
    assert guided.values.isfinite().all()
    assert torch.equal(sample(other_pipe, value, strength=0.0).latents, plain.latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: vae.decoder.conv_in.weight.add_(1.0), "decoder"),
        (lambda vae: vae.register_to_config(scaling_factor=0.3), "normalisation"),
    ],
)
def test_another_latent_space_is_refused(value, other_pipe, change, message):
    other_pipe.vae = copy.deepcopy(other_pipe.vae)
    with torch.no_grad():
        change(other_pipe.vae)
    with pytest.raises(ValueError, match=f"another one's: {message}"):
        sample(other_pipe, value)


def test_a_prompt_conditioned_value_stays_with_its_own_texts(value, other_pipe):
    value.prompt_conditioned = True
    with pytest.raises(ValueError, match="prompt-conditioned"):
        sample(other_pipe, value)


def test_prompt_conditioning_and_latent_space_survive_saving(value, pipe, tmp_path):
    value.prompt_conditioned = True
    value.save_pretrained(tmp_path)
    loaded = StitchedValue.from_pretrained(tmp_path, pipe)
    loaded.suffix.text = value.suffix.text  # a reward built in memory has no file to read its text tower from
    assert loaded.prompt_conditioned and loaded.latent_space == value.latent_space
    assert torch.equal(sample(pipe, loaded, strength=0.3).latents, sample(pipe, value, strength=0.3).latents)


def test_push_to_hub_uploads_the_three_files_and_from_pretrained_reads_them(value, pipe, monkeypatch, tmp_path):
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
            for file in folder_path.iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, revision=None, token=None, allow_patterns=None):
        assert (repo_id, revision) == ("me/value", "main")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert value.push_to_hub("me/value", private=True, token="t") == "https://huggingface.co/me/value/commit/1"
    assert calls == {"token": "t", "repo": ("me/value", True, True)}
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = StitchedValue.from_pretrained("me/value", pipe, revision="main")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in value.state_dict().items())


def test_a_folder_that_is_not_there_is_an_os_error(pipe, tmp_path):
    with pytest.raises(OSError, match="is not there"):
        StitchedValue.from_pretrained(tmp_path / "missing", pipe)
