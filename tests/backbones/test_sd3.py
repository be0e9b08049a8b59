import copy

import pytest
import torch

from stitchvm_ext.backbones import Condition, backbone_of, expand_rows
from stitchvm_ext.backbones.identity import check_fingerprint, fingerprint
from stitchvm_ext.backbones.truncate import blocks_of
from stitchvm_ext.playground import models
from tests import tiny


@pytest.fixture
def backbone():
    return backbone_of(tiny.tiny_pipeline())


@pytest.fixture
def null(backbone):
    return expand_rows(backbone.null_condition(tiny.tiny_pipeline(), max_sequence_length=0), 2)


LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 0.8])


def assert_rounded(got, expected):
    """Equal up to the rounding of the fused blocks, which sum in another order than diffusers'."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_shell_shares_parameters_and_copies_none(backbone):
    shell = backbone.truncated(2)
    assert {id(p) for p in shell.parameters()} <= {id(p) for p in backbone.denoiser.parameters()}
    assert len(shell.transformer_blocks) == 2
    assert len(backbone.denoiser.transformer_blocks) == backbone.depth == 4


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_features_equal_the_blocks_own_output(backbone, null, depth):
    own = []
    handle = backbone.denoiser.transformer_blocks[depth - 1].register_forward_hook(lambda m, a, out: own.append(out[1]))
    with torch.no_grad():
        backbone.denoiser(**backbone.inputs(LATENTS, SIGMA, null), return_dict=False)
        handle.remove()
        features = backbone.features(LATENTS, SIGMA, null, depth)
        several = backbone.features_at(LATENTS, SIGMA, null, sorted({1, depth, 3}))
    assert_rounded(features, own[0])
    assert_rounded(several[depth], own[0])
    assert sorted(several) == sorted({1, depth, 3})
    assert features.shape == (2, 64, backbone.width())


def test_token_order_is_row_major():
    """With one block and no mixing yet (depth 0 of a shell), the gradient of token (1, 3) lies on latent patch (1,
    3).
    """
    from stitchvm_ext.backbones.truncate import truncate

    backbone = backbone_of(tiny.tiny_pipeline())
    shell = truncate(backbone.denoiser, 0)
    null = expand_rows(backbone.null_condition(tiny.tiny_pipeline(), max_sequence_length=0), 1)
    leaf = LATENTS[:1].clone().requires_grad_()
    shell(**backbone.inputs(leaf, SIGMA[:1], null), return_dict=False)
    (grad,) = torch.autograd.grad(shell.norm_out.tokens[0, 1 * 8 + 3].square().sum(), leaf)
    touched = grad.abs().sum((0, 1)).nonzero() // 2
    assert torch.equal(touched.unique(dim=0), torch.tensor([[1, 3]]))


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_shared_prefix_gives_the_plain_velocity_and_the_plain_gradient(backbone, null, depth):
    velocity, tokens, leaf = backbone.velocity_and_features(LATENTS, SIGMA, null, depth)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert_rounded(velocity, backbone.velocity(LATENTS, SIGMA, null))
    other = LATENTS.clone().requires_grad_()
    plain = backbone.features(other, SIGMA, null, depth)
    assert_rounded(tokens, plain)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    (shared_grad,) = torch.autograd.grad((tokens * weights).sum(), leaf)
    (plain_grad,) = torch.autograd.grad((plain * weights).sum(), other)
    assert_rounded(shared_grad, plain_grad)


def test_tokens_that_are_read_are_all_that_is_computed(backbone, null):
    """The separate and the shared prefix, told which tokens are read: the same tokens and gradient at both levels."""
    rows = torch.tensor([0, 3, 17, 63])
    leaf = LATENTS.clone().requires_grad_()
    expected = backbone.features(leaf, SIGMA, null, 3)[:, rows]
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
    for memory in ("save", "recompute"):
        tokens = backbone.features(leaf, SIGMA, null, 3, rows=rows, memory=memory)
        assert_rounded(tokens[:, rows], expected)
        assert_rounded(torch.autograd.grad(tokens[:, rows].square().sum(), leaf)[0], expected_grad)
        options = {"rows": rows, "memory": memory}
        velocity, tokens, shared = backbone.velocity_and_features(LATENTS, SIGMA, null, 3, **options)
        assert_rounded(velocity, backbone.velocity(LATENTS, SIGMA, null))
        assert_rounded(torch.autograd.grad(tokens[:, rows].square().sum(), shared)[0], expected_grad)


def test_shared_prefix_leaves_no_hook_behind(backbone, null):
    backbone.velocity_and_features(LATENTS, SIGMA, null, 2)
    assert all(not block._forward_hooks for block in blocks_of(backbone.denoiser))


def test_gradient_mode_is_restored_after_an_error(backbone, null):
    broken = {name: t[:, :1] for name, t in null.items()}  # the pooled vector loses its width
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)):
            backbone.velocity_and_features(LATENTS, SIGMA, broken, 2)
        assert not torch.is_grad_enabled()


def test_guided_velocity_is_the_pipelines_formula(backbone, null):
    pipe = tiny.tiny_pipeline()
    prompts = ("a red circle", "a blue ring")
    cond = backbone.encode_text(pipe, list(prompts), max_sequence_length=0)
    condition = Condition(prompts, cond, null, guidance_scale=4.0)
    with torch.no_grad():
        u, c = (backbone.velocity(LATENTS, SIGMA, branch) for branch in (null, cond))
        guided = backbone.guided_velocity(LATENTS, SIGMA, condition)
    torch.testing.assert_close(guided, u + 4.0 * (c - u), rtol=1e-4, atol=1e-5)


def test_fingerprint_tells_another_training_from_a_rounded_copy(backbone):
    mark = fingerprint(backbone, 2)
    check_fingerprint(backbone, mark, 2)
    other = backbone_of(tiny.tiny_transformer(seed=9))
    with pytest.raises(ValueError, match="block 1"):
        check_fingerprint(other, mark, 2)
    rounded = backbone_of(tiny.tiny_transformer(seed=0).to(torch.bfloat16))
    check_fingerprint(rounded, fingerprint(backbone_of(tiny.tiny_transformer(seed=0)), 2), 2)


def test_real_format_with_t5_encodes_text():
    pipe = tiny.tiny_pipeline(t5=True)
    encoding = backbone_of(pipe).encode_text(pipe, ["a red circle"], max_sequence_length=8)
    assert encoding["prompt_embeds"].shape == (1, models.MAX_TOKENS + 8, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, n: b.features(LATENTS[:, :3], SIGMA, n, 1), r"latents: expected shape \[B, 4, H, W\]"),
        (lambda b, n: b.features(LATENTS, torch.tensor([0.5, 1.5]), n, 1), r"sigma: expected noise levels in \[0, 1\]"),
        (lambda b, n: b.features(LATENTS, torch.rand(3), n, 1), "sigma: expected one noise level or 2"),
        (lambda b, n: b.features(LATENTS, float("nan"), n, 1), r"sigma: expected noise levels in \[0, 1\]"),
        (lambda b, n: b.features(LATENTS, SIGMA, n, 5), r"expected a number of kept blocks in 1..4, got 5"),
        (lambda b, n: b.grid((15, 16)), "multiples of 2"),
        (lambda b, n: b.grid((64, 64)), "up to 32"),
    ],
)
def test_bad_input_names_argument_and_values(backbone, null, call, message):
    with pytest.raises(ValueError, match=message):
        call(backbone, null)


def test_unknown_transformer_lists_what_is_known():
    with pytest.raises(TypeError, match="SD3Transformer2DModel.*got Linear"):
        backbone_of(torch.nn.Linear(1, 1))


def test_integer_latents_are_a_type_error(backbone, null):
    with pytest.raises(TypeError, match="latents"):
        backbone.features(LATENTS.long(), SIGMA, null, 1)


def test_a_compiled_transformer_is_left_as_it_is(backbone):
    transformer = copy.deepcopy(backbone.denoiser)
    transformer.compile(backend="eager")
    with backbone_of(transformer).fused():
        assert not any("forward" in block.__dict__ for block in transformer.transformer_blocks)
