"""`stitchvm align` on the embedded model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from stitchvm_ext.playground import load_pipeline
from stitchvm_ext.training import NFTConfig, NFTTrainer
from tests.test_cli import error_of, run

PROMPTS = ["a red circle", "two blue squares", "a ring", "a small green ring", "three red rings", "a blue circle"]
COMMON = ("--backbone", "playground", "--held-out", "playground", "playground-aesthetic")
SMALL = {
    "iterations": 2, "num-inference-steps": 4, "eval-steps": 2, "eval-every": 1, "lora-rank": 2, "lora-alpha": 4,
    "prompts-per-iteration": 2,
}  # fmt: skip
METHODS = {"nft": {**SMALL, "group-size": 2}, "draft": SMALL, "dpo": {**SMALL, "group-size": 2}}


def settings(method: str, **others) -> list[str]:
    chosen = METHODS[method] | {name.replace("_", "-"): setting for name, setting in others.items()}
    words = [(f"--{method}.{name}", *(s if isinstance(s, tuple) else (s,))) for name, s in chosen.items()]
    return ["--method", method, *map(str, sum(words, ()))]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.mark.parametrize(("method", "stitched"), [("nft", True), ("draft", True), ("dpo", False)])
def test_align(monkeypatch, capsys, tmp_path, prompts, method, stitched):
    out = tmp_path / "run"
    window = {"stop_window": (2, 3)} if stitched else {}
    score = ("--value", "playground") if stitched else ("--reward", "playground")
    command = ("align", *COMMON, "--prompts", prompts, *score, "--out", out, *settings(method, **window))
    run(monkeypatch, *command)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert {"held_out/playground", "held_out/playground-aesthetic"} <= set(rows[-1])
    assert (out / "curves.png").is_file() and len(list((out / "samples").iterdir())) == 3
    assert any(tensor.abs().sum() > 0 for name, tensor in load_file(_lora(out)).items() if "lora_B" in name)
    load_pipeline().load_lora_weights(out)
    printed = capsys.readouterr().out
    assert "held_out/playground " in printed and "reward/mean" in printed
    run(monkeypatch, *command)  # is done, and knows it
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_preset_gives_what_the_command_line_does_not(monkeypatch, tmp_path, prompts, dtype):
    """A batch of 16 is the setting's own default and not the preset's: given, it comes before the preset's."""
    built = []
    monkeypatch.setattr(NFTTrainer, "train", lambda trainer: built.append(trainer) or [])
    size = {"height": 64, "width": 64, "mixed_precision": "no", "rollout_batch_size": 16}
    command = ("align", *COMMON, "--value", "playground", "--dtype", dtype, "--prompts", prompts)
    run(
        monkeypatch, *command, "--out", tmp_path / "run", *settings("nft", stop_window=(2, 3), **size), "--preset",
        "12gb",
    )  # fmt: skip
    config, preset = built[0].config, NFTConfig.for_12_gb()
    assert (config.rollout_batch_size, config.train_batch_size) == (16, preset.train_batch_size) != (16, 8)
    assert config.gradient_checkpointing and config.offload_text_encoders and config.mixed_precision == "no"
    assert (config.height, config.width, config.lora_rank) == (64, 64, 2)
    assert {str(reward.dtype) for reward in built[0].held_out.values()} == {f"torch.{dtype}"}
    assert {str(p.dtype) for p in built[0].value.stitch.parameters()} == {"torch.float32"}  # the embedded one's


def test_a_preset_is_one_of_the_known_ones(monkeypatch, capsys, tmp_path, prompts):
    command = ("align", *COMMON, "--reward", "playground", "--prompts", prompts, "--out", tmp_path / "run")
    for words in (("--preset", "8gb"), ("--preset=8gb",)):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *command, *settings("nft"), *words)
        assert stop.value.code not in (0, None)
        printed = "".join(capsys.readouterr())
        assert "--preset" in printed and "12gb" in printed
    other = settings("nft") + ["--preset", "12gb", "--draft.rollout-batch-size", "16"]
    assert "draft: expected no settings of it with --method nft" in error_of(monkeypatch, *command, *other)


def _lora(out):
    return out / "pytorch_lora_weights.safetensors"


def test_help_explains_every_setting(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "align", "--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and all(
        option in printed for option in ("--nft.stop-window", "--draft.last-steps", "--dpo.dpo-beta", "--held-out")
    )


def test_user_errors_are_one_line(monkeypatch, tmp_path, prompts):
    common = ("align", *COMMON, "--out", tmp_path / "run", "--prompts")
    nft = settings("nft")
    message = error_of(monkeypatch, *common, prompts, *nft)
    assert "value: expected either --value FOLDER ... or --reward KIND" in message
    message = error_of(monkeypatch, *common, tmp_path / "none.txt", "--reward", "playground", *nft)
    assert "prompts: expected a text file" in message
    one = tmp_path / "one.txt"
    one.write_text("a ring\na ring\n")
    message = error_of(monkeypatch, *common, one, "--reward", "playground", *nft)
    assert "prompts: expected at least 2 different ones" in message
    message = error_of(monkeypatch, *common, prompts, "--reward", "playground", *settings("nft", stop_window=(2, 3)))
    assert "stop_window: expected None with a clean reward" in message
    message = error_of(monkeypatch, *common, prompts, "--reward", "playground", *nft, "--trackers", "abacus")
    assert "trackers: expected a list of names among ['aim'" in message
    arguments = ("--backbone", "playground", "--out", tmp_path / "run", "--prompts", prompts, *nft)
    message = error_of(monkeypatch, "align", *arguments, "--reward", "playground", "--held-out", "abacus")
    assert "abacus" in message
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *common, prompts, "--reward", "playground", *settings("nft", group_size=1))
    assert stop.value.code not in (0, None)
