"""The fused joint block against diffusers' own block, in float64 to 1e-12, at both memory levels."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.fused.function import Want
from stitchvm_ext.fused.fused_forward import FusedForward, fused_blocks, is_joint_block
from stitchvm_ext.fused.joint_block import joint_block
from tests.tiny import tiny_transformer

ROWS = torch.tensor([1, 5, 6, 33, 63])
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
exact = pytest.mark.usefixtures("exact_rms_norm")


def transformer(kind: str):
    """SD3.5 Medium (dual attention, q/k norms), SD3.5 Large (q/k norms), SD3 Medium (neither)."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0, 1) if kind == "medium" else (),
        qk_norm=None if kind == "sd3" else "rms_norm",
    ).eval().requires_grad_(False).double()  # fmt: skip
    for p in model.parameters():  # biases and norm weights as nobody initialises them
        p.add_(0.1 * torch.randn_like(p))
    return model


def streams(seed=0):
    g = torch.Generator().manual_seed(seed)
    image, text, temb = (torch.randn(2, n, 32, generator=g, dtype=torch.float64) for n in (64, 5, 1))
    return image.requires_grad_(), text.requires_grad_(), temb[:, 0]


def gradients(outputs, inputs, seed=1):
    """Gradients of a random combination of the outputs."""
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=g, dtype=o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, grads)


@exact
@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("number", [0, 1, 2])  # the last block's text stream ends
@pytest.mark.parametrize("kind", ["medium", "large", "sd3"])
def test_values_and_gradients(kind, number, memory):
    block = transformer(kind).transformer_blocks[number]
    assert is_joint_block(block)
    image, text, temb = streams()
    results = []
    for run in (block, lambda *args: joint_block(block, *args, Want(memory=memory))):
        text_out, image_out = run(image, text, temb)
        outputs = [image_out] if text_out is None else [image_out, text_out]
        results.append((*outputs, *gradients(outputs, (image, text))))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@exact
@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("kind", ["medium", "large"])
def test_only_the_tokens_that_are_read(kind, prune, memory):
    """With gradients at some tokens alone, both ways give those tokens' values and the same gradient."""
    block = transformer(kind).transformer_blocks[1]
    image, text, temb = streams()
    _, whole = block(image, text, temb)
    expected = gradients([whole[:, ROWS]], (image, text))
    text_out, got = joint_block(block, image, text, temb, Want(ROWS, prune, memory))
    torch.testing.assert_close(got[:, ROWS], whole[:, ROWS], **TOLERANCE)
    torch.testing.assert_close(gradients([got[:, ROWS]], (image, text)), expected, **TOLERANCE)
    assert (text_out is None) == prune
    if not prune:
        torch.testing.assert_close(got, whole, **TOLERANCE)


@exact
def test_one_stream_has_a_gradient():
    """The text of the first block is a constant; and nobody may read the text that leaves a block."""
    block = transformer("medium").transformer_blocks[0]
    image, text, temb = streams()
    text = text.detach()
    for read in (slice(0, 1), slice(1, 2), slice(0, 2)):
        expected = gradients(block(image, text, temb)[read], (image,))
        got = gradients(joint_block(block, image, text, temb, Want())[read], (image,))
        torch.testing.assert_close(got, expected, **TOLERANCE)


@exact
def test_one_token_and_an_empty_text():
    block = transformer("large").transformer_blocks[0]
    image, _, temb = streams()
    image = image[:, :1].detach().requires_grad_()
    for tokens in (1, 0):
        text = torch.randn(2, tokens, 32, dtype=torch.float64)
        expected = block(image, text, temb)[1]
        got = joint_block(block, image, text, temb, Want())[1]
        torch.testing.assert_close(got, expected, **TOLERANCE)
        torch.testing.assert_close(gradients([got], (image,)), gradients([expected], (image,)), **TOLERANCE)


def test_second_derivative_raises_with_advice():
    block = transformer("medium").transformer_blocks[0]
    image, text, temb = streams()
    _, out = joint_block(block, image, text, temb, Want())
    with pytest.raises(RuntimeError, match="no second derivative; run the plain block"):
        torch.autograd.grad(out.sum(), image, create_graph=True)


def test_what_is_kept():
    """In bfloat16 at true proportions (heads of 64, text a twelfth of the image), against what autograd keeps."""
    from diffusers.models.attention import JointTransformerBlock

    torch.manual_seed(0)
    block = JointTransformerBlock(256, 4, 64, qk_norm="rms_norm", use_dual_attention=True)
    block = block.requires_grad_(False).bfloat16()
    image, text, temb = (torch.randn(1, n, 256).bfloat16() for n in (96, 8, 1))
    image, temb = image.requires_grad_(), temb[:, 0]

    def kept(run) -> int:
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = run(image, text, temb)
            total = sum(n for pointer, n in storages.items() if pointer not in weights)
        del out
        return total

    plain = kept(block)
    assert kept(lambda *args: joint_block(block, *args, Want())) < 0.6 * plain
    assert kept(lambda *args: joint_block(block, *args, Want(memory="recompute"))) < 0.2 * plain


@pytest.mark.parametrize("what", ["adapter", "hook", "processor", "zero weight", "activation", "dtype", "compiled"])
def test_a_block_with_other_parts_is_left_alone(what):
    block = transformer("medium").transformer_blocks[0]
    if what == "adapter":
        block.attn.to_q = torch.nn.Sequential(block.attn.to_q)
    elif what == "hook":
        block.forward = lambda *args, **kwargs: None
    elif what == "processor":
        block.attn.set_processor(lambda *args, **kwargs: None)
    elif what == "zero weight":
        block.attn.norm_q.weight[3] = 0
    elif what == "activation":
        block.ff.net[0].approximate = "none"
    elif what == "compiled":
        block.compile(backend="eager")
    elif what == "dtype":
        block.ff.net[2].weight = torch.nn.Parameter(block.ff.net[2].weight.to(torch.int8), requires_grad=False)
    assert not is_joint_block(block)
    forward = block.forward
    with fused_blocks([block], [Want()]):
        assert block.forward == forward


def test_a_weight_put_in_the_place_of_a_good_one_is_looked_at_too():
    block = transformer("medium").transformer_blocks[0]
    assert is_joint_block(block)
    block.attn.norm_q.weight = torch.nn.Parameter(torch.zeros(8).double(), requires_grad=False)
    assert not is_joint_block(block)


def test_a_trained_block_and_autocast_run_as_they_are():
    block = transformer("medium").transformer_blocks[0]
    image, text, temb = streams()
    with fused_blocks([block], [Want()]):
        assert isinstance(block.forward, FusedForward)
        block.ff.net[2].weight.requires_grad_(True)
        _, out = block(image, text, temb)
        out.sum().backward()
        assert block.ff.net[2].weight.grad is not None
        block.requires_grad_(False)
        block.float()
        with torch.autocast("cpu", torch.bfloat16):
            args = [t.detach().float() for t in (image, text, temb)]
            assert torch.equal(block(*args)[1], type(block).forward(block, *args)[1])
    assert "forward" not in block.__dict__


def test_bad_memory_level():
    with pytest.raises(ValueError, match="memory: expected one of .*'save', 'recompute'.* got 'low'"):
        Want(memory="low")


def test_bfloat16_is_as_near_as_eager():
    block = tiny_transformer().transformer_blocks[0]
    image, text, temb = (t.detach() for t in streams())
    exact = block.double()(image, text, temb)[1]
    block = block.bfloat16()
    args = [t.bfloat16() for t in (image, text, temb)]
    eager, got = block(*args)[1], joint_block(block, *args, Want())[1]
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()
