"""The `stitchvm` command: from a folder of pictures to a value model, its accuracy and guided samples."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from PIL import Image

from stitchvm_ext import StitchedValue, __version__, cli
from stitchvm_ext.ops import _info
from stitchvm_ext.playground import load_pipeline
from tests.evaluation import data
from tests.tiny import rewards, tiny_pipeline


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["stitchvm", *map(str, arguments)])
    cli.main()


def error_of(monkeypatch, *arguments: object) -> str:
    """What the command ends with: one line, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("stitchvm: ")
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    data.write_pictures(folder, data.pictures(16), [f"{k:02d}.png" for k in range(16)])
    return folder


MODELS = ("--backbone", "playground", "--reward", "playground")


@pytest.fixture(scope="module")
def value(photos, tmp_path_factory):
    """A value model that `stitchvm train` wrote, after two steps."""
    folder = tmp_path_factory.mktemp("value") / "value"
    with pytest.MonkeyPatch.context() as patch:
        run(
            patch, "train", *MODELS, "--images", photos, "--out", folder, "--probe-images", 8, "--depth", 1, "--layer",
            1, "--config.epochs", 1, "--config.batch-size", 4, "--config.learning-rate", 1e-4, "--backbone-licence",
            "Some Licence",
        )  # fmt: skip
    return folder


def test_info_prints_versions_and_backends(monkeypatch, capsys):
    run(monkeypatch, "info")
    printed = capsys.readouterr().out
    assert __version__ in printed and all(op in printed for op in _info.OPS)


@pytest.mark.parametrize(
    ("command", "least"), [("search", 14), ("train", 20), ("eval", 17), ("sample", 40), ("compare", 20)]
)
def test_help_explains_every_option(monkeypatch, capsys, command, least):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command, "--help")
    assert stop.value.code == 0
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
    helps = re.split(r"\n--(?=[a-z])", "\n".join(lines))[1:]
    assert len(helps) >= least
    for text in helps:  # words beside the option's name, its metavar and its default
        words = text.split("(default")[0].split("(required")[0].split()[1:]
        assert sum(word.strip(",.;").isalpha() and word == word.lower() for word in words) >= 1, text


def test_search(monkeypatch, capsys, photos, tmp_path):
    tiny_pipeline(t5=True).save_pretrained(tmp_path / "backbone")
    rewards.write_open_clip(tmp_path / "clip")
    run(
        monkeypatch, "search", "--backbone", tmp_path / "backbone", "--reward", "clip", "--reward-path",
        tmp_path / "clip", "--images", photos, "--probe-images", 12, "--max-sequence-length", 16, "--device", "cpu",
        "--out", tmp_path / "out",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert {(c["depth"], c["layer"]) for c in found["cells"]} == {(i, j) for i in range(5) for j in (1, 2, 3)}
    assert "i \\ j" in capsys.readouterr().out and (tmp_path / "out" / "search.png").is_file()


def test_train_writes_a_value_model_with_its_card(value):
    loaded = StitchedValue.from_pretrained(value, load_pipeline())
    assert (loaded.depth, loaded.layer, loaded.details["training steps"]) == (1, 1, 2)
    assert loaded.details["training settings"]["learning_rate"] == 1e-4
    card = (value / "README.md").read_text()
    assert "- backbone: Some Licence" in card and "- reward: Apache-2.0" in card
    assert "| learning_rate | 0.0001 |" in card
    cells = {(c["depth"], c["layer"]): c for c in loaded.details["closed-form search"]["cells"]}
    assert f"| 1 | {cells[1, 1]['mse']:.4f} ({cells[1, 1]['unexplained']:.3f}) |" in card
    assert (value.parent / "value.work" / "search.json").is_file()


@pytest.mark.parametrize("format", ["coco", "hpdv2"])
def test_eval_and_its_card(monkeypatch, capsys, value, tmp_path, format):
    write = {"coco": data.write_coco, "hpdv2": data.write_hpdv2}[format]
    name, metric = {"coco": ("MSCOCO captions", "R@1"), "hpdv2": ("HPDv2", "preference accuracy")}[format]
    annotations, images = write(tmp_path)
    weights = (value / "model.safetensors").read_bytes()
    run(
        monkeypatch, "eval", *MODELS, "--value", value, "--format", format, "--annotations", annotations, "--images",
        images, "--sigmas", 0.1, 0.5, "--limit", 6, "--tweedie", "--write-card", "--out", tmp_path / "out",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert metric in printed and "Tweedie" in printed and "clean reward" in printed
    report = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert set(report["curves"]) == {"value", "Tweedie"} and report["images"] == 6
    assert (value / "model.safetensors").read_bytes() == weights
    entry = StitchedValue.from_pretrained(value, load_pipeline()).details["accuracy by noise level"][name]
    assert entry["rows"] == report["curves"]["value"] and entry["clean"] == report["clean"]
    card = (value / "README.md").read_text()
    assert f"| noise level | {metric} | Spearman with the clean reward |" in card
    assert f"| 0.5 | {entry['rows'][1][metric]:.3f} |" in card


def test_eval_of_prompt_free_data(monkeypatch, tmp_path, value):
    annotations, images = data.write_ava(tmp_path)
    where = ("--format", "ava", "--annotations", annotations, "--images", images)
    assert "scores for prompts, and AVA has none" in error_of(monkeypatch, "eval", *MODELS, "--value", value, *where)
    message = error_of(monkeypatch, "eval", "--backbone", "playground", "--value", value, "--tweedie", *where)
    assert "tweedie: expected a reward" in message
    message = error_of(monkeypatch, "eval", "--backbone", "playground", "--value", "a/b", "--write-card", *where)
    assert "write_card: expected folders, got a/b" in message


SAMPLE = ("sample", "--backbone", "playground", "--steps", 3, "--guidance-scale", 3, "--seed", 5)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_sample(monkeypatch, value, tmp_path):
    prompts = ("--prompt", "a red circle", "two blue squares")
    run(
        monkeypatch, *SAMPLE, *prompts, "--value", value, "--dps.strength", 0.5, "--dps.schedule", "alpha",
        "--dps.window", 1, "None", "--images-per-prompt", 2, "--out", tmp_path / "guided",
    )  # fmt: skip
    run(monkeypatch, *SAMPLE, *prompts, "--out", tmp_path / "plain")
    guided, plain = (rows_of(tmp_path / n) for n in ("guided", "plain"))
    assert [row["prompt"] for row in guided] == ["a red circle"] * 2 + ["two blue squares"] * 2
    assert [row["seed"] for row in guided] == [5, 6, 7, 8]
    assert json.loads((tmp_path / "guided" / "settings.json").read_text())["options"] == {
        "strength": 0.5, "mode": "relative", "schedule": "alpha", "window": [1, None], "every": 1, "between": "none",
    }  # fmt: skip
    for row in guided:
        assert row["values"][0] is None and all(isinstance(v, float) for v in row["values"][1:])
    assert plain[0]["values"] == [None] * 3
    pictures = [Image.open(tmp_path / n / "00000.png") for n in ("guided", "plain")]
    assert pictures[0].size == (64, 64) and pictures[0].tobytes() != pictures[1].tobytes()

    from stitchvm_ext import guided_sample

    pipe = load_pipeline()
    result = guided_sample(
        pipe, StitchedValue.from_pretrained(value, pipe), "two blue squares", num_inference_steps=3, guidance_scale=3,
        strength=0.5, schedule="alpha", window=(1, None), generator=torch.Generator().manual_seed(7), progress=False,
    )  # fmt: skip
    assert result.values[1:, 0].tolist() == pytest.approx(guided[2]["values"][1:], abs=1e-4)


def test_sample_a_prompt_file_by_every_method(monkeypatch, value, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "seed": 40}\n{"prompt": "two blue squares"}\n')
    methods = {
        "fk": ("--fk.num-particles", 2, "--fk.num-proposals", 2, "--fk.proposal-window", 0.0, 0.5),
        "dps+fk": ("--fk.num-particles", 2, "--dps.strength", 0.1),
        "best_of_n": ("--best-of-n.num-particles", 3, "--best-of-n.keep", 1, 2),
        "svdd": ("--svdd.num-proposals", 2),
        "search": ("--search.proposals-per-step", 2),
    }
    for method, options in methods.items():
        out = tmp_path / method
        run(
            monkeypatch, *SAMPLE, "--prompts", prompts, "--value", value, "--method", method, *options, "--reward",
            "playground", "--out", out,
        )  # fmt: skip
        rows, settings = rows_of(out), json.loads((out / "settings.json").read_text())
        assert [row["seed"] for row in rows] == [40, 6] and settings["method"] == method
        assert all(isinstance(r, float) for row in rows for r in row["rewards"])
        assert settings["reward"]["class"] == "OpenClipReward"
        name = options[0].split(".")[1].replace("-", "_")
        assert settings["options"][name] == options[1]
    assert len(rows_of(tmp_path / "fk")[0]["rewards"]) == 2
    assert settings["sigmas"][0] == 1 and len(settings["sigmas"]) == 4


def test_compare(monkeypatch, capsys, value, tmp_path):
    methods = ("unguided", "dps:strength=0.2", "fk@tweedie:num_particles=2", "best_of_n:num_particles=2")
    arguments = (
        "compare", *MODELS, "--value", value, "--prompt", "a red circle", "two blue squares", "--methods", *methods,
        "--steps", 2, "--images-per-prompt", 2, "--prompts-per-batch", 1, "--held-out", "playground", "--device", "cpu",
        "--out", tmp_path / "out",
    )  # fmt: skip
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(found["contenders"]) == list(methods) and all(name in printed for name in methods)
    for row in found["contenders"].values():
        assert row["means"]["held-out playground"] == row["means"]["reward"] and 0 <= row["means"]["objects"] <= 1
    assert {"compare.png", "grid.png"} < {f.name for f in (tmp_path / "out").iterdir()}
    message = error_of(monkeypatch, *arguments, "--seed", 1)
    assert "has batches of another comparison" in message and "seed: expected 0, got 1" in message


def test_sample_refuses_what_does_not_fit(monkeypatch, tmp_path):
    common, out = (*SAMPLE, "--out", tmp_path / "out"), tmp_path / "out"
    one = "expected either --prompt TEXT ... or --prompts FILE"
    assert one in error_of(monkeypatch, *common)
    assert one in error_of(monkeypatch, *common, "--prompt", "a", "--prompts", tmp_path / "p.txt")
    assert "which is no file" in error_of(monkeypatch, *common, "--prompts", tmp_path / "p.txt")
    message = error_of(monkeypatch, *common, "--prompt", "a", "--method", "svdd", "--fk.num-particles", 2)
    assert "fk: expected no options of it with --method svdd" in message
    assert not out.exists()
    run(monkeypatch, *common, "--prompt", "a")
    message = error_of(monkeypatch, *common, "--prompt", "b")
    assert "give another folder: prompts[0].prompt: expected 'a', got 'b'" in message


def test_user_errors_are_one_line(monkeypatch, photos, tmp_path):
    message = error_of(monkeypatch, "demo", "--prompts", "0", "--out", tmp_path / "out")
    assert message == "stitchvm: prompts: expected at least 1, got 0"
    common = ("--images", photos, "--reward", "playground")
    message = error_of(monkeypatch, "search", *common, "--backbone", tmp_path, "--probe-images", 8)
    assert "cannot be loaded as a diffusers pipeline" in message
    message = error_of(monkeypatch, "search", *common, "--backbone", "playground")
    assert "probe_images: expected 8 to 16" in message
    message = error_of(
        monkeypatch, "search", "--reward", "playground", "--backbone", "playground", "--images", tmp_path
    )
    assert "expected image files" in message
    message = error_of(
        monkeypatch, "search", *common, "--backbone", "playground", "--probe-images", 8, "--reward-options", "x"
    )
    assert "expected NAME=VALUE, got 'x'" in message
    message = error_of(
        monkeypatch, "search", *common, "--backbone", "playground", "--probe-images", 8, "--reward-options", "x=1"
    )
    assert "options of 'playground'" in message
    message = error_of(monkeypatch, "sample", "--backbone", "playground", "--prompt", "a", "--device", "abacus")
    assert "device: expected such as cuda" in message
    message = error_of(monkeypatch, "sample", "--backbone", "playground", "--prompt", "a", "--value", tmp_path)
    assert "expected a saved value model" in message


@pytest.mark.parametrize(
    "arguments",
    [("dmeo",), ("sample", "--backbone", "playground", "--prompt", "a", "--dps.strength", "-1"), ("train",)],
)
def test_bad_usage_is_refused(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code not in (0, None)
