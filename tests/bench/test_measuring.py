import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stitchvm_ext.bench import guided_step, scales
from stitchvm_ext.bench.counting import FlopCount, KeptBytes, counted
from stitchvm_ext.bench.harness import alternate
from stitchvm_ext.bench.profiling import PHASES, profile_one
from stitchvm_ext.bench.suite import PROBE
from stitchvm_ext.cli.bench import bench
from stitchvm_ext.measure import phase


def test_flops_are_those_of_torch():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
    x = torch.randn(2, 3, 8, 8)

    def call():
        layers(x).sum().backward()

    torchs = FlopCounterMode(display=False)
    with torchs:
        call()
    with FlopCount() as ours:
        call()
    assert ours.flops == torchs.get_total_flops() > 0


def test_flops_of_attention_under_no_grad():
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    with FlopCount() as differentiated:
        attention(x, x, x, need_weights=False)
    with FlopCount() as frozen, torch.no_grad():  # one operator for all of it
        attention(x, x, x, need_weights=False)
    assert frozen.flops == differentiated.flops > 0


def test_kept_bytes_leave_with_the_backward():
    weight = torch.randn(64, 64)
    x = torch.randn(8, 64, requires_grad=True)
    kept = KeptBytes([weight])
    with kept.counting():
        y = (x @ weight).exp()  # keeps its result
        z = y.sin() + y.cos()  # both keep y: the same storage
        assert kept.bytes == y.nbytes
        z.sum().backward()
    assert kept.bytes == 0 and kept.peak == y.nbytes


def test_peak_is_of_all_that_is_alive():
    size = 64 * 2**20
    result = counted(lambda: torch.ones(size // 4).clone().sum(), [])
    assert 1.9 * size < result.peak_bytes < 2.5 * size and result.flops == 0


def test_calls_take_turns():
    order, seen = [], []
    times = alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, rounds=3, warmup=1,
        on_round=lambda times: seen.append({name: len(t) for name, t in times.items()}),
    )  # fmt: skip
    assert order == ["a", "b"] * 4 and seen == [{"a": n, "b": n} for n in (1, 2, 3)]
    assert times["a"]["rounds"] == 3


def test_random_module_without_initialisation():
    module = scales.random_module(
        lambda: nn.Sequential(nn.Linear(400, 2000), nn.LayerNorm(2000)), torch.bfloat16, "cpu"
    )
    weight = module[0].weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert weight.float().std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert len(weight.unique(dim=0)) == len(weight)
    assert bool((module[1].weight == 1).all()) and bool((module[1].bias == 0).all())


def test_phases_of_a_step():
    setup = scales.build("playground")
    calls = guided_step.calls(setup)
    found = {}
    for name in ("plain", "Tweedie-DPS", "stitched, own prefix", "stitched, shared, fused"):
        row, _ = profile_one(calls[name])
        assert all(ms > 0 for ms in row.values()), name
        assert sum(row[p] for p in PHASES if p in row) + row["other"] == pytest.approx(row["total"])
        found[name] = {p for p in PHASES if p in row}
    assert found["plain"] == {"denoiser"}
    assert found["Tweedie-DPS"] == {"denoiser", "decode", "reward", "backward"}
    assert found["stitched, own prefix"] == {"denoiser", "prefix", "stitch", "suffix", "backward"}
    shared = {"prefix", "rest of denoiser", "denoiser", "stitch", "suffix", "backward"}
    assert found["stitched, shared, fused"] == shared


def test_profile_writes_traces(tmp_path):
    bench("value-gradient", out=tmp_path, device="cpu", profile=True)
    rows = json.loads((tmp_path / "value_gradient_playground_phases.json").read_text())["phases"]
    traces = sorted(tmp_path.glob("*.trace.json"))
    assert len(traces) == len(rows) == 4
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert {"prefix", "stitch", "suffix", "backward"} <= names


@pytest.mark.parametrize(("question", "file"), [("value-gradient", "value_gradient"), ("proposal", "proposals")])
def test_values_alone(tmp_path, question, file):
    bench(question, out=tmp_path, device="cpu", rounds=2)
    rows = json.loads((tmp_path / f"{file}_playground.json").read_text())["variants"]
    assert rows["stitched"]["flops"] < rows["Tweedie"]["flops"]
    assert rows["stitched, fused"]["flops"] <= rows["stitched"]["flops"]
    keeps = question == "value-gradient"
    assert all((row["kept_bytes"] > 0) == keeps for name, row in rows.items() if name != PROBE)


def test_no_ranges_without_a_profiler(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", None)  # would fail if it were called
    with phase("prefix"):
        pass
