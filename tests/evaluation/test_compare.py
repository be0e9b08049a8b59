"""The same prompts and seeds through several methods."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from stitchvm_ext import guided_sample
from stitchvm_ext.cli.compare import parse_method
from stitchvm_ext.evaluation import Contender, compare
from stitchvm_ext.evaluation.compare_report import KINDS, Comparison
from tests import tiny

PROMPTS = ["a red circle", "two blue squares", "a small green ring"]
RUN = {"num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 0}


@pytest.fixture
def parts():
    pipe, reward = tiny.tiny_pipeline(), tiny.tiny_reward()
    best = {"method": "best_of_n", "reward": reward, "num_particles": 3}
    contenders = [Contender("unguided", None), Contender("best of 3", None, best)]
    return pipe, contenders, {"target": reward, "again": reward}


def run(parts, **options):
    pipe, contenders, rewards = parts
    settings = {"images_per_prompt": 2, "prompts_per_batch": 2, "seed": 5, "progress": False, **RUN, **options}
    return compare(pipe, contenders, PROMPTS, rewards, **settings)


def test_figures(parts, tmp_path):
    found = run(parts, measures=lambda images, prompts: {"brightness": images.mean((1, 2, 3))})
    pipe, _, rewards = parts
    plain = guided_sample(
        pipe, None, [p for p in PROMPTS for _ in range(2)], progress=False, output_type="pt",
        generator=[torch.Generator().manual_seed(5 + k) for k in range(6)], **RUN,
    ).images  # fmt: skip
    row = found.figures["unguided"]
    scores = rewards["target"](plain, [p for p in PROMPTS for _ in range(2)]).detach().view(3, 2).mean(1)
    assert row["means"]["target"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert row["standard_errors"]["target"] == pytest.approx((scores.std() / 3**0.5).item(), abs=1e-4)
    assert row["means"]["brightness"] == pytest.approx(plain.mean().item(), abs=1e-4)
    assert 0 < row["means"]["diversity"] < 2
    assert row["evaluations_per_image"] == {"denoiser": 4.0, "prefix": 0.0, "value": 0.0, "decoder": 1.0}
    best = found.figures["best of 3"]
    assert best["means"]["target"] > row["means"]["target"]
    assert best["evaluations_per_image"] == {"denoiser": 12.0, "prefix": 0.0, "value": 3.0, "decoder": 4.0}
    found.save(tmp_path)
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["contenders"]["unguided"]["means"] == row["means"] and document["target"] == "target"
    assert (tmp_path / "compare.png").stat().st_size > 1000 and (tmp_path / "grid.png").stat().st_size > 1000
    assert all(name in found.table() for name in ("unguided", "best of 3", "brightness", "diversity"))


def test_the_plot_has_every_figure_against_evaluations_and_against_seconds(tmp_path, monkeypatch):
    evaluations = dict.fromkeys(KINDS, 40.0)
    row = {"means": {"a": 0.5, "b": 0.6}, "standard_errors": {"a": 0.1, "b": None}, "peak_bytes": 0}
    figures = {
        name: {**row, "evaluations_per_image": evaluations, "seconds_per_image": seconds}
        for name, seconds in (("one", 0.2), ("other", 0.8))
    }
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.touch()))
    Comparison(["p"], 1, "a", figures, {}).plot(tmp_path / "compare.png")
    panels = {(ax.get_title(), ax.get_xlabel()): ax for ax in drawn[0].axes}
    labels = ("denoiser evaluations per image", "seconds per image")
    assert set(panels) == {(measure, label) for measure in ("a", "b") for label in labels}
    at = {label: [c.lines[0].get_xdata()[0] for c in panels["b", label].containers] for label in labels}
    assert at == {labels[0]: [40.0, 40.0], labels[1]: [0.2, 0.8]}


def test_an_interrupted_comparison_goes_on(parts, tmp_path):
    class Interrupted(Exception):
        pass

    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(parts, work_dir=tmp_path, on_batch=stop)
    resumed, whole = run(parts, work_dir=tmp_path), run(parts)
    for name in ("unguided", "best of 3"):
        assert resumed.figures[name]["means"] == whole.figures[name]["means"]
        assert torch.equal(resumed.images[name], whole.images[name])
    pipe, contenders, rewards = parts
    others = {
        "seed": {"seed": 6},
        "prompts_per_batch": {"prompts_per_batch": 1},
        r"contenders\[0\].num_inference_steps": {"num_inference_steps": 3},
        "number of measures": {"measures": lambda images, prompts: {}},
    }
    for name, options in others.items():
        with pytest.raises(ValueError, match=f"work_dir: .* another comparison.*{name.removeprefix('number of ')}"):
            run(parts, work_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=r"contenders\[0\].name: expected 'unguided', got 'best of 3'"):
        run((pipe, contenders[::-1], rewards), work_dir=tmp_path)
    with pytest.raises(ValueError, match="rewards"):
        run((pipe, contenders, {"target": tiny.tiny_reward(2), "again": rewards["again"]}), work_dir=tmp_path)


def test_seeds_and_negative_prompts_of_a_file(parts, tmp_path):
    pipe, contenders, rewards = parts
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "seed": 40, "negative_prompt": "two blue squares"}\n')
    found = compare(pipe, contenders[:1], file, rewards, progress=False, **RUN)
    plain = guided_sample(
        pipe, None, "a red circle", negative_prompt="two blue squares", progress=False, output_type="pt",
        generator=torch.Generator().manual_seed(40), **RUN,
    ).images  # fmt: skip
    assert torch.equal(found.images["unguided"], (plain * 255).round().byte())
    row = found.figures["unguided"]
    assert row["standard_errors"] == {"target": None, "again": None} and "diversity" not in row["means"]
    found.save(tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text())["contenders"]["unguided"]["means"] == row["means"]
    assert "±" not in found.table().splitlines()[1]


def test_bad_input(parts):
    pipe, contenders, rewards = parts
    with pytest.raises(ValueError, match="contenders"):
        compare(pipe, [contenders[0]] * 2, PROMPTS, rewards)
    with pytest.raises(ValueError, match="rewards"):
        compare(pipe, contenders, PROMPTS, {})
    for expected, options in {
        "prompts: expected at least one": {"prompts": []},
        "images_per_prompt": {"images_per_prompt": 0},
        "prompts_per_batch": {"prompts_per_batch": 0},
        "num_frames": {"num_frames": 5},
    }.items():
        with pytest.raises(ValueError, match=expected):
            compare(pipe, contenders, **{"prompts": PROMPTS, "rewards": rewards, **options})
    with pytest.raises(TypeError, match="strenght: expected one of the options"):
        compare(pipe, [contenders[0], Contender("guided", None, {"strenght": 1.0})], PROMPTS, rewards)


def test_methods_on_the_command_line():
    assert parse_method("unguided") == ("unguided", None, {"method": "dps"})
    name, estimator, options = parse_method("fk@tweedie:num_particles=4,resample_window=(0.1,0.9),potential=max")
    assert (name, estimator) == ("fk", "tweedie")
    assert options == {"method": "fk", "num_particles": 4, "resample_window": (0.1, 0.9), "potential": "max"}
    assert parse_method("dps:strength=0.3,transition=linear_sde")[2]["transition"] == "linear_sde"
    assert parse_method("best_of_n:num_particles=2")[1] is None
    assert parse_method("best_of_n:keep=((0.5,2),)")[1] == "stitched"
    assert parse_method("unguided:num_inference_steps=40")[2] == {"method": "dps", "num_inference_steps": 40}
    for text in ("unguided:strength=0.2", "unguided@tweedie"):
        with pytest.raises(ValueError, match="no estimator and no options"):
            parse_method(text)
    with pytest.raises(ValueError, match="method.*'beam'"):
        parse_method("beam")
    with pytest.raises(TypeError, match="strength"):
        parse_method("fk:strength=1")
    with pytest.raises(ValueError, match="after @.*'oracle'"):
        parse_method("fk@oracle")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_method("fk:4")
