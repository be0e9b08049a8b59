"""The training script at a tiny scale: stages, resuming, packing, loading, evaluating."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stitchvm_ext import playground
from stitchvm_ext.playground import evaluate, train, train_autoencoder, train_generator, train_reward, world

pytest.importorskip("open_clip")
SCALE = 1e-4  # one step of each stage and 64 pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that was interrupted in its last stage: its work folder and the packed weights."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("packed") / "weights"
    arguments = ["--out", str(out), "--work", str(work), "--steps-scale", str(SCALE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_autoencoder, "BATCH", 4)
        patch.setattr(train_generator, "BATCH", 4)
        patch.setattr(train_reward, "BATCH", 8)
        whole = train_reward.train_reward

        def interrupted(*args, seed, **kwargs):
            if seed == 1:
                raise KeyboardInterrupt
            return whole(*args, seed=seed, **kwargs)

        patch.setattr(train_reward, "train_reward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
        assert not out.exists() and not (work / "reward-1.pt").exists()
        before = {f.name: f.stat().st_mtime_ns for f in work.iterdir()}

        patch.setattr(train_reward, "train_reward", whole)
        patch.setattr(world, "dataset", lambda *a, **k: pytest.fail("the pictures were drawn again"))
        train.main(arguments)
        kept = {f.name: f.stat().st_mtime_ns for f in work.iterdir() if f.name in before and f.name != "settings.json"}
        assert all(before[name] == time for name, time in kept.items())
    return work, out


def test_stages_are_stored_under_their_names(run):
    work, _ = run
    assert {f.name for f in work.iterdir()} == {f"{stage}.pt" for stage in train.STAGES} | {"settings.json", "value"}


def test_packed_folders(run):
    _, out = run
    files = [f for f in out.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors", ".md"}
    assert sum(f.stat().st_size for f in files) <= train.MAX_BYTES
    readme = (out / "README.md").read_text()
    assert "Apache-2.0" in readme and "playground.train" in readme and f"only {SCALE:g}" in readme
    assert json.loads((out / "pipeline/model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    assert not any("TokenizersBackend" in f.read_text() for f in out.rglob("*.json"))


def test_packed_weights_are_the_trained_ones_in_half_precision(run):
    work, out = run
    pipe = playground.load_pipeline(out)
    assert type(pipe).__name__ == "PlaygroundPipeline" and pipe.text_encoder_3 is None
    generator = train.generator_from_state(work / "generator.pt")
    state = torch.load(work / "autoencoder.pt", weights_only=True)
    clip, head = (torch.load(work / "reward-1.pt", weights_only=True)[name] for name in ("clip", "head"))
    held_out = playground.load_reward("aesthetic", held_out=True, folder=out)
    pairs = [(pipe.vae, state["model"]), (held_out.head, head)]
    pairs += [(held_out.visual, {n.removeprefix("visual."): t for n, t in clip.items() if n.startswith("visual.")})]
    pairs += [
        (getattr(pipe, n), getattr(generator, n).state_dict())
        for n in ("transformer", "text_encoder", "text_encoder_2")
    ]
    for module, expected in pairs:
        got = module.state_dict()
        assert got.keys() == expected.keys() and not any(p.requires_grad for p in module.parameters())
        for name, t in got.items():
            assert t.dtype == torch.float32 and torch.equal(t, expected[name].half().float()), name
    assert pipe.vae.config.scaling_factor == state["scale"] and pipe.vae.config.shift_factor == state["shift"]


def test_ordinary_diffusers_loads_the_same_pipeline(run):
    from diffusers import StableDiffusion3Pipeline

    _, out = run
    stock = StableDiffusion3Pipeline.from_pretrained(out / "pipeline", text_encoder_3=None, tokenizer_3=None)
    for module in (stock.transformer, stock.vae, stock.text_encoder, stock.text_encoder_2):
        module.float()
    ours = playground.load_pipeline(out)
    draw = dict(num_inference_steps=2, guidance_scale=3.0, output_type="np")
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    expected = stock(["a red circle"], generator=torch.Generator().manual_seed(1), max_sequence_length=0, **draw)
    got = ours(["a red circle"], generator=torch.Generator().manual_seed(1), **draw)
    assert np.array_equal(got.images, expected.images) and got.images.shape == (1, 64, 64, 3)
    with_zeros = stock(["a red circle"], generator=torch.Generator().manual_seed(1), **draw)
    assert not np.array_equal(got.images, with_zeros.images)


def test_rewards_load_and_differ_between_seeds(run):
    _, out = run
    images = torch.rand(2, 3, 64, 64)
    captions = ["a red circle", "two green triangles"]
    target, held_out = (playground.load_reward(held_out=h, folder=out)(images, captions) for h in (False, True))
    assert target.shape == (2,) and not torch.equal(target, held_out)
    assert playground.load_reward("aesthetic", folder=out)(images).shape == (2,)


def test_value_models_load_beside_their_reward(run):
    _, out = run
    pipe, reward = playground.load_pipeline(out), playground.load_reward(folder=out)
    stitched, vae_only = (playground.load_value(pipe, vae_only=v, folder=out) for v in (False, True))
    assert stitched.depth >= 1 and vae_only.depth == 0
    # the text tower is read from ../reward, wherever the folder lies
    captions = ["a red circle", "two green triangles"]
    assert torch.allclose(stitched.suffix.encode_condition(captions), reward.encode_condition(captions), atol=1e-6)


def test_evaluation_runs_on_packed_weights(run, tmp_path, capsys, monkeypatch):
    _, out = run
    monkeypatch.setattr(evaluate, "REWARD_PICTURES", 12)
    evaluate.main(["--captions", "3", "--steps", "2", "--weights", str(out), "--out", str(tmp_path / "grid.png")])
    printed = capsys.readouterr().out
    assert "objects" in printed and printed.count("R@1") == 2
    from PIL import Image

    assert Image.open(tmp_path / "grid.png").size == (12 * 134, 134)


def test_training_refuses_bad_arguments(run, tmp_path):
    work, out = run
    with pytest.raises(ValueError, match="steps-scale: expected a share"):
        train.Training(tmp_path, 1.5)
    with pytest.raises(ValueError, match="holds a run with another --steps-scale"):
        train.Training(work, 0.5)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    with pytest.raises(OSError, match="out: expected a new or empty folder"):
        train.main(["--out", str(tmp_path / "thesis"), "--work", str(tmp_path / "work")])
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "one" and not (tmp_path / "work").exists()


def test_missing_and_damaged_weights_are_named(run, tmp_path):
    import shutil

    _, out = run
    with pytest.raises(OSError, match="expected model_index.json in .*playground.train"):
        playground.load_pipeline(tmp_path)
    with pytest.raises(OSError, match="expected open_clip_config.json in .*held_out_reward.*playground.train"):
        playground.load_reward(held_out=True, folder=tmp_path)
    with pytest.raises(ValueError, match="kind: expected one of"):
        playground.load_reward("beauty")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "pipeline/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    (copy / "reward/open_clip_model.safetensors").write_bytes(b"\0" * 100)
    (copy / "held_out_reward/aesthetic_head.safetensors").unlink()
    with pytest.raises(OSError, match="copy/pipeline cannot be loaded"):
        playground.load_pipeline(copy)
    with pytest.raises(OSError, match="copy/reward cannot be loaded"):
        playground.load_reward(folder=copy)
    with pytest.raises(OSError, match="copy/held_out_reward cannot be loaded"):
        playground.load_reward("aesthetic", held_out=True, folder=copy)


def test_interrupted_generator_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_generator, "BATCH", 2)
    monkeypatch.setattr(train_generator, "SAVE_EVERY", 2)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = world.dataset(8, seed=5)
    covers = torch.from_numpy(np.stack([train_generator.patch_cover(p.objects) for p in pictures]))
    arguments = (latents, [p.caption for p in pictures], covers)
    whole = train_generator.train_generator(*arguments, tmp_path / "whole.pt", steps=2, hard_steps=2)

    drawn, noise_levels = [], train_generator._noise_levels

    def killed(count, mean, generator):
        drawn.append(count)
        if len(drawn) == 4:  # in the fourth step: what the third did was not saved
            raise KeyboardInterrupt
        return noise_levels(count, mean, generator)

    monkeypatch.setattr(train_generator, "_noise_levels", killed)
    with pytest.raises(KeyboardInterrupt):
        train_generator.train_generator(*arguments, tmp_path / "killed.pt", steps=2, hard_steps=2)
    assert torch.load(tmp_path / "killed.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(train_generator, "_noise_levels", noise_levels)
    resumed = train_generator.train_generator(*arguments, tmp_path / "killed.pt", steps=2, hard_steps=2)
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt")]
    assert all(torch.equal(t, states[1]["model"][name]) for name, t in states[0]["model"].items())
    assert not any(
        torch.equal(t, states[0]["average"][name]) for name, t in states[0]["model"].items() if "proj_out.w" in name
    )


def test_patch_covers_say_where_things_are():
    drawn = world.Shape("blue", "square", x=12.0, y=44.0, radius=10.0)  # covers 4..20 by 36..52
    cover = torch.from_numpy(train_generator.patch_cover([drawn])).view(8, 8, -1)
    blue, square = world.COLOR_NAMES.index("blue"), len(world.COLORS) + world.SHAPES.index("square")
    assert torch.equal(cover[..., blue], cover[..., square])
    assert cover[5, 1, blue] == 1 and cover[0, 0, blue] == 0
    assert abs(cover[..., blue].float().sum() * 64 - 16 * 16) < 2
    assert cover.sum() == 2 * cover[..., blue].sum()
