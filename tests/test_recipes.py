"""The recipes in python/, as a user runs them, on small models in the real formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation import data
from tests.tiny import rewards, tiny_pipeline
from tests.tiny.flux import tiny_flux

ROOT = Path(__file__).parents[1]
RUN = "import open_clip, runpy, sys; [open_clip.add_model_config(f) for f in {configs}]; sys.argv = sys.argv[1:]; "
RUN += "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(recipe: str, folder: Path, pipeline, configs: list[str] | None = None, **options) -> Path:
    """The recipe on a folder of twelve pictures, through two training steps; returns where it wrote."""
    options = {
        "eval_limit": 6, "steps": 2, "prompt": "a red circle", "config.epochs": 1, "config.batch_size": 2, **options,
    }  # fmt: skip
    return start(recipe, folder, pipeline, configs, **options)


def start(recipe: str, folder: Path, pipeline, configs: list[str] | None = None, **options) -> Path:
    """The recipe with what all have in common: models and pictures."""
    pipeline.save_pretrained(folder / "backbone")
    data.write_pictures(folder / "photos", data.pictures(12), [f"{k}.png" for k in range(12)])
    options = {
        "images": folder / "photos", "backbone": folder / "backbone", "out": folder / "out", "device": "cpu",
        "size": 32, "probe_images": 8, **options,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    program = RUN.format(configs=[str(c) for c in configs or []])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "python" / recipe), *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def check(out: Path, data_name: str, metric: str) -> None:
    assert sorted(p.name for p in (out / "value").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    details = json.loads((out / "value" / "config.json").read_text())["details"]
    assert details["training steps"] == 2 and details["training settings"]["batch_size"] == 2
    rows = details["accuracy by noise level"][data_name]["rows"]
    assert [row["sigma"] for row in rows] == [0.1, 0.25, 0.5, 0.75, 0.9] and all(metric in row for row in rows)
    card = (out / "value" / "README.md").read_text()
    assert "## Accuracy by noise level" in card and "## Closed-form search" in card and "## Training settings" in card
    assert (out / "plain.png").read_bytes() != (out / "guided.png").read_bytes()
    assert (out / "accuracy.png").is_file()


@pytest.mark.slow
def test_sd35_medium_clip(tmp_path):
    rewards.write_open_clip(tmp_path / "clip")
    annotations, images = data.write_coco(tmp_path, 8)
    out = run(
        "sd35_medium_clip.py",
        tmp_path,
        tiny_pipeline(t5=True),
        reward=tmp_path / "clip",
        annotations=annotations,
        eval_images=images,
    )
    check(out, "MSCOCO captions", "R@1")


@pytest.mark.slow
def test_sd35_medium_hpsv2(tmp_path):
    rewards.write_hpsv2(tmp_path / "hps")
    annotations, images = data.write_hpdv2(tmp_path)
    out = run(
        "sd35_medium_hpsv2.py", tmp_path, tiny_pipeline(t5=True), [tmp_path / "hps" / "tiny-hps.json"],
        reward=tmp_path / "hps" / "HPS_v2.1_compressed.pt", reward_model="tiny-hps", annotations=annotations,
        eval_images=images,
    )  # fmt: skip
    check(out, "HPDv2", "preference accuracy")


@pytest.mark.slow
def test_flux_aesthetic(tmp_path):
    rewards.tiny_aesthetic(tmp_path / "reward")
    annotations, images = data.write_ava(tmp_path)
    out = run(
        "flux_aesthetic.py", tmp_path, tiny_flux(), reward=tmp_path / "reward" / "clip",
        head=tmp_path / "reward" / "sac+logos+ava1-l14-linearMSE.pth", annotations=annotations, eval_images=images,
    )  # fmt: skip
    check(out, "AVA", "Spearman with people's ratings")


@pytest.mark.slow
def test_sd35_medium_nft(tmp_path):
    align("nft", tmp_path, **{"config.prompts_per_iteration": 2, "config.group_size": 2})


@pytest.mark.slow
def test_sd35_medium_draft(tmp_path):
    align("draft", tmp_path, **{"config.prompts_per_iteration": 2})


def align(method: str, folder: Path, **options) -> None:
    rewards.tiny_dfn_clip(folder / "dfn")
    rewards.write_hpsv2(folder / "hps")
    rewards.write_pickscore(folder / "pickscore")
    (folder / "prompts.txt").write_text("\n".join(["a red circle", "two blue squares", "a ring", "a green ring"]))
    options |= {
        "hps": folder / "hps" / "HPS_v2.1_compressed.pt", "hps_model": "tiny-hps", "dfn": folder / "dfn",
        "held_out": folder / "pickscore", "prompts": folder / "prompts.txt", "eval_prompts": 2, "stitching.epochs": 1,
        "stitching.batch_size": 2, "config.iterations": 1, "config.eval_steps": 2, "config.mixed_precision": "no",
    }  # fmt: skip
    configs = [folder / "hps" / "tiny-hps.json"]
    out = start(f"sd35_medium_{method}.py", folder, tiny_pipeline(t5=True), configs, **options)
    rows = [json.loads(line) for line in (out / method / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out/dfn-clip", "held_out/hpsv2", "held_out/pickscore", "reward/mean"} <= set(rows[-1])
    assert (out / method / "pytorch_lora_weights.safetensors").is_file() and (out / "hpsv2" / "README.md").is_file()
