"""Stage 2 at scale: several values at once, accumulation, processes, mixed precision, prompts, kills."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stitchvm_ext import stitch
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.data import TensorImages
from stitchvm_ext.value import FinetuneConfig, finetune, search_stitch
from stitchvm_ext.value.batches import StepData
from stitchvm_ext.value.finetune import prefix_tokens
from stitchvm_ext.value.stitching import untrained_value
from stitchvm_ext.value.targets import cache_targets
from tests import tiny
from tests.programs import run_program

run = functools.partial(run_program, Path(__file__).parent / "stitch_run.py")
TEXT = {"max_sequence_length": 0}
CONFIG = FinetuneConfig(epochs=2, batch_size=8, learning_rate=1e-4, warmup_steps=2)


@pytest.fixture
def rewards():
    return [tiny.tiny_reward(), tiny.tiny_reward(2)]


@pytest.fixture
def make_values(pipe, rewards, images):
    """Untrained values of both rewards, at depths of their own."""
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, **TEXT)
    latents = backbone.encode_images(pipe.vae, images)
    searches = [search_stitch(backbone, r, latents, images, null, layers=[1, 2], progress=False) for r in rewards]

    def make(depths=(1, 3), layers=(2, 1), prompted=False):
        torch.manual_seed(5)
        return [
            untrained_value(pipe, *rest, (16, 16), null, TEXT, prompted)
            for rest in zip(rewards, searches, depths, layers, strict=True)
        ]

    return make


@pytest.fixture
def targets(pipe, rewards, images, tmp_path):
    captions = [f"{('red', 'blue', 'green')[n % 3]} circle" for n in range(len(images))]
    source = TensorImages(images, captions)
    return cache_targets(tmp_path / "targets", pipe, rewards, source, shard_size=9, text_options=TEXT, progress=False)


def weights(values):
    return [{name: t.clone() for name, t in value.state_dict().items()} for value in values]


def assert_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# -- what a step is ----------------------------------------------------------------------------------------------------


def test_a_step_follows_from_seed_and_step_alone():
    a, b = (StepData.of(3, 5, 24, 8, 0.0) for _ in range(2))
    assert torch.equal(a.index, b.index) and torch.equal(a.sigma, b.sigma)
    rows = torch.arange(8)
    whole = a.noise(rows, (4, 16, 16))
    assert torch.equal(whole[1::2], b.noise(rows[1::2], (4, 16, 16)))
    other = StepData.of(3, 6, 24, 8, 0.0)
    assert not torch.equal(other.noise(rows, (4, 16, 16)), whole)
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    epoch = torch.cat([StepData.of(3, step, 24, 8, 0.0).index for step in (3, 4, 5)])
    assert epoch.sort().values.tolist() == list(range(24))


def test_prompts_are_read_in_their_share_of_the_batches():
    prompted = [StepData.of(0, step, 24, 8, 0.3).prompted for step in range(400)]
    assert 0.2 < sum(prompted) / 400 < 0.4
    assert not any(StepData.of(0, step, 24, 8, 0.0).prompted for step in range(20))
    assert all(StepData.of(0, step, 24, 8, 1.0).prompted for step in range(20))


# -- several values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [(1, 3), (2, 2), (0, 2)])
def test_one_prefix_pass_gives_each_value_its_tokens(make_values, latents, depths, monkeypatch):
    values = make_values(depths, (1, 1))
    sigma = torch.tensor([0.3, 0.8])
    backbone = values[0].backbone
    passes = []
    run_prefix = backbone.run_prefix
    monkeypatch.setattr(backbone, "run_prefix", lambda *args: passes.append(1) or run_prefix(*args))
    null = {name: row.expand(2, *row.shape[1:]) for name, row in values[0].null_condition.items()}
    found = prefix_tokens(values, latents, sigma, null)
    assert len(passes) == 1
    for value, tokens in zip(values, found, strict=True):
        torch.testing.assert_close(value(tokens).embedding, value.output(latents, sigma).embedding)


def test_values_trained_together_are_those_trained_alone(make_values, rewards, targets):
    """Clipping, losses and rates are each value's own."""
    together, config = make_values(), replace(CONFIG, max_grad_norm=0.05)
    losses = finetune(together, rewards, targets, config, progress=False)
    for number, alone in enumerate(make_values()):
        own = replace_teachers(targets, number)
        terms = finetune(alone, rewards[number], own, config, progress=False)
        assert terms.keys() == losses[number].keys()
        for name, means in terms.items():
            assert means == pytest.approx(losses[number][name], rel=1e-4)
        assert_close(weights([together[number]]), weights([alone]), rtol=1e-4, atol=2e-5)


def replace_teachers(targets, number):
    return type(targets)(targets.latents, [targets.teachers[number]], targets.text)


def test_stitch_of_several_rewards_gives_as_many_values(pipe, rewards, images, tmp_path):
    values = stitch(
        pipe, rewards, images, layer=1, work_dir=tmp_path, probe_images=12, config=replace(CONFIG, batch_size=4),
        text_options=TEXT, progress=False,
    )  # fmt: skip
    assert [value.suffix.num_layers for value in values] == [3, 2]
    assert (tmp_path / "search_1" / "search.json").is_file()
    for number, value in enumerate(values):
        assert value.details["training images"] == 12
        value.save_pretrained(tmp_path / str(number))


def test_values_that_do_not_belong_together_are_refused(make_values, rewards, targets, pipe):
    values = make_values()
    with pytest.raises(ValueError, match="as many as teachers and targets, got 2, 1 and 2"):
        finetune(values, rewards[:1], targets, CONFIG)
    values[1].null_prompt_embeds += 1
    with pytest.raises(ValueError, match="one null text, got another one at position 1"):
        finetune(values, rewards, targets, CONFIG)
    with pytest.raises(ValueError, match="prompt_share: expected more than 0 .* got 0.0 and prompt_conditioned=True"):
        finetune(make_values(prompted=True), rewards, targets, CONFIG)
    with pytest.raises(ValueError, match="expected targets with encoded captions"):
        bare = type(targets)(targets.latents, targets.teachers)
        finetune(make_values(prompted=True), rewards, bare, replace(CONFIG, prompt_share=0.5))


# -- accumulation, precision, prompts ----------------------------------------------------------------------------------


def test_accumulation_does_not_change_a_step(make_values, rewards, targets):
    whole, parts = make_values(), make_values()
    one = finetune(whole, rewards, targets, CONFIG, progress=False)
    four = finetune(parts, rewards, targets, replace(CONFIG, gradient_accumulation_steps=4), progress=False)
    for a, b in zip(one, four, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-4)


def test_a_state_goes_on_with_another_accumulation_and_not_with_another_rate(make_values, rewards, targets, tmp_path):
    path = tmp_path / "state.pt"
    finetune(make_values(), rewards, targets, CONFIG, state_path=path, stop_at=2, progress=False)
    other = replace(CONFIG, gradient_accumulation_steps=2, save_every=1)
    resumed = make_values()
    finetune(resumed, rewards, targets, other, state_path=path, progress=False)
    whole = make_values()
    finetune(whole, rewards, targets, CONFIG, progress=False)
    assert_close(weights(resumed), weights(whole), rtol=1e-3, atol=1e-4)
    with pytest.raises(OSError, match="learning_rate: expected 0.5, got 0.0001"):
        finetune(make_values(), rewards, targets, replace(CONFIG, learning_rate=0.5), state_path=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 3}, "expected a divisor of batch_size 8, got 3"),
        ({"mixed_precision": "fp16"}, 'expected "no" or "bf16", got \'fp16\''),
        ({"prompt_share": 1.5}, r"prompt_share: expected a share in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_processes_must_share_a_batch_equally():
    with pytest.raises(ValueError, match=r"multiple of processes \* gradient_accumulation_steps = 3 \* 1, got 8"):
        CONFIG.check_processes(3)


def test_bf16_trains_float32_weights_close_to_float32(make_values, rewards, targets):
    exact, rounded = make_values(), make_values()
    config = replace(CONFIG, epochs=6)
    losses = finetune(exact, rewards, targets, config, progress=False)
    found = finetune(rounded, rewards, targets, replace(config, mixed_precision="bf16"), progress=False)
    for a, b in zip(losses, found, strict=True):
        for name in a:
            assert a[name] != b[name]
            assert b[name] == pytest.approx(a[name], rel=0.05)
    assert all(t.dtype == torch.float32 for value in rounded for t in value.parameters())


def test_prompted_batches_read_the_captions(make_values, rewards, targets, monkeypatch):
    values = make_values((2, 2), (1, 1), prompted=True)
    backbone, read = values[0].backbone, []
    features_at = backbone.features_at

    def spy(latents, sigma, encoding, *args, **options):
        read.append({name: rows.clone() for name, rows in encoding.items()})
        return features_at(latents, sigma, encoding, *args, **options)

    monkeypatch.setattr(backbone, "features_at", spy)
    config = replace(CONFIG, epochs=3, prompt_share=0.5)
    finetune(values, rewards, targets, config, progress=False)
    steps = [StepData.of(0, step, 24, 8, 0.5) for step in range(9)]
    assert {data.prompted for data in steps} == {False, True}
    null = values[0].null_condition
    for data, encoding in zip(steps, read, strict=True):
        expected = targets.encodings(data.index) if data.prompted else null
        for name, rows in encoding.items():
            assert torch.equal(rows, expected[name].expand_as(rows))


def test_stitch_with_prompts_makes_a_prompt_conditioned_value(pipe, reward, images, tmp_path):
    config = replace(CONFIG, batch_size=4, prompt_share=0.5)
    options = {"depth": 2, "layer": 1, "work_dir": tmp_path, "probe_images": 12, "config": config}
    options |= {"text_options": TEXT, "progress": False}
    with pytest.raises(ValueError, match="expected a caption for every image"):
        stitch(pipe, reward, images, **options)
    value = stitch(pipe, reward, TensorImages(images, ["a circle"] * 24), **options)
    assert value.prompt_conditioned and value.details["share of prompted batches"] == 0.5


# -- processes and kills -----------------------------------------------------------------------------------------------


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of a run of one process with two passes per step."""
    folder = tmp_path_factory.mktemp("one")
    run(folder / "work", folder / "result.pt", "--accumulate", 2)
    return folder


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(one_process, tmp_path):
    run(tmp_path / "work", tmp_path / "result.pt", processes=2)
    assert_close(load(tmp_path / "result.pt"), load(one_process / "result.pt"), rtol=1e-5, atol=1e-6)
    states = [load(next((folder / "work").glob("state_*.pt"))) for folder in (one_process, tmp_path)]
    assert states[0]["step"] == states[1]["step"] == 14
    for one, two in zip(states[0]["history"], states[1]["history"], strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(one_process, tmp_path):
    run(tmp_path / "work", tmp_path / "begun.pt", "--stop-at", 5, "--accumulate", 2)
    run(tmp_path / "work", tmp_path / "result.pt", processes=2)
    assert_close(load(tmp_path / "result.pt"), load(one_process / "result.pt"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ten_kills_end_with_the_weights_of_an_uninterrupted_run(tmp_path):
    run(tmp_path / "whole", tmp_path / "whole.pt", "--epochs", 10)
    killed = run(tmp_path / "work", tmp_path / "never.pt", "--epochs", 10, "--kill-seed", 0).splitlines()
    assert len(killed) == 10 and all(line.startswith("killed=True") for line in killed), killed
    steps = [int(line.split("step=")[1]) for line in killed]
    assert steps == sorted(steps) and 0 < steps[-1] < 70, steps
    run(tmp_path / "work", tmp_path / "resumed.pt", "--epochs", 10)
    for whole, resumed in zip(load(tmp_path / "whole.pt"), load(tmp_path / "resumed.pt"), strict=True):
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name
