"""Adapters, views of the denoiser, and the file that a stock pipeline loads."""

from __future__ import annotations

import copy

import pytest
import torch

from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.training.lora import (
    TARGETS,
    MergedView,
    adapter_parameters,
    add_adapters,
    base_view,
    copy_adapter,
    drift,
    export_weights,
    lora_layers,
)
from tests import tiny
from tests.tiny.catalogue import PIPELINES


def spread(denoiser, adapter="default", seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(denoiser, adapter).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(pipe):
    add_adapters(pipe.transformer, ("default", "old"), 4, 8)
    return pipe


@pytest.fixture
def call(pipe):
    """Latents, noise levels and a text for the denoiser."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    encoding = backbone_of(pipe).encode_text(pipe, ["a ring", "two red circles"], max_sequence_length=0)
    return latents, torch.tensor([0.3, 0.8]), encoding


def test_the_joint_attention_alone_is_adapted(adapted):
    names = {name for name, module in adapted.transformer.named_modules() if hasattr(module, "lora_A")}
    expected = {
        f"transformer_blocks.{block}.attn.{layer}"
        for block in range(4)
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    } - {"transformer_blocks.3.attn.to_add_out"}  # the last block has no text output
    assert names == expected
    trained = {name for name, p in adapted.transformer.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(expected) and all(".default." in name for name in trained)


@pytest.mark.parametrize("name", [n for n in PIPELINES if not n.startswith(("pixart", "hunyuan-dit"))])
def test_every_family_that_takes_adapters_has_targets(name):
    pipe = copy.deepcopy(PIPELINES[name]())
    denoiser = backbone_of(pipe).denoiser
    add_adapters(denoiser, ("default",), 2, 4)
    layers = [n for n, m in denoiser.named_modules() if hasattr(m, "lora_A")]
    assert layers and all(".attn" in n for n in layers)
    if type(denoiser).__name__ in ("FluxTransformer2DModel", "Flux2Transformer2DModel"):
        assert all(n.startswith("transformer_blocks.") for n in layers)


def test_adapters_start_equal_seeded_and_without_effect(pipe, call):
    backbone = backbone_of(pipe)
    before = backbone.velocity(*call)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    add_adapters(pipe.transformer, ("default", "old"), 4, 8, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(backbone.velocity(*call), before)
    mine, old = (adapter_parameters(pipe.transformer, name) for name in ("default", "old"))
    assert mine.keys() == old.keys() and all(torch.equal(mine[k], old[k]) for k in mine)
    other = copy.deepcopy(tiny.tiny_pipeline())
    add_adapters(other.transformer, ("default",), 4, 8, seed=7)
    again = adapter_parameters(other.transformer)
    assert all(torch.equal(mine[k], again[k]) for k in mine)
    assert drift(pipe.transformer) == 0


def test_drift_is_the_mean_share_of_the_weights(adapted):
    spread(adapted.transformer)
    ratios = []
    for layer in lora_layers(adapted.transformer):
        delta = layer.get_delta_weight("default")
        ratios.append((delta.norm() / layer.get_base_layer().weight.norm()).square())
    assert drift(adapted.transformer) == pytest.approx(torch.stack(ratios).mean().sqrt().item(), rel=1e-4)


def test_the_base_view_is_the_model_without_adapters_on_the_same_weights(adapted, call):
    spread(adapted.transformer)
    backbone = backbone_of(adapted)
    with torch.no_grad():
        expected = backbone_of(tiny.tiny_pipeline()).velocity(*call)
        base = backbone.on(base_view(adapted.transformer))
        assert torch.equal(base.velocity(*call), expected)
        assert not torch.allclose(backbone.velocity(*call), expected, atol=1e-3)
    own = {id(p) for p in adapted.transformer.parameters()}
    assert all(id(p) in own for p in base.denoiser.parameters())
    assert not any("lora" in name for name, _ in base.denoiser.named_parameters())
    assert base.features(*call, depth=2).shape == (2, 64, 32)


def test_a_merged_view_is_the_adapter_and_leaves_the_denoiser_alone(adapted, call):
    denoiser, backbone = adapted.transformer, backbone_of(adapted)
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    spread(denoiser)
    view = MergedView(denoiser)
    merged = backbone.on(view.denoiser)
    with torch.no_grad():
        view.set_to("default")
        first = merged.velocity(*call)
        torch.testing.assert_close(first, backbone.velocity(*call), rtol=1e-4, atol=1e-5)
        with merged.fused():
            torch.testing.assert_close(merged.velocity(*call), first, rtol=1e-4, atol=1e-5)
        view.set_to("old")
        torch.testing.assert_close(merged.velocity(*call), backbone_of(tiny.tiny_pipeline()).velocity(*call))
        view.set_to("default")
        assert torch.equal(merged.velocity(*call), first)
    for name, parameter in denoiser.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name]), name


def test_an_adapter_is_mixed_into_another(adapted):
    denoiser = adapted.transformer
    spread(denoiser)
    mine = {k: p.clone() for k, p in adapter_parameters(denoiser).items()}
    old = {k: p.clone() for k, p in adapter_parameters(denoiser, "old").items()}
    copy_adapter(denoiser, "default", "old", keep=0.75)
    for key, parameter in adapter_parameters(denoiser, "old").items():
        torch.testing.assert_close(parameter, 0.75 * old[key] + 0.25 * mine[key])
    copy_adapter(denoiser, "default", "old")
    assert all(torch.equal(p, mine[k]) for k, p in adapter_parameters(denoiser, "old").items())


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "sd15"])
def test_a_stock_pipeline_loads_the_exported_file_and_changes_as_in_training(name, tmp_path):
    trained, stock = (copy.deepcopy(PIPELINES[name]()) for _ in range(2))
    backbone = backbone_of(trained)
    add_adapters(backbone.denoiser, ("default", "old"), 4, 8)
    spread(backbone.denoiser)
    export_weights(trained, tmp_path)
    options = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 32}
    draw = lambda pipe: pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images  # noqa: E731
    plain = draw(stock)
    stock.load_lora_weights(tmp_path)
    loaded = draw(stock)
    torch.testing.assert_close(loaded, draw(trained), rtol=1e-4, atol=1e-4)
    assert (loaded - plain).abs().max() > 0.01


def test_bad_denoisers_and_targets_are_refused(pipe):
    with pytest.raises(TypeError, match="expected a denoiser that takes adapters, one of .* got HunyuanDiT2DModel"):
        add_adapters(backbone_of(PIPELINES["hunyuan-dit"]()).denoiser, ("default",), 4, 8)
    with pytest.raises(ValueError, match="lora_targets: expected a pattern of layers, got 'nothing'"):
        add_adapters(pipe.transformer, ("default",), 4, 8, targets="nothing")
    add_adapters(pipe.transformer, ("default",), 4, 8)
    with pytest.raises(ValueError, match=r"expected a denoiser without adapters, got \['default'\]"):
        add_adapters(pipe.transformer, ("default",), 4, 8)
    assert "SD3Transformer2DModel" in TARGETS
