"""sample_prompts: a file of prompts to a folder of images, by any number of processes, killed and resumed."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stitchvm_ext import TweedieValue, guided_sample, sample_prompts
from stitchvm_ext.rewards import RewardSum
from stitchvm_ext.sampling import Prompt, read_prompts
from tests.programs import run_program

run = functools.partial(run_program, Path(__file__).with_name("prompt_run.py"))
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 0, "progress": False}
TEXTS = [f"{number} {colour} circles" for number in ("two", "three") for colour in ["red", "blue", "green", "black"]]


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_text_and_json_files(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes("\ufeff a fox\r\n\n \t\nune forêt # 7\n".encode())
    assert read_prompts(text) == [Prompt("a fox"), Prompt("une forêt # 7")] == read_prompts(str(text))
    lines.write_text('{"prompt": "a fox", "seed": 3}\n\n{"prompt": "", "negative_prompt": "blur"}')
    assert read_prompts(lines) == [Prompt("a fox", seed=3), Prompt("", negative_prompt="blur")]
    assert read_prompts(["a", Prompt("b", seed=1)]) == [Prompt("a"), Prompt("b", seed=1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", b"\n \n", "expected at least one, got none in"),
        ("p.txt", b"\xff\xfe", "expected a text file in UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 of .*: expected a JSON object"),
        ("p.jsonl", b'{"text": "a"}', 'line 1 of .*: expected a JSON object with "prompt"'),
        ("p.jsonl", b'{"prompt": "a", "sed": 1}', "nothing but .*'seed'"),
        ("p.jsonl", b'{"prompt": ["a"]}', "line 1 of .*: prompt: expected a text"),
        ("p.jsonl", b'\n{"prompt": "a", "seed": -1}', "line 2 of .*: seed: expected 0 to"),
        ("p.jsonl", b'{"prompt": "a", "seed": "1"}', "seed: expected an integer, got str"),
        ("p.jsonl", b'{"prompt": "a", "negative_prompt": 1}', "negative_prompt: expected a text"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises((ValueError, TypeError), match=message):
        read_prompts(tmp_path / name)


def test_bad_lists():
    with pytest.raises(OSError, match="'a fox', which is no file"):
        read_prompts("a fox")
    with pytest.raises(ValueError, match="expected at least one"):
        read_prompts([])
    with pytest.raises(TypeError, match="number 1: prompt: expected a text, got 3"):
        read_prompts(["a", 3])
    with pytest.raises(TypeError, match="expected a file or a list of texts, got int"):
        read_prompts(3)


# -- one process -------------------------------------------------------------------------------------------------------


def test_images_and_rows_are_those_of_guided_sample(pipe, stitched, reward, tmp_path, seeds):
    prompts = [Prompt("a red circle", seed=40), "two blue squares", Prompt("a ring", negative_prompt="red")]
    options = {**OPTIONS, "method": "best_of_n", "num_particles": 2, "reward": reward}
    rows = sample_prompts(
        pipe, stitched, prompts, tmp_path / "out", images_per_prompt=2, images_per_batch=4, seed=5,
        negative_prompt="blue", **options,
    )  # fmt: skip
    assert rows == rows_of(tmp_path / "out")
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["seed"] for row in rows] == [40, 41, 7, 8, 9, 10]
    texts = ["a red circle"] * 2 + ["two blue squares"] * 2 + ["a ring"] * 2
    assert [row["prompt"] for row in rows] == texts
    negatives = ["blue"] * 4 + ["red"] * 2
    for first, end in ((0, 4), (4, 6)):
        expected = guided_sample(
            pipe, stitched, texts[first:end], negative_prompt=negatives[first:end],
            generator=seeds(*[row["seed"] for row in rows[first:end]]), **options,
        )  # fmt: skip
        for row, image, found in zip(rows[first:end], expected.images, expected.rewards.tolist(), strict=True):
            assert row["files"] == [f"{row['index']:05d}.png"]
            with Image.open(tmp_path / "out" / row["files"][0]) as written:
                assert np.array_equal(np.asarray(written), np.asarray(image))
            assert row["rewards"] == found and row["values"] == [None, None]
            assert row["evaluations"]["denoiser"] == expected.evaluations.denoiser / (end - first)


def test_finished_runs_draw_nothing_again(pipe, stitched, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rows = sample_prompts(pipe, stitched, TEXTS[:3], out, images_per_batch=2, **OPTIONS)
    before = digests(out)
    assert set(before) == {"settings.json", "samples.jsonl", *(f"{k:05d}.png" for k in range(3))}
    module, drawn = sys.modules["stitchvm_ext.sampling.sample_prompts"], []
    original = module.draw
    monkeypatch.setattr(
        module, "draw", lambda p, v, b, **o: drawn.append([s.index for s in b]) or original(p, v, b, **o)
    )
    assert sample_prompts(pipe, stitched, TEXTS[:3], out, images_per_batch=2, **OPTIONS) == rows
    assert not drawn and digests(out) == before
    (out / "00001.png").unlink()  # a lost image is drawn again, with its batch
    assert sample_prompts(pipe, stitched, TEXTS[:3], out, images_per_batch=2, **OPTIONS) == rows
    assert drawn == [[0, 1]] and digests(out) == before


def test_folders_of_other_settings_are_refused(pipe, stitched, reward, tmp_path):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")

    def run(value=stitched, texts=prompts, **changes):
        return sample_prompts(pipe, value, texts, out, **{**OPTIONS, "strength": 0.3, **changes})

    rows = run()
    before = digests(out)
    refused = [
        ({"num_inference_steps": 3}, "num_inference_steps: expected 2, got 3"),
        ({"strength": 0.4}, "options.strength: expected 0.3, got 0.4"),
        ({"seed": 1}, "seed: expected 0, got 1"),
        ({"images_per_batch": 3}, "images_per_batch: expected 8, got 3"),
        ({"images_per_prompt": 2}, "images_per_prompt: expected 1, got 2"),
        ({"texts": ["a", "c"]}, r"prompts\[1\].prompt: expected 'b', got 'c'"),
        ({"texts": ["a", "b", "c"]}, "number of prompts: expected 2, got 3"),
        ({"texts": ["a", Prompt("b", seed=1)]}, r"prompts\[1\].seed: expected None, got 1"),
        ({"value": None}, "value: expected .*StitchedValue.*, got None"),
        ({"value": TweedieValue(pipe, reward)}, "value.class: expected 'StitchedValue', got 'TweedieValue'"),
        ({"reward": reward}, "reward: expected None"),
        ({"schedule": lambda sigma: 1.0}, "options.schedule: expected 'constant', got '.*lambda"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=f"give another folder: {message}"):
            run(**changes)
    with torch.no_grad():
        next(stitched.stitch.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="value.weights: expected"):
        run()
    with torch.no_grad():
        next(stitched.stitch.parameters()).sub_(1e-3)
    weight = next(pipe.transformer.parameters())
    before_change = weight.clone()
    try:
        weight.data.add_(1e-3)
        with pytest.raises(ValueError, match="pipe.denoiser.weights: expected|value.weights"):
            run()
    finally:
        weight.data.copy_(before_change)  # the pipeline is every test's
    assert digests(out) == before and len(rows) == 2
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match="whose samples have no settings.json"):
        run()


def test_sums_are_told_apart_by_their_weights(pipe, reward, tmp_path):
    def run(weight):
        value = TweedieValue(pipe, RewardSum([(reward, weight)]))
        return sample_prompts(pipe, value, ["a"], tmp_path, strength=0.1, **OPTIONS)

    assert run(1.0) == run(1.0)
    with pytest.raises(ValueError, match=r"value.reward.weighted.weights\[0\]: expected 1.0, got 2.0"):
        run(2.0)


def test_settings_that_drew_nothing_bind_nobody(pipe, tmp_path):
    with pytest.raises(ValueError, match="value: expected an estimator"):
        sample_prompts(pipe, None, ["a"], tmp_path, method="svdd", **OPTIONS)
    assert len(sample_prompts(pipe, None, ["a"], tmp_path, **OPTIONS)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_prompt": 0}, "images_per_prompt: expected at least 1"),
        ({"images_per_batch": 1.5}, "images_per_batch: expected an integer"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 2**63 - 1}, "seed: expected 0 to"),
        ({"negative_prompt": ["a"]}, "negative_prompt: expected a text, got list"),
        ({"method": "fq"}, "method: expected one of"),
        ({"num_particles": 2}, "num_particles: expected one of the options of method 'dps'"),
        ({"generator": torch.Generator()}, "generator: expected none"),
        ({"output_type": "pt"}, "output_type: expected none"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_bad_input_leaves_no_folder(pipe, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample_prompts(pipe, None, ["a", "b"], tmp_path / "out", **{**OPTIONS, **changes})
    assert not (tmp_path / "out").exists()


# -- processes and kills -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(TEXTS * 2))
    return path


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """The folder of an uninterrupted run of one process: 32 images in batches of 3."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(prompts, out)
    assert len(rows_of(out)) == 32 and len(digests(out)) == 34
    return out


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(prompts, whole, tmp_path):
    run(prompts, tmp_path / "out", processes=2)
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.slow
def test_killed_runs_lose_and_repeat_nothing(prompts, whole, tmp_path):
    out = tmp_path / "out"
    run(prompts, out, "--kill-seed", 0)
    run(prompts, out)
    assert digests(out) == digests(whole)
    finished, kills = set(), 0
    for line in Path(f"{out}.log").read_text().splitlines():
        event, *indices = line.split()
        if event == "killed":
            assert finished <= set(indices)  # nothing that was finished is lost
            finished, kills = set(indices), kills + 1
        else:
            assert not set(indices) <= finished  # nor drawn again
    assert kills == 11 and len(finished) == 32


@pytest.mark.slow
def test_one_process_finishes_what_two_began(prompts, whole, tmp_path):
    out = tmp_path / "out"
    run(prompts, out, "--stop-after", 2, processes=2, killed=True)
    assert {"samples.0.jsonl", "samples.1.jsonl"} < set(digests(out)) and not (out / "samples.jsonl").exists()
    with open(out / "samples.1.jsonl", "a") as file:
        file.write('{"index": 31, "files": ["0')
    begun = Path(f"{out}.log").read_text().splitlines()
    run(prompts, out)
    assert digests(out) == digests(whole)
    lines = Path(f"{out}.log").read_text().splitlines()
    assert 2 <= len(begun) <= 4 and len(lines) == 11 + sum(lines.count(line) - 1 for line in set(lines))
