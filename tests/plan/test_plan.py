"""The planner's door: what it returns, what it refuses, and the command."""

from __future__ import annotations

import json
import sys

import pytest

from stitchvm_ext import cli
from stitchvm_ext.plan import ARCHITECTURES, DEVICES, TOWERS, plan
from stitchvm_ext.plan.count import Cost, Kernel
from stitchvm_ext.plan.devices import Device, seconds
from stitchvm_ext.plan.fit import Savings, fits
from stitchvm_ext.plan.scenarios import Scenario

SMALL = {"backbone": "sd3.5-medium", "reward": "aesthetic", "resolution": 256}


@pytest.fixture(scope="module")
def small():
    return plan(**SMALL, steps=10)


def test_rows_are_consistent(small):
    assert small.parameters == 2_243_171_520
    for row in small.rows:
        assert row.peak == row.weights + row.activations
        assert 0 < row.seconds_per_step.low < row.seconds_per_step.high
        assert row.flops > 10 * row.flops_per_step  # and one decoding
    flops = {row.name: row.flops_per_step for row in small.rows}
    assert flops["plain"] < flops["stitched, prefix shared, save"] < flops["stitched, own prefix, save"]
    assert flops["stitched, own prefix, save"] < flops["Tweedie"] < flops["Tweedie, checkpointed"]


def test_table_and_json_say_the_same(small):
    document = json.loads(small.to_json())
    assert [row["name"] for row in document["rows"]] == [row.name for row in small.rows]
    table = small.table()
    assert all(row.name in table and f"{row.flops_per_step / 1e12:.2f}" in table for row in small.rows)
    assert "2.243 B" in table and "Predictions" in table


@pytest.mark.parametrize(
    "method", ["fk", pytest.param("nft", marks=pytest.mark.slow), pytest.param("draft", marks=pytest.mark.slow)]
)
def test_other_methods(method):
    predicted = plan(**SMALL, method=method, steps=10)
    published, *others = predicted.rows
    stitched = [row for row in others if row.group == "stitched"]
    assert stitched and {fit.group for fit in predicted.fits} == {row.group for row in predicted.rows}
    if method != "fk":
        assert min(row.flops for row in stitched) < published.flops


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_every_backbone(backbone):
    predicted = plan(backbone, ["hpsv2", "clip-l14-336"])
    plain, tweedie = predicted.rows[:2]
    shared = predicted.rows[-2]
    assert plain.flops_per_step < shared.flops_per_step < 0.6 * tweedie.flops_per_step
    assert shared.peak < tweedie.peak


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "sd9"}, "backbone: expected one of sd3.5-medium"),
        ({"reward": "taste"}, "reward: expected one of clip-l14-336"),
        ({"reward": []}, "reward: expected at least one"),
        ({"method": "magic"}, "method: expected one of dps"),
        ({"device": "abacus"}, "device: expected one of h200"),
        ({"resolution": 1000}, "resolution: expected a multiple of 16 up to 6144, got 1000"),
        ({"resolution": 8192}, "resolution: expected a multiple of 16 up to 6144, got 8192"),
        ({"depth": 24}, r"depth: expected 1\.\.23, got 24"),
        ({"layer": 0}, r"layer: expected 1\.\.24, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"method": "fk", "batch": 2}, r"batch: expected 1\.\.1, got 2"),
        ({"images": 0}, "images: expected at least 1, got 0"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(**{**SMALL, **wrong})


def test_time_is_bounded_by_what_limits_it():
    device = Device(tflops=100, float32=10, float64=1, bandwidth=1, memory=24)

    def of(*kernel):
        return seconds(Cost({Kernel(*kernel): 1}), device)

    assert of("product", False, 8e13, 10).low == pytest.approx(1)
    assert of("float64 product", False, 8e11, 10).low == pytest.approx(1)
    assert of("product", False, 1, 9e11).low == pytest.approx(1)
    assert of("other", False, 0, 9e11).low == 0  # fused away
    assert of("other", False, 0, 708e9).high == pytest.approx(1)
    assert of("other", False, 0, 8).high == pytest.approx(8e-6) and of("other", True, 0, 8).high == pytest.approx(6e-6)


def test_the_first_preset_that_fits():
    def way(name, weights, activations, flops):
        cost = Cost({Kernel("product", False, flops, 1): 1}, peak=int(activations * 1e9))
        return Scenario(name, "stitched", cost, 1, int(weights * 1e9), Cost())

    ways = [way("recompute", 14, 1, 2), way("save", 14, 9, 1)]
    found = {fit.card: fit for fit in fits(ways, Savings(text_encoders=int(11e9), released=int(4e9)))}
    assert found[12].preset == "recompute; text encoders offloaded, AdaLN released"
    assert found[16].preset == "recompute; text encoders offloaded"
    assert found[24].preset == "save; text encoders offloaded, AdaLN released" or found[24].bytes <= 24 * 2**30
    assert found[48].preset == "save" and found[80].preset == "save"
    assert fits(ways[1:], Savings(0, 0))[0].preset is None


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["stitchvm", "plan", *map(str, arguments)])
    cli.main()


def test_command(monkeypatch, capsys, tmp_path):
    options = ("--backbone", "sd3.5-medium", "--reward", "aesthetic", "--method", "fk", "--device", "rtx-4090")
    run(monkeypatch, *options, "--json", "--plot", tmp_path / "new" / "plan.png")
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["device"] == "rtx-4090" and document["rows"][0]["group"] == "plain"
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *options, "--depth", 40)
    assert stop.value.code == "stitchvm: depth: expected 1..23, got 40"


def test_names():
    assert {"sd3.5-medium", "sd3.5-large", "flux.1-dev", "hunyuanimage-2.1"} <= set(ARCHITECTURES)
    assert {"clip-l14-336", "dfn-h14-378", "hpsv2", "aesthetic"} == set(TOWERS)
    assert all(device.memory >= 12 for device in DEVICES.values())
