"""The stitched value: exactness of the cut, the shared prefix, gradients, folders."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from stitchvm_ext import StitchedValue, stitch
from stitchvm_ext.backbones import backbone_of
from stitchvm_ext.backbones.latents import encode_images
from stitchvm_ext.ops import resample_tokens
from stitchvm_ext.value import FinetuneConfig, finetune, search_stitch
from stitchvm_ext.value.stitch_layer import StitchLayer
from stitchvm_ext.value.stitching import untrained_value
from stitchvm_ext.value.targets import cache_targets
from tests import tiny


@pytest.fixture
def make_value(pipe, reward, images):
    backbone = backbone_of(pipe)
    null = backbone.null_condition(pipe, max_sequence_length=0)
    latents = encode_images(pipe.vae, images)
    searches = {
        tokens: search_stitch(backbone, reward, latents, images, null, layers=[1, 2], tokens=tokens, progress=False)
        for tokens in ("fitted", "literal")
    }

    def make(depth=2, layer=1, tokens="fitted"):
        search = searches[tokens]
        return untrained_value(pipe, reward, search, depth, layer, (16, 16), null, {"max_sequence_length": 0})

    return make


def test_untrained_stitch_at_layer_1_is_resample_project_and_the_rest_of_the_reward(
    make_value, reward, latents, condition
):
    value = make_value(depth=2, layer=1)
    tokens = value.tokens(latents, 0.4)
    grid = tokens.transpose(1, 2).unflatten(2, (8, 8))
    resampled = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    patches = resampled @ value.stitch.project.weight.T + value.stitch.project.bias
    expected = reward.score(reward.forward_from(patches, 1), reward.encode_condition(condition.prompts))
    torch.testing.assert_close(value.value(latents, 0.4, condition), expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_literal_tokens_enter_the_block_with_input_class_token_and_position(
    make_value, pipe, reward, latents, condition, tmp_path, layer
):
    value = make_value(depth=2, layer=layer, tokens="literal")
    assert value.stitch.position is None and value.stitch.prefix is None
    patches = value.stitch(value.tokens(latents, 0.4), (8, 8))
    tokens = reward.enter(patches)
    for block in reward.blocks[layer - 1 :]:
        tokens = block(tokens)
    expected = reward.score(reward.finish(tokens), reward.encode_condition(condition.prompts))
    found = value.value(latents, 0.4, condition)
    torch.testing.assert_close(found, expected)
    value.save_pretrained(tmp_path)
    again = StitchedValue.from_pretrained(tmp_path, pipe)
    again.suffix.text = reward.text
    assert torch.equal(again.value(latents, 0.4, condition), found)
    assert not any(f"resblocks.{below}." in name for below in range(layer - 1) for name in value.state_dict())


def test_resampling_and_projection_commute(make_value):
    stitch_layer = make_value().stitch
    tokens = torch.randn(2, 64, 32)
    first = stitch_layer(tokens, (8, 8))
    stitch_layer.out_grid = (12, 12)  # upsampling projects first
    y = stitch_layer.project(resample_tokens(tokens, (8, 8), (12, 12)))
    torch.testing.assert_close(stitch_layer(tokens, (8, 8)), y + stitch_layer.mlp(y))
    assert first.shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("grid", "out_grid", "read"),
    [((64, 64), (24, 24), 48 * 48), ((64, 64), (16, 16), 32 * 32), ((9, 7), (3, 3), 3 * 5), ((8, 8), (5, 8), None)],
)
def test_read_tokens_are_those_with_a_weight(grid, out_grid, read):
    """Against the adjoint of the resampling: what it gives no gradient is not read."""
    found = StitchLayer(8, 8, out_grid).read_tokens(grid)
    tokens = torch.zeros(1, grid[0] * grid[1], 1).requires_grad_()
    (weights,) = torch.autograd.grad(resample_tokens(tokens, grid, out_grid).sum(), tokens)
    expected = weights.flatten().nonzero().flatten()
    assert torch.equal(expected if found is None else found, expected)
    assert (len(expected) == grid[0] * grid[1]) if read is None else (len(found) == read)


@pytest.mark.parametrize(("depth", "layer"), [(0, 1), (1, 1), (4, 2)])
def test_gradient_against_finite_differences_in_double(make_value, condition, latents, depth, layer):
    value = make_value(depth, layer)
    value = copy.deepcopy(value).double()
    object.__setattr__(value, "backbone", backbone_of(copy.deepcopy(value.backbone.denoiser).double()))
    z = latents.double()
    _, grad = value.value_and_grad(z, 0.5, condition)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        step = 1e-4
        ahead, behind = (value.value(z + s * step * direction, 0.5, condition).double() for s in (1, -1))
    slope = (grad * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope.double(), rtol=2e-2, atol=2e-4)


def test_shared_prefix_equals_the_separate_one(make_value, latents, condition):
    value = make_value(depth=2)
    assert value.can_share(condition)
    shared = value.denoise_with_value(latents, 0.6, condition)
    with torch.no_grad():
        velocity = value.backbone.guided_velocity(latents, 0.6, condition)
    separate = (velocity, *value.value_and_grad(latents, 0.6, condition))
    torch.testing.assert_close(shared[0], separate[0], rtol=1e-4, atol=1e-5)  # one batch of two against two calls
    assert torch.equal(shared[1], separate[1])
    assert torch.equal(shared[2], separate[2])


def count_block_rows(transformer, call):
    """How many samples went through each block during ``call``."""
    rows = [0] * len(transformer.transformer_blocks)

    def counter(number):
        def count(module, args, kwargs, output):
            rows[number] += output[1].shape[0]

        return count

    handles = [
        b.register_forward_hook(counter(n), with_kwargs=True) for n, b in enumerate(transformer.transformer_blocks)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def test_shared_guidance_runs_the_transformer_as_often_as_plain_cfg(make_value, latents, condition):
    value = make_value(depth=2)
    transformer = value.backbone.denoiser
    with torch.no_grad():
        plain = count_block_rows(transformer, lambda: value.backbone.guided_velocity(latents, 0.6, condition))
    guided = count_block_rows(transformer, lambda: value.denoise_with_value(latents, 0.6, condition))
    assert guided == plain == [4, 4, 4, 4]


def test_another_negative_prompt_runs_its_own_prefix(make_value, pipe, latents, condition):
    value = make_value(depth=2)
    uncond = value.backbone.encode_text(pipe, ["a blue ring"] * 2, max_sequence_length=0)
    other = type(condition)(condition.prompts, condition.cond, uncond, guidance_scale=3.0)
    assert not value.can_share(other)
    rows = count_block_rows(value.backbone.denoiser, lambda: value.denoise_with_value(latents, 0.6, other))
    assert rows == [6, 6, 4, 4]
    _, v, grad = value.denoise_with_value(latents, 0.6, other)
    plain_v, plain_grad = value.value_and_grad(latents, 0.6, condition)
    assert torch.equal(v, plain_v) and torch.equal(grad, plain_grad)


def test_samples_do_not_see_each_other(make_value, latents, condition):
    value = make_value(depth=2)
    together = value.value_and_grad(latents, torch.tensor([0.2, 0.7]), condition)
    for b, sigma in enumerate((0.2, 0.7)):
        alone = value.value_and_grad(latents[b : b + 1], sigma, condition.rows([b]))
        torch.testing.assert_close(alone[0], together[0][b : b + 1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone[1], together[1][b : b + 1], rtol=1e-3, atol=1e-6)


def test_works_inside_inference_mode(make_value, latents, condition):
    value = make_value(depth=2)
    expected = value.value_and_grad(latents, 0.5, condition)[1]
    with torch.inference_mode():
        torch.testing.assert_close(value.value_and_grad(latents.clone(), 0.5, condition)[1], expected)
        torch.testing.assert_close(value.denoise_with_value(latents.clone(), 0.5, condition)[2], expected)


def test_parameters_are_stitch_and_suffix_alone(make_value):
    value = make_value(depth=2)
    backbone = {id(p) for p in value.backbone.denoiser.parameters()}
    assert not backbone & {id(p) for p in value.parameters()}
    assert not any("transformer_blocks" in name for name in value.state_dict())


@pytest.mark.parametrize(("depth", "layer"), [(0, 1), (2, 1), (3, 2)])
def test_folder_round_trip(make_value, pipe, latents, condition, tmp_path, depth, layer):
    value = make_value(depth, layer)
    value.backbone_licence = "Backbone Licence 1.0"
    value.save_pretrained(tmp_path / "value")
    again = StitchedValue.from_pretrained(tmp_path / "value", pipe)
    again.suffix.text = value.suffix.text  # the text tower belongs to the original reward, which has no folder here
    assert torch.equal(again.value(latents, 0.3, condition), value.value(latents, 0.3, condition))
    assert again.config() == json.loads((tmp_path / "value" / "config.json").read_text())
    card = (tmp_path / "value" / "README.md").read_text()
    assert "inherits the licences of both" in card and "- backbone: Backbone Licence 1.0" in card
    assert "- reward: not recorded" in card
    assert not list((tmp_path / "value").glob("*.partial"))


def test_a_value_in_half_precision_keeps_the_null_text(make_value, pipe, tmp_path):
    value = make_value()
    value.save_pretrained(tmp_path)
    half = StitchedValue.from_pretrained(tmp_path, pipe, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(half.null_condition[name], row) for name, row in value.null_condition.items())


def test_loading_onto_another_backbone_is_refused(make_value, tmp_path):
    make_value().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other backbone weights"):
        StitchedValue.from_pretrained(tmp_path, tiny.tiny_transformer(seed=5))
    with pytest.raises(ValueError, match="with depth 4, got 3"):
        StitchedValue.from_pretrained(tmp_path, tiny.tiny_transformer(depth=3))


def test_missing_and_corrupt_folders(make_value, pipe, tmp_path):
    with pytest.raises(OSError, match="expected a saved value model"):
        StitchedValue.from_pretrained(tmp_path / "nothing", pipe)
    make_value().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(OSError, match="expected a saved value model"):
        StitchedValue.from_pretrained(tmp_path, pipe)
    (tmp_path / "config.json").write_text("{}")
    make_value().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(OSError, match="format_version 1"):
        StitchedValue.from_pretrained(tmp_path, pipe)


def test_latents_of_another_size_are_refused(make_value, condition):
    with pytest.raises(ValueError, match=r"made for latents of \(16, 16\), got \(32, 32\)"):
        make_value().value(torch.randn(2, 4, 32, 32), 0.5, condition)


def test_condition_must_have_a_row_per_latent(make_value, latents, condition):
    with pytest.raises(ValueError, match="condition: expected 1 rows"):
        make_value().value(latents[:1], 0.5, condition)


CONFIG = FinetuneConfig(epochs=3, batch_size=4, learning_rate=1e-3, warmup_steps=2, save_every=2)


def run_stitch(pipe, reward, images, folder, **options):
    options = {"config": CONFIG, "text_options": {"max_sequence_length": 0}, "progress": False} | options
    return stitch(pipe, reward, images, work_dir=folder, probe_images=12, **options)


def test_stitch_end_to_end_lowers_the_distillation_loss(pipe, reward, images, tmp_path):
    value = run_stitch(pipe, reward, images, tmp_path, depth=2, layer=1, config=replace(CONFIG, epochs=40))
    state = torch.load(tmp_path / "state_i2_j1.pt", weights_only=True)
    losses = state["history"][0]["embedding"]
    assert sum(losses[-12:]) < 0.7 * sum(losses[:12])
    assert (tmp_path / "search.png").is_file()
    assert not any(p.requires_grad for p in value.parameters())


def test_stitch_with_literal_tokens(pipe, reward, images, tmp_path):
    value = run_stitch(pipe, reward, images, tmp_path, depth=2, layer=2, tokens="literal")
    assert value.config()["tokens"] == json.loads((tmp_path / "search.json").read_text())["tokens"] == "literal"
    run_stitch(pipe, reward, images, tmp_path, depth=2, layer=2)  # beside the other's state
    assert len(list(tmp_path.glob("state_i2_j2*.pt"))) == 2


def test_the_same_call_gives_the_same_weights(pipe, reward, images, tmp_path):
    one = run_stitch(pipe, reward, images, tmp_path / "one", depth=2, layer=2)
    torch.rand(1)
    two = run_stitch(pipe, reward, images, tmp_path / "two", depth=2, layer=2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_interrupted_and_resumed_equals_uninterrupted(make_value, pipe, reward, images, tmp_path):
    targets = cache_targets(tmp_path / "targets", pipe, reward, images, progress=False)
    whole, begun, resumed = make_value(1, 2), make_value(1, 2), make_value(1, 2)
    for copy_of in (begun, resumed):
        copy_of.load_state_dict(whole.state_dict())
    finetune(whole, reward, targets, CONFIG, progress=False)
    state = tmp_path / "state.pt"
    finetune(begun, reward, targets, CONFIG, state_path=state, stop_at=5, progress=False)
    assert torch.load(state, weights_only=True)["step"] == 5
    finetune(resumed, reward, targets, CONFIG, state_path=state, progress=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert any(not torch.equal(t, begun.state_dict()[n]) for n, t in whole.state_dict().items())


def test_state_of_another_run_is_refused(pipe, reward, images, tmp_path):
    run_stitch(pipe, reward, images, tmp_path, depth=1, layer=1)
    with pytest.raises(OSError, match="belongs to another run"):
        run_stitch(pipe, reward, images, tmp_path, depth=1, layer=1, config=replace(CONFIG, learning_rate=2e-3))


def test_nan_stops_with_step_and_term(pipe, reward, images, tmp_path):
    with pytest.raises(FloatingPointError, match="finetune: the .* loss is .* at step"):
        run_stitch(
            pipe, reward, images, tmp_path, depth=1, layer=1, config=replace(CONFIG, learning_rate=1e30, epochs=5)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 9}, "kept blocks in 1..4"),
        ({"layer": 4}, "reward block in 1..3"),
        ({"tokens": "mean"}, "tokens: expected one of"),
        ({"config": FinetuneConfig(batch_size=64)}, r"at least probe_images \+ batch_size"),
    ],
)
def test_stitch_refuses_bad_input_before_work(pipe, reward, images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_stitch(pipe, reward, images, tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


def test_images_must_be_images(pipe, reward, tmp_path):
    with pytest.raises(TypeError, match="position 0"):
        run_stitch(pipe, reward, [3] * 30, tmp_path)
    with pytest.raises(OSError, match="a.png, which is not there"):
        run_stitch(pipe, reward, ["a.png"] * 30, tmp_path)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        run_stitch(pipe, reward, torch.full((30, 3, 32, 32), 255.0), tmp_path)
    with pytest.raises(TypeError, match="RewardModel"):
        run_stitch(pipe, torch.nn.Identity(), torch.rand(30, 3, 32, 32), tmp_path)
