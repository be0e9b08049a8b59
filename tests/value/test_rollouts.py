"""Training latents from the generator's own rollouts."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stitchvm_ext import FinetuneConfig, finetune, guided_sample, search_stitch
from stitchvm_ext.backbones import Condition, backbone_of, expand_rows
from stitchvm_ext.value.batches import StepData, read_batch
from stitchvm_ext.value.rollouts import cache_rollouts
from stitchvm_ext.value.stitching import untrained_value
from tests.programs import run_program
from tests.tiny.flux import tiny_flux

PROMPTS = ["a red circle", "two blue squares", "a ring", "a small green star", "three red rings"] * 2
TRAINING = FinetuneConfig(epochs=40, batch_size=10, learning_rate=3e-3, warmup_steps=1)
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 3.0, "text_options": {"max_sequence_length": 0}}


@pytest.fixture
def rolled(pipe, reward, tmp_path):
    return cache_rollouts(tmp_path, pipe, reward, PROMPTS, **SETTINGS, states=4, shard_size=4, progress=False)


def untrained(pipe, reward, images):
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, max_sequence_length=0)
    latents = backbone.encode_images(pipe.vae, images)
    search = search_stitch(backbone, reward, latents, images, null, layers=[1], progress=False)
    return untrained_value(pipe, reward, search, 2, 1, (16, 16), null, SETTINGS["text_options"])


def trajectory(targets, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All four states of a row, noisiest first, and their levels."""
    states, sigmas = targets.states(torch.tensor([row]))
    order = sigmas[0].argsort(descending=True)
    return states[0, order], sigmas[0, order]


def test_a_trajectory_is_the_samplers_own(rolled, pipe):
    """Each state follows from the one before by an Euler step of guided_sample, and the last step gives the end."""
    backbone = backbone_of(pipe)
    for row in (0, 7):
        states, sigmas = trajectory(rolled, row)
        end = rolled.batch(torch.tensor([row]))[0]
        own = guided_sample(
            pipe, None, PROMPTS[row], num_inference_steps=4, guidance_scale=3.0, latents=states[:1],
            max_sequence_length=0, output_type="latent", progress=False,
        )  # fmt: skip
        torch.testing.assert_close(own.sigmas[:-1], sigmas)
        torch.testing.assert_close(end, own.latents, rtol=1e-4, atol=1e-4)
        cond = backbone.encode_text(pipe, [PROMPTS[row]], max_sequence_length=0)
        uncond = backbone.encode_text(pipe, [""], max_sequence_length=0)
        condition = Condition((PROMPTS[row],), cond, uncond, 3.0)
        for (z, sigma), (following, lower) in itertools.pairwise(zip(states, sigmas, strict=True)):
            with torch.no_grad():
                velocity = backbone.guided_velocity(z[None], float(sigma), condition)[0]
            torch.testing.assert_close(following, z + (lower - sigma) * velocity, rtol=1e-4, atol=1e-4)


def test_targets_are_the_rewards_of_the_ends(rolled, pipe, reward):
    clean, [(_, embeddings)] = rolled.batch(torch.arange(len(PROMPTS)))
    images = backbone_of(pipe).decode_latents(pipe.vae, clean).clamp(0, 1)
    torch.testing.assert_close(embeddings, reward.output(images).normalized, rtol=1e-4, atol=1e-5)
    assert rolled.latents.texts() == PROMPTS


def test_a_step_reads_states_of_the_trajectories(rolled):
    data = StepData.of(0, 0, len(rolled), 8, 0.0)
    rows = torch.arange(8)
    batch = read_batch(rolled, data, rows)
    noisy = (1 - batch.sigma.view(-1, 1, 1, 1)) * batch.clean + batch.sigma.view(-1, 1, 1, 1) * batch.noise
    states, sigmas = rolled.states(data.index[rows])
    for row in range(8):
        place = int((sigmas[row] == batch.sigma[row]).nonzero()[0])
        torch.testing.assert_close(noisy[row], states[row, place], rtol=1e-4, atol=1e-5)
    assert len(batch.sigma.unique()) > 1


def test_an_interrupted_call_goes_on_and_a_finished_one_is_reopened(rolled, pipe, reward, tmp_path, monkeypatch):
    path = tmp_path / "latents"
    (path / "manifest.json").unlink()
    (path / "00001.safetensors").unlink()
    kept = (path / "00000.safetensors").stat().st_mtime_ns
    again = cache_rollouts(tmp_path, pipe, reward, PROMPTS, **SETTINGS, states=4, shard_size=4, progress=False)
    assert again.digest == rolled.digest
    assert (path / "00000.safetensors").stat().st_mtime_ns == kept
    index = torch.arange(len(PROMPTS))
    for new, old in zip(again.states(index), rolled.states(index), strict=True):
        assert torch.equal(new, old)
    monkeypatch.setattr(type(backbone_of(pipe)), "guided_velocity", None)  # nothing is left to sample
    cache_rollouts(tmp_path, pipe, reward, PROMPTS, **SETTINGS, states=4, shard_size=4, progress=False)


def test_another_policy_is_another_cache(rolled, reward, tmp_path, pipe):
    more = {**SETTINGS, "guidance_scale": 2.0}
    other = cache_rollouts(tmp_path, pipe, reward, PROMPTS, **more, states=4, shard_size=4, progress=False)
    assert other.digest != rolled.digest


def test_a_lora_and_its_scale_are_other_policies(pipe, reward, tmp_path):
    """Rollouts end elsewhere with the adapter than without it, and are not mistaken for one another."""
    from peft import LoraConfig

    adapted = copy.copy(pipe)
    adapted.transformer = copy.deepcopy(pipe.transformer)
    roll = lambda: cache_rollouts(tmp_path, adapted, reward, PROMPTS[:2], **SETTINGS, progress=False)  # noqa: E731
    plain = roll()
    torch.manual_seed(0)
    adapted.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name="style"
    )
    ends, digests = [plain.batch(torch.arange(2))[0]], [plain.digest]
    for scale in (1.0, 0.5):
        adapted.transformer.set_adapters("style", scale)
        found = roll()
        ends.append(found.batch(torch.arange(2))[0])
        digests.append(found.digest)
    assert len(set(digests)) == 3
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(ends, 2))


def test_distilled_guidance_is_an_input(reward, tmp_path):
    """FLUX's rollouts are guided_sample's at the same guidance_scale, without an unconditional branch."""
    pipe, options = tiny_flux(), {"num_inference_steps": 3, "guidance_scale": 6.0}
    found = cache_rollouts(tmp_path, pipe, reward, PROMPTS[:2], states=3, **options, progress=False)
    states, _ = trajectory(found, 1)
    own = guided_sample(pipe, None, PROMPTS[1], latents=states[:1], **options, output_type="latent", progress=False)
    end = found.batch(torch.tensor([1]))[0]
    torch.testing.assert_close(end, own.latents, rtol=1e-4, atol=1e-4)


def test_a_prompt_conditioned_value_reads_the_rollouts_prompts(pipe, reward, images, tmp_path):
    targets = cache_rollouts(tmp_path, pipe, reward, PROMPTS, **SETTINGS, prompt_conditioned=True, progress=False)
    encoded = backbone_of(pipe).encode_text(pipe, PROMPTS[3:5], max_sequence_length=0)
    for name, rows in targets.encodings(torch.tensor([3, 4])).items():
        torch.testing.assert_close(rows, encoded[name], rtol=1e-4, atol=1e-4)
    value = untrained(pipe, reward, images)
    value.prompt_conditioned = True
    losses = finetune(value, reward, targets, replace(TRAINING, epochs=2, prompt_share=1.0), progress=False)
    assert all(torch.isfinite(torch.tensor(terms)).all() for terms in losses.values())


@pytest.mark.slow
def test_two_processes_share_the_shards(pipe, reward, tmp_path):
    program = f"""
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
from tests import tiny
from tests.value.test_rollouts import PROMPTS, SETTINGS
from stitchvm_ext import cache_rollouts
cache_rollouts(sys.argv[1], tiny.tiny_pipeline(), tiny.tiny_reward(), PROMPTS, **SETTINGS, shard_size=4, progress=False)
"""
    (tmp_path / "run.py").write_text(program)
    run_program(tmp_path / "run.py", tmp_path / "two", processes=2)
    one = cache_rollouts(tmp_path / "one", pipe, reward, PROMPTS, **SETTINGS, shard_size=4, progress=False)
    two = cache_rollouts(tmp_path / "two", pipe, reward, PROMPTS, **SETTINGS, shard_size=4, progress=False)
    index = torch.arange(len(PROMPTS))
    assert two.digest == one.digest
    torch.testing.assert_close(two.batch(index)[0], one.batch(index)[0], rtol=1e-4, atol=1e-4)


def test_a_value_learns_from_rollouts(rolled, pipe, reward, images):
    value = untrained(pipe, reward, images)
    losses = finetune(value, reward, rolled, TRAINING, progress=False)
    assert losses["embedding"][-1] < 0.8 * losses["embedding"][0]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(value.value(latents[:2], 0.5, tiny_condition(pipe))).all()


def tiny_condition(pipe) -> Condition:
    null = expand_rows(backbone_of(pipe).null_condition(pipe, max_sequence_length=0), 2)
    return Condition(("a red circle", "a ring"), null)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": 5}, "states: expected 1 to 4"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"transition": "leap"}, "transition"),
        ({"height": 33}, "height: expected a multiple of"),
    ],
)
def test_bad_input(pipe, reward, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        cache_rollouts(tmp_path, pipe, reward, PROMPTS, **{**SETTINGS, **change}, progress=False)
    assert not list(tmp_path.iterdir())


def test_videos_are_refused(reward, tmp_path):
    from tests.tiny.catalogue import PIPELINES

    with pytest.raises(ValueError, match="pipeline of images"):
        cache_rollouts(tmp_path, PIPELINES["wan"](), reward, PROMPTS)
