import json

import pytest

from stitchvm_ext.bench import draft, nft, search, stage2
from stitchvm_ext.bench.suite import PROBE
from stitchvm_ext.cli.bench import bench


def result(folder, name):
    return json.loads((folder / f"{name}_playground.json").read_text())


def test_stage2_with_and_without_caches(tmp_path, monkeypatch):
    monkeypatch.setitem(stage2.BATCH, "playground", 8)
    bench("stage2", out=tmp_path, device="cpu", rounds=2)
    found = result(tmp_path, "stage2")
    flops = {name: row["flops"] for name, row in found["variants"].items()}
    assert flops[stage2.UNCACHED] == flops[stage2.FILL] + flops[stage2.CACHED]
    rates, rows = found["images_per_second"], found["variants"]
    assert rates[stage2.CACHED] == pytest.approx(8000 / rows[stage2.CACHED]["median_ms"])
    assert found["setup"]["batch"] == 8


def test_nft_iterations(tmp_path, monkeypatch):
    monkeypatch.setattr(nft, "STEPS", 4)
    monkeypatch.setattr(nft, "STOP", (2, 2))
    bench("nft", out=tmp_path, device="cpu", rounds=2)
    rows = result(tmp_path, "nft")["variants"]
    assert 0 < rows[nft.STITCHED]["flops"] < rows[nft.CLEAN]["flops"]


def test_draft_iterations(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draft, "SAMPLES", 2)
    monkeypatch.setattr(draft, "STEPS", 6)
    monkeypatch.setattr(draft, "STOP", (3, 3))
    bench("draft", out=tmp_path, device="cpu", rounds=2)
    rows = result(tmp_path, "draft")["variants"]
    assert list(rows) == [*draft.CLEAN.values(), draft.STITCHED, PROBE]
    assert 0 < rows[draft.STITCHED]["flops"] < rows[draft.CLEAN[1]]["flops"] < rows[draft.CLEAN[3]]["flops"]
    assert rows[draft.STITCHED]["kept_bytes"] < rows[draft.CLEAN[1]]["kept_bytes"] < rows[draft.CLEAN[3]]["kept_bytes"]
    assert "of the time of: DRaFT-3" in capsys.readouterr().out


def test_search_against_lstsq(tmp_path, monkeypatch):
    monkeypatch.setitem(search.SIZES, "playground", (16, 3, 12, 9, 32, 40))
    bench("search", out=tmp_path, device="cpu", rounds=2)
    grid = result(tmp_path, "search")["whole_grid"]
    assert grid["largest_relative_difference_of_mse"] < 1e-4
    assert grid["grid_s"]["gelsd"] == pytest.approx(3 * search.LAYERS * grid["pair_s"]["gelsd"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nft", {"scale": "real"}, "scale: expected playground for an iteration of training, got 'real'"),
        ("draft", {"scale": "quarter"}, "scale: expected playground for an iteration of training, got 'quarter'"),
        ("search", {"pixels": 64}, "pixels: expected none"),
        ("stage2", {"profile": True}, "profile: expected one of"),
    ],
)
def test_bad_input(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        bench(name, out=tmp_path, device="cpu", **options)
