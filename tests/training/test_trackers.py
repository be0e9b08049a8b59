"""Trackers: what reaches them, where a resumed run goes on, and what is refused before any work."""

from __future__ import annotations

import accelerate.tracking
import numpy as np
import pytest
from accelerate.tracking import GeneralTracker

from stitchvm_ext.training.trackers import choose_trackers
from tests.training.build import build, comparable


class Recorder(GeneralTracker):
    """Keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.calls, self.numbers, self.pictures = [], {}, {}

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step=None):
        self.numbers[step] = values

    def log_images(self, values, step=None):
        self.pictures[step] = values

    def finish(self):
        self.calls.append("finish")


def test_an_instance_gets_the_log_the_pictures_and_the_settings(tmp_path):
    recorder = Recorder()
    rows = build(tmp_path, trackers=[recorder]).train(progress=False)
    assert [{"iteration": step, **numbers} for step, numbers in recorder.numbers.items()] == rows
    assert {"reward/mean", "loss", "held_out/clip"} <= recorder.numbers[2].keys()
    start, settings, finish = recorder.calls
    assert (start, finish) == ("start", "finish")
    assert settings["trainer"] == "NFTTrainer" and settings["lora_rank"] == 4 and settings["stop_window"] == "None"
    assert list(recorder.pictures) == [0, 2, 3]  # one grid of each evaluation
    (picture,) = recorder.pictures[0]["samples"]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_a_resumed_run_hands_on_what_is_new(tmp_path):
    whole = Recorder()
    build(tmp_path / "whole", trackers=[whole]).train(progress=False)
    parts = Recorder(), Recorder()
    build(tmp_path / "parts", trackers=parts[:1]).train(stop_at=2, progress=False)
    build(tmp_path / "parts", trackers=parts[1:]).train(progress=False)
    assert [list(part.numbers) for part in parts] == [[0, 1, 2], [3]] and parts[1].calls == ["start", "finish"]
    found = parts[0].numbers | parts[1].numbers
    assert comparable(list(found.values())) == comparable(list(whole.numbers.values()))


def test_a_run_that_fails_finishes_its_trackers(tmp_path, monkeypatch):
    recorder = Recorder()
    trainer = build(tmp_path, trackers=[recorder])
    trainer.train(stop_at=1, progress=False)
    monkeypatch.setattr(trainer, "iterate", lambda iteration: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(progress=False)
    assert recorder.calls[-1] == "finish" and recorder.calls.count("start") == 2


def events(folder):
    """What TensorBoard shows of a run: steps and values by name, and pictures' sizes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    scalars = {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    return scalars, [(e.step, e.width, e.height) for e in shown.Images("samples")]


def test_tensorboard_is_the_default_and_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    build(tmp_path, save_every=2).train(stop_at=2, progress=False)
    # As a kill after the third iteration and before its checkpoint: its numbers are there, and are made again.
    trainer = build(tmp_path, save_every=2)
    trainer.save = lambda or_warn=False: None
    trainer.train(progress=False)
    rows = build(tmp_path, save_every=2).train(progress=False)
    scalars, pictures = events(tmp_path)
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3]
    for name in ("loss", "reward/mean", "held_out/clip"):
        expected = [(row["iteration"], pytest.approx(row[name])) for row in rows if name in row]
        assert scalars[name] == expected
    assert [step for step, *_ in pictures] == [0, 2, 3]


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    build(tmp_path, trackers=["wandb"]).train(stop_at=2, progress=False)
    build(tmp_path, trackers=["wandb"]).train(progress=False)
    runs = [path.name.split("-")[-1] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert len(runs) == 2 and len(set(runs)) == 1  # two parts of one run


def test_no_tracker_leaves_the_log_of_lines_alone(tmp_path):
    build(tmp_path, trackers=[]).train(stop_at=1, progress=False)
    assert (tmp_path / "metrics.jsonl").is_file() and not (tmp_path / "tensorboard").exists()


def test_trackers_that_cannot_be_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    assert choose_trackers(None) == ()
    with pytest.raises(ImportError, match="trackers: the package of 'wandb' is not installed; there is none"):
        build(tmp_path, trackers=["wandb"])
    with pytest.raises(ValueError, match=r"trackers: expected a list of names among \['aim', .*, got \['abacus'\]"):
        build(tmp_path, trackers=["abacus"])
    with pytest.raises(ValueError, match="expected a list .* got 'tensorboard'"):
        build(tmp_path, trackers="tensorboard")
    assert not list(tmp_path.iterdir())
