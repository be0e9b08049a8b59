"""benchmarks/payback.py and the report, which has its figures from result files alone."""

import importlib
import json
from pathlib import Path

import pytest

from stitchvm_ext.bench.pages import alignment_table, mean_of, payback, payback_table, seconds_until, short_range
from stitchvm_ext.plan.architectures import ARCHITECTURES
from stitchvm_ext.plan.devices import DEVICES, seconds
from stitchvm_ext.plan.pieces import Pieces
from stitchvm_ext.plan.scenarios import Scenarios
from stitchvm_ext.plan.stages import finetune

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"cpu": "a processor", "gpu": None, "threads": 1, "torch": "2", "commit": "abc"}

if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("payback")


def test_the_committed_report_is_what_its_command_writes(report):
    assert report.REPORT.read_text() == report.page(), "run: python benchmarks/report.py"


def test_sections_without_a_file_are_left_out(report, tmp_path):
    assert "##" not in report.page(tmp_path)


def write(folder: Path, name: str, result: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **result}))


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of a section's table rows, heads left out."""
    section = text.split(heading)[1].split("\n#")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    heads = [k - 1 for k, row in enumerate(rows) if row[0] == "---"]
    return [row for k, row in enumerate(rows) if k not in heads and row[0] != "---"]


# -- payback -----------------------------------------------------------------------------------------------------------


def test_each_stitched_setting_meets_the_fastest_tweedie_of_its_reward():
    methods = {
        "unguided": (0.5, 0.1),
        "stitched fast": (0.6, 0.2), "stitched beaten": (0.55, 0.3), "stitched best": (0.7, 0.4),
        "stitched weak": (0.45, 0.15), "Tweedie low": (0.58, 0.1), "Tweedie mid": (0.65, 0.3),
        "Tweedie slow": (0.66, 0.5), "Tweedie high": (0.7, 0.35),
    }  # fmt: skip
    figures = {name: {"reward": reward, "seconds_per_image": seconds} for name, (reward, seconds) in methods.items()}
    result = {"figures": figures, "seconds": {"search": 4.95, "finetuning": 20.0}}
    assert payback(result, "reward") == [
        {"stitched": "stitched fast", "tweedie": "Tweedie mid", "images": 250},  # 24.95 s over 0.1 s
        {"stitched": "stitched best", "tweedie": "Tweedie high", "images": None},
    ]
    figures["stitched best"]["reward"] = 0.8
    assert payback(result, "reward")[1] == {"stitched": "stitched best", "tweedie": None, "images": None}
    fast, best = payback_table(result, "reward")[2:]
    assert fast == "| stitched fast | 0.600 | 0.20 | Tweedie mid | 0.650 | 0.30 | 250 |"
    assert best == "| stitched best | 0.800 | 0.40 | none reaches it |  |  |  |"


@pytest.mark.slow
def test_payback_measures_both_stages_and_both_methods(program, report, tmp_path, capsys):
    result = program.measure(pictures=64, prompts=1, steps=[2, 3])
    capsys.readouterr()
    assert result["training_steps"] == 3 and result["layer"] == 1
    assert len(result["seconds"]) == 3 and all(seconds > 0 for seconds in result["seconds"].values())
    assert list(result["figures"])[0] == "unguided" and len(result["figures"]) == 1 + 2 * 2 * 2
    write(tmp_path, "payback", {"shared_machine": True, **result})
    text = report.page(tmp_path)
    assert "3 steps of 64 images" in text and "Other programs ran" in text
    assert f"Making the value took {sum(result['seconds'].values()):,.0f} s" in text


@pytest.mark.slow
def test_the_committed_predictions_are_the_planners(program):
    committed = json.loads((BENCHMARKS / "results" / "payback_planner.json").read_text())
    assert list(committed["backbones"]) == list(program.BACKBONES)
    dps = committed["backbones"]["sd3.5-medium"]["dps"]
    pieces, device = Pieces(ARCHITECTURES["sd3.5-medium"], (program.TOWER,), 1024, 4, 1), DEVICES[program.DEVICE]
    ways = Scenarios(pieces, 1)
    cost = ways.shared("save") * dps["steps"]
    stitched = seconds(cost, device) + seconds(pieces.rewards.decode(1), device)
    assert dps["stitched"] == pytest.approx(stitched, rel=0.01)
    for stage, way in zip(finetune(pieces, 10_000, 5), ("encoded anew", "cached"), strict=True):
        hours = seconds(stage.cost, device) * (1 / 3600)
        assert dps["finetune_hours"][way]["10000"] == pytest.approx(hours, rel=0.01)


def test_predicted_payback_is_hours_over_saved_seconds(report):
    methods = {
        "search_hours": [1.0, 2.0],
        "finetune_hours": {"cached": {"1000": [3.0, 8.0]}},
        "stitched": [2.0, 5.0],
    }
    # (1 + 3) h / 1 s, (2 + 8) h / 5 s
    assert report.pays(methods, [3.0, 10.0], 1000) == "7,200 to 14,000"
    assert report.pays(methods, [1.0, 10.0], 1000) == "never"
    assert short_range(0.00138, 23.4) == "0.0014 to 23"


# -- alignment ---------------------------------------------------------------------------------------------------------


def run(method: str, value: str, seed: int, *held_out: float, pace: float) -> dict:
    """A run whose iterations take ``pace`` seconds each."""
    curve = [
        {
            "iteration": k, "seconds": k * pace, "denoiser_evaluations": 100.0 * k, "decodings": 0,
            "target_reward": reward + 0.1, "held_out_reward": reward, "objects": 0.9, "colors": 0.9, "count": 0.9,
        }
        for k, reward in enumerate(held_out)
    ]  # fmt: skip
    return {"method": method, "value": value, "seed": seed, "curve": curve}


@pytest.fixture
def alignment():
    return {
        "settings": {},
        "eval_prompts": 16,
        "runs": [
            run("nft", "clean", 0, 0.5, 0.6, 0.7, pace=100),
            run("nft", "clean", 1, 0.5, 0.6, 0.8, pace=100),
            run("nft", "stitched", 0, 0.5, 0.7, 0.7, pace=40),
            run("nft", "stitched", 1, 0.5, 0.8, 0.7, pace=60),
            run("dpo", "clean", 0, 0.5, 0.55, 0.6, pace=10),
        ],
    }


def test_preference_optimisation(report, alignment, tmp_path):
    write(tmp_path, "alignment", alignment)
    text = report.page(tmp_path)
    flowing = " ".join(text.split())
    assert "mean over 2 seeds" in flowing and "held-out reward 0.500" in flowing
    assert rows_of(text, "## Against preference optimisation") == [
        ["nft, clean", "0.250 ± 0.050", "0.250 ± 0.050", "0.000 ± 0.000", "200", "200", "200"],
        ["nft, stitched", "0.200 ± 0.000", "0.200 ± 0.000", "0.000 ± 0.000", "100", "200", "50"],
        ["dpo, clean", "0.100", "0.100", "0.000", "20", "200", "not reached"],
        ["nft, stitched over nft, clean", "-0.050 ± 0.050", "-0.050 ± 0.050", "0.000 ± 0.000"],
    ]


def test_training_runs_until_stitching_pays(report, alignment, tmp_path):
    write(tmp_path, "alignment", alignment)
    assert "Training runs" not in report.page(tmp_path)
    stages = {"search": 3.0, "finetuning": 397.0}
    committed = json.loads((BENCHMARKS / "results" / "payback.json").read_text())
    write(tmp_path, "payback", {**committed, "seconds": stages})
    row = rows_of(report.page(tmp_path), "### Training runs")
    assert row == [["200", "50", "400", "after 3 runs"]]  # 400 s over 150 s
    for run_of in alignment["runs"]:
        if run_of["value"] == "stitched":
            run_of["curve"][1]["held_out_reward"] = 0.5
    write(tmp_path, "alignment", alignment)
    assert rows_of(report.page(tmp_path), "### Training runs") == [["200", "", "400", "never: not reached"]]


def test_without_clean_nft_nothing_is_reached(alignment):
    alignment["runs"] = alignment["runs"][2:4]
    assert alignment_table(alignment)[-1].endswith("| 200 |  |")
    curves = [one["curve"] for one in alignment["runs"]]
    assert seconds_until(curves, 0.75) == 50 and seconds_until(curves, 0.76) is None
    assert mean_of([1.0]) == "1.000" and mean_of([1.0, 3.0]) == "2.000 ± 1.000"


# -- a guided step -----------------------------------------------------------------------------------------------------


def test_guided_step_against_its_goals(report, tmp_path):
    timed = {"p20_ms": 900, "p80_ms": 1100, "rounds": 2, "flops": 2e12, "share_of_limit": 0.5}
    memory = {"peak_bytes": 3 * 2**20, "kept_bytes": 2**20}
    result = {
        "setup": {"scale": "real", "image_tokens": 784},
        "variants": {
            "plain": {"median_ms": 1000, **timed, **memory}, "stitched": {"median_ms": 1250, **timed, **memory},
            "matrix product": {"median_ms": 10, **timed},
        },
        "targets": {"faster_than_tweedie": 2.8, "time_over_plain": 1.35, "peak_over_tweedie": 0.4},
        "stitched": {
            "stitched": {
                "faster_than_tweedie": 2.9, "time_over_plain": 1.25, "peak_over_tweedie": 0.41,
                "flops_over_plain": 1.2,
            },
        },
    }  # fmt: skip
    write(tmp_path, "guided_step_real", result)
    text = report.page(tmp_path)
    assert "scale real, image tokens 784." in text
    assert rows_of(text, "## A guided step") == [
        ["plain", "1", "0.9-1.1", "1.00", "2", "0.50", "3", "1"],
        ["stitched", "1.25", "0.9-1.1", "1.25", "2", "0.50", "3", "1"],
        ["matrix product", "0.01", "0.9-1.1", "0.01", "2", "0.50", "", ""],
        ["stitched", "2.90, met", "1.25, met", "0.41, missed", "1.20"],
    ]
