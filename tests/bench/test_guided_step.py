import gc
import json
import weakref

import pytest
import torch

from stitchvm_ext.bench import guided_step, scales
from stitchvm_ext.bench.guided_step import PLAIN, TWEEDIE
from stitchvm_ext.bench.suite import PROBE
from stitchvm_ext.cli.bench import bench
from stitchvm_ext.fused import fused_forward
from stitchvm_ext.precision import fast_dtype

STITCHED = (
    "stitched, own prefix",
    "stitched, shared",
    "stitched, shared, fused",
    "stitched, shared, fused, recompute",
)


@pytest.fixture(scope="module")
def setup():
    return scales.build("playground")


def test_playground_result(tmp_path, capsys):
    bench(scale="playground", out=tmp_path, device="cpu", rounds=2)
    result = json.loads((tmp_path / "guided_step_playground.json").read_text())
    assert (tmp_path / "guided_step_playground.png").stat().st_size
    assert result["machine"]["torch"] == torch.__version__ and result["setup"]["weights"] == "trained"
    rows = result["variants"]
    assert list(rows) == [PLAIN, TWEEDIE, *STITCHED, PROBE]
    flops = {name: row["flops"] for name, row in rows.items()}
    kept = {name: row["kept_bytes"] for name, row in rows.items() if name != PROBE}
    assert flops[PLAIN] < flops["stitched, shared"] < flops["stitched, own prefix"] < flops[TWEEDIE]
    assert flops["stitched, shared, fused"] < flops["stitched, shared, fused, recompute"]
    assert 0 == kept[PLAIN] < kept["stitched, shared, fused, recompute"] < kept["stitched, shared, fused"]
    assert kept["stitched, shared, fused"] < kept["stitched, shared"] < kept[TWEEDIE]
    for name, row in rows.items():
        assert row["rounds"] == 2 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["tflops_per_s"] == pytest.approx(row["flops"] / row["median_ms"] / 1e9)
        limit = rows[PROBE]["tflops_per_s"]
        assert row["share_of_limit"] == pytest.approx(row["tflops_per_s"] / limit), name
    ratio = result["stitched"]["stitched, shared"]
    assert ratio["time_over_plain"] == pytest.approx(rows["stitched, shared"]["median_ms"] / rows[PLAIN]["median_ms"])
    assert ratio["faster_than_tweedie"] == pytest.approx(
        rows[TWEEDIE]["median_ms"] / rows["stitched, shared"]["median_ms"]
    )
    printed = capsys.readouterr().out
    assert "faster than Tweedie-DPS" in printed and "weights trained" in printed


def test_stitched_variants_take_the_same_step(setup):
    steps = {name: call() for name, call in guided_step.calls(setup).items()}
    plain = steps[PLAIN] - setup.latents
    for name in STITCHED:
        torch.testing.assert_close(steps[name], steps[STITCHED[0]], rtol=1e-4, atol=1e-4)
        guidance = steps[name] - setup.latents - plain
        assert guidance.norm() == pytest.approx(0.2 * plain.norm().item(), rel=1e-3)  # the default relative strength
    assert not torch.allclose(steps[TWEEDIE], steps[STITCHED[0]], atol=1e-3)


def test_a_table_takes_the_place_of_the_layers_that_read_the_timestep(monkeypatch):
    setup = scales.build("playground")
    before = {name: call() for name, call in guided_step.calls(setup).items()}
    replaced = weakref.ref(setup.pipe.transformer.norm_out.linear)
    weights = sum(t.numel() for t in setup.weights())
    monkeypatch.setattr(scales, "build", lambda *args: setup)
    guided_step.build("playground")
    gc.collect()
    assert replaced() is None
    tables = sum(t.numel() for t in setup.weights()) - weights + setup.description["replaced_by_tables"]
    assert 0 <= tables < 0.05 * setup.description["replaced_by_tables"]  # two texts at one noise level
    for name, call in guided_step.calls(setup).items():
        torch.testing.assert_close(call(), before[name], rtol=1e-4, atol=1e-5)


def test_libraries_own_blocks_run_none_fused(setup, monkeypatch):
    fused = []
    original = fused_forward.joint_block
    monkeypatch.setattr(fused_forward, "joint_block", lambda *args: fused.append(1) or original(*args))
    calls = guided_step.calls(setup)
    for name in (PLAIN, TWEEDIE, "stitched, own prefix", "stitched, shared"):
        calls[name]()
    assert not fused
    calls["stitched, shared, fused"]()
    assert fused


def test_true_geometry_with_random_weights(monkeypatch):
    small = scales.Scale(blocks=2, depth=1, layers=2, pixels={"cpu": 32})
    monkeypatch.setitem(scales.SCALES, "quarter", small)
    setup = scales.build("quarter")
    description = setup.description
    assert description["width"] == 1536 and description["image_tokens"] == 4 and description["text_tokens"] == 333
    assert description["weights"].startswith("random")
    assert {t.dtype for t in setup.weights() if t.is_floating_point()} == {fast_dtype("cpu")}
    assert not any(t.requires_grad or t.is_meta for t in setup.weights())
    blocks = setup.pipe.transformer.transformer_blocks
    assert blocks[0].attn2 is not None and blocks[1].attn2 is None  # 13 of 24 blocks have two attentions
    assert setup.value.can_share(setup.condition)
    calls = guided_step.calls(setup)
    steps = {name: calls[name]() for name in (PLAIN, TWEEDIE, "stitched, shared", "stitched, shared, fused")}
    for step in steps.values():
        assert step.shape == (1, 16, 4, 4) and step.isfinite().all()
    moved = {name: step - setup.latents for name, step in steps.items()}
    assert (moved["stitched, shared"] - moved[PLAIN]).norm() > 0.1 * moved[PLAIN].norm()
    # in bfloat16 the two agree in direction alone
    fused, eager = moved["stitched, shared, fused"], moved["stitched, shared"]
    assert torch.cosine_similarity(fused.flatten(), eager.flatten(), dim=0) > 0.99


def test_real_is_the_published_model():
    real = scales.SCALES["real"]
    options = scales.CONFIGURATIONS["stable-diffusion-3.5-medium"].options
    assert real.blocks == options["num_layers"] == 24
    assert real.layers == scales.TOWERS[scales.TOWER].layers == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1}, "rounds: expected at least 2, got 1"),
        ({"pixels": 128}, "pixels: expected 64"),
        ({"scale": "quarter", "pixels": 100}, "pixels: expected a multiple of 16, got 100"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench(out=tmp_path, device="cpu", **options)
