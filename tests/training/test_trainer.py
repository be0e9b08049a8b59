"""What every trainer does around its iterations: logs, evaluation, checkpoints, resuming."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
import torch

from stitchvm_ext.training import CleanReward, Trainer, TrainingConfig
from stitchvm_ext.training import checkpoint as checkpoints
from tests import tiny
from tests.programs import file_limit
from tests.training.build import PROMPTS, comparable, weights

CONFIG = TrainingConfig(
    iterations=4, learning_rate=1e-2, lora_rank=4, lora_alpha=8, num_inference_steps=4, max_sequence_length=0,
    rollout_batch_size=3, train_batch_size=2, eval_every=2, eval_steps=2, save_every=1,
)  # fmt: skip


class Imitation(Trainer):
    """Pulls the velocity at pure noise to zero: a loss that has a gradient at once."""

    def iterate(self, iteration):
        prompts = self.next_prompts(4)
        rows, loss = self.share(4), 0.0
        for k, generator in zip(rows, self.generators(iteration, rows), strict=True):
            noise = torch.randn(1, *self.latent_shape, generator=generator)
            velocity = self.policy.velocity(noise, 1.0, self.encode([prompts[k]]).cond)
            own = velocity.square().mean() / 4
            (own * (0.5 + torch.rand(()))).backward()  # torch's global generator as well
            loss += own.item()
        return {"gradient_norm": self.apply_gradients(iteration), **self.total(loss=loss)}


def make(folder, reward, config=CONFIG, trainer=Imitation, **changes):
    pipe = copy.deepcopy(tiny.tiny_pipeline())
    arguments = {
        "value": CleanReward(pipe, reward), "prompts": PROMPTS, "output_dir": folder, "held_out": {"clip": reward},
        "eval_prompts": ["a green ring", "a blue circle", "two rings"],
    }  # fmt: skip
    return trainer(pipe, config=config, **(arguments | changes))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_leaves_logs_pictures_and_a_lora_that_a_stock_pipeline_loads(reward, tmp_path):
    trainer = make(tmp_path, reward)
    rows = trainer.train(progress=False)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["held_out/clip" in row for row in rows] == [True, False, True, False, True]
    assert rows[4]["loss"] < rows[1]["loss"] and rows[4]["drift"] > 0
    assert (tmp_path / "curves.png").is_file()
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [
        "iteration_000003", "iteration_000004",
    ]  # fmt: skip
    stock = copy.deepcopy(tiny.tiny_pipeline())
    stock.load_lora_weights(tmp_path)
    from stitchvm_ext.backbones import backbone_of

    call = torch.randn(1, 4, 16, 16), 0.5, trainer.encode(["a ring"]).cond
    with torch.no_grad():
        with trainer.averaged():
            expected = trainer.policy.velocity(*call)
        torch.testing.assert_close(backbone_of(stock).velocity(*call), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(trainer.policy.velocity(*call), expected)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(reward, tmp_path):
    whole = make(tmp_path / "whole", reward)
    rows = whole.train(progress=False)
    for stop in (1, 3):
        torch.manual_seed(stop)  # somebody else's use of the global generator
        make(tmp_path / "parts", reward).train(stop_at=stop, progress=False)
    parts = make(tmp_path / "parts", reward)
    assert parts.iteration == 3 and parts.position == 12 and parts.optimizer_steps == 3
    assert comparable(parts.train(progress=False)) == comparable(rows)
    assert_equal(weights(parts), weights(whole))
    again = make(tmp_path / "parts", reward)
    assert comparable(again.train(progress=False)) == comparable(rows)  # nothing is left to do


def test_a_run_that_ended_between_checkpoints_writes_its_lines_once(reward, tmp_path):
    config = replace(CONFIG, save_every=3)
    make(tmp_path, reward, config).train(stop_at=3, progress=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "loss": 0.0}) + "\n" + '{"iteration": 5, "lo')
    rows = make(tmp_path, reward, config).train(progress=False)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4] and rows[4]["loss"] > 0


def test_evaluation_reads_the_averaged_weights_and_changes_nothing(reward, tmp_path):
    trainer = make(tmp_path, reward)
    trainer.train(stop_at=3, progress=False)
    before, state = weights(trainer), torch.get_rng_state()
    first = trainer.evaluate()
    assert_equal(weights(trainer), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.evaluate() == first
    with trainer.averaged():
        averaged = {k: p.clone() for k, p in trainer.parameters.items()}
    assert any(not torch.equal(p, averaged[k]) for k, p in trainer.parameters.items())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_good_checkpoint(reward, tmp_path, monkeypatch):
    trainer = make(tmp_path, reward)
    trainer.train(stop_at=2, progress=False)
    good = checkpoints.list_checkpoints(tmp_path / "checkpoints")
    save = torch.save

    def full(state, file):
        save({"part": torch.zeros(10)}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with (
        pytest.warns(UserWarning, match="iteration_000003 could not be written .*No space left.*training goes on"),
        pytest.raises(OSError, match="iteration_000004 could not be written"),
    ):
        make(tmp_path, reward).train(progress=False)
    assert checkpoints.list_checkpoints(tmp_path / "checkpoints") == good
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert make(tmp_path, reward).iteration == 2


def test_writers_that_run_out_of_room_leave_the_last_good_checkpoint(reward, tmp_path):
    """A limit on a file's size instead of the disk's: the errors are those of torch's and of safetensors' writers."""
    trainer = make(tmp_path, reward)
    trainer.train(stop_at=1, progress=False)
    folder = tmp_path / "checkpoints"
    good = checkpoints.list_checkpoints(folder)
    trainer.iteration = 2
    with file_limit(10_000):
        with pytest.raises(OSError, match="iteration_000002 could not be written"):
            trainer.save()
        with pytest.warns(UserWarning, match="iteration_000002 could not be written .*training goes on"):
            trainer.save(or_warn=True)
        with pytest.raises(OSError, match="iteration_000002 could not be written .*LoRA"):  # a state that fits
            checkpoints.save_checkpoint(folder, 2, {"run": {}}, 2, trainer.export)
        with pytest.raises(OSError, match="LoRA: its weights could not be written into"):
            trainer.export(tmp_path)
    assert checkpoints.list_checkpoints(folder) == good and not list(folder.glob(".*"))
    assert make(tmp_path, reward).iteration == 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before(reward, tmp_path):
    make(tmp_path, reward).train(stop_at=2, progress=False)
    newest = checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1] / checkpoints.STATE
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.warns(UserWarning, match="cannot be read .*trying the one before"):
        assert make(tmp_path, reward).iteration == 1
    for path in checkpoints.list_checkpoints(tmp_path / "checkpoints"):
        os.truncate(path / checkpoints.STATE, 10)
    with pytest.raises(OSError, match="none of those in"), pytest.warns(UserWarning):
        make(tmp_path, reward)


def test_checkpoints_of_another_run_are_refused(reward, tmp_path):
    trainer = make(tmp_path, reward)
    trainer.train(stop_at=1, progress=False)
    with pytest.raises(OSError, match="another run .*learning_rate: expected 0.5, got 0.01"):
        make(tmp_path, reward, replace(CONFIG, learning_rate=0.5))
    with pytest.raises(OSError, match="another run .*prompts: expected"):
        make(tmp_path, reward, prompts=PROMPTS[:2])
    pipe = copy.deepcopy(tiny.tiny_pipeline())
    pipe.transformer = tiny.tiny_transformer(seed=9)
    other = {"config": CONFIG, "output_dir": tmp_path, "held_out": {"clip": reward}, "eval_prompts": ["a ring"]}
    with pytest.raises(OSError, match="another run .*backbone: expected"):
        Imitation(pipe, CleanReward(pipe, reward), PROMPTS, **other)
    make(tmp_path, reward, replace(CONFIG, rollout_batch_size=1, iterations=9, save_every=2))
    path = checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1] / checkpoints.STATE
    torch.save({**torch.load(path, weights_only=True), "format_version": 0}, path)
    with pytest.raises(OSError, match="expected format version 1, got 0"):
        make(tmp_path, reward)


def test_a_gradient_that_is_not_finite_is_named(reward, tmp_path):
    class Broken(Imitation):
        def iterate(self, iteration):
            if iteration == 1:
                parameter = next(iter(self.parameters.values()))
                parameter.grad = torch.full_like(parameter, torch.nan)
            return super().iterate(iteration)

    trainer = make(tmp_path, reward, trainer=Broken)
    with pytest.raises(FloatingPointError, match=r"the gradient of transformer_blocks.0.attn.* at iteration 1"):
        trainer.train(progress=False)
    assert make(tmp_path, reward, trainer=Broken).iteration == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": {}}, "held_out: expected at least one clean reward"),
        ({"eval_prompts": []}, "eval_prompts: expected at least one text"),
        ({"prompts": []}, "prompts: expected at least one text"),
        ({"config": replace(CONFIG, height=33)}, "height: expected a multiple of 2 pixels, got 33"),
    ],
)
def test_bad_arguments_are_refused(changes, message, reward, tmp_path):
    config = changes.pop("config", CONFIG)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, reward, config, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations: expected an integer of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
        ({"mixed_precision": "fp16"}, r"mixed_precision: expected one of \['no', 'bf16'\], got 'fp16'"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)
