"""Stage 1 against plain least squares on the very same features."""

import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stitchvm_ext.backbones import backbone_of, expand_rows
from stitchvm_ext.backbones.latents import encode_images
from stitchvm_ext.ops import resample_tokens
from stitchvm_ext.value.search import SearchResult, StitchCandidate, search_stitch
from stitchvm_ext.value.stitch_layer import patchify


@pytest.fixture
def null(pipe):
    return backbone_of(pipe).null_condition(pipe, max_sequence_length=0)


def features_and_targets(pipe, reward, images, null, depth, layer, seed=0):
    """What the search sees, gathered the slow way: float64 features [N, P, C] and targets [N, P, C']."""
    backbone = backbone_of(pipe)
    latents = encode_images(pipe.vae, images)
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        if depth == 0:
            tokens = patchify(noisy, 2)
        else:
            tokens = backbone.features(noisy, sigma, expand_rows(null, len(latents)), depth)
        entering = reward.entering_tokens(images, [layer])[layer]
    prefix = 0 if layer == 1 else reward.num_prefix_tokens
    return resample_tokens(tokens, backbone.grid(latents.shape[-2:]), reward.grid).double(), entering[
        :, prefix:
    ].double()


@pytest.mark.parametrize("tokens", ["fitted", "literal"])
@pytest.mark.parametrize(("depth", "layer"), [(0, 1), (2, 1), (4, 1), (2, 2), (1, 3)])
def test_closed_form_equals_lstsq_and_held_out_loss_is_honest(pipe, reward, images, null, depth, layer, tokens):
    latents = encode_images(pipe.vae, images)
    result = search_stitch(
        backbone_of(pipe),
        reward,
        latents,
        images,
        null,
        layers=[1, 2, 3],
        tokens=tokens,
        batch_size=5,
        progress=False,
    )
    found = result.at(depth, layer)
    f, g = features_and_targets(pipe, reward, images, null, depth, layer)
    fit, unseen = slice(0, 18), slice(18, 24)
    axes = (0, 1) if layer == 1 or tokens == "literal" else (0,)
    mean_f, mean_g = f[fit].mean(axes, keepdim=True), g[fit].mean(axes, keepdim=True)
    a, b = (f[fit] - mean_f).flatten(0, 1), (g[fit] - mean_g).flatten(0, 1)
    w = torch.linalg.lstsq(a, b, rcond=1e-5, driver="gelsd").solution
    predicted = mean_g + (f[unseen] - mean_f) @ w
    error = (predicted - g[unseen]).square()
    assert found.mse == pytest.approx(error.mean().item(), rel=1e-5)
    spread = (g[unseen] - g[fit].mean(0)).square().sum()
    assert found.unexplained == pytest.approx((error.sum() / spread).item(), rel=1e-5)
    torch.testing.assert_close(found.weight.double(), w.T, rtol=1e-3, atol=1e-4 * w.abs().max().item())
    bias = (mean_g - mean_f @ w).squeeze(0)
    torch.testing.assert_close(found.bias.double(), bias[0] if len(axes) == 2 else bias, rtol=1e-3, atol=1e-3)
    assert (found.prefix is None) == (len(axes) == 2)


def test_batches_do_not_matter(pipe, reward, images, null):
    latents = encode_images(pipe.vae, images)
    one, many = (
        search_stitch(backbone_of(pipe), reward, latents, images, null, batch_size=b, progress=False) for b in (24, 7)
    )
    for cell, candidate in one.candidates.items():
        assert many.candidates[cell].mse == pytest.approx(candidate.mse, rel=1e-5)


def test_prefix_is_the_mean_class_token(pipe, reward, images, null):
    latents = encode_images(pipe.vae, images)
    result = search_stitch(backbone_of(pipe), reward, latents, images, null, layers=[2], progress=False)
    with torch.no_grad():
        expected = reward.entering_tokens(images[:18], [2])[2][:, :1].mean(0)
    torch.testing.assert_close(result.at(1, 2).prefix, expected)


class LiveBytes(TorchDispatchMode):
    """The most that tensors made meanwhile held at one time, without views of the given ones."""

    def __init__(self, *known):
        super().__init__()
        self.live, self.peak = {t.untyped_storage()._cdata: 0 for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_does_not_grow_with_the_images(pipe, reward, images, null):
    latents = encode_images(pipe.vae, images)
    peaks = []
    for copies in (2, 6):
        z, x = latents.repeat(copies, 1, 1, 1), images.repeat(copies, 1, 1, 1)
        with LiveBytes(z, x) as memory:
            search_stitch(backbone_of(pipe), reward, z, x, null, batch_size=6, progress=False)
        peaks.append(memory.peak)
    assert peaks[0] > 1e6 and peaks[1] < 1.01 * peaks[0]


def candidate(depth, layer, mse):
    return StitchCandidate(depth, layer, mse, mse, torch.zeros(1, 1), torch.zeros(1), None)


def test_pick_ignores_depth_0_and_layers_past_4(tmp_path):
    losses = {(0, 1): 0.1, (1, 1): 0.5, (2, 2): 0.3, (2, 5): 0.01}
    result = SearchResult({cell: candidate(*cell, mse) for cell, mse in losses.items()})
    assert (result.best.depth, result.best.layer) == (2, 2)


def test_saved_table_and_heat_map(tmp_path):
    result = SearchResult({(i, j): candidate(i, j, 0.1 * i + 0.2 * j) for i in (0, 1, 2) for j in (1, 2)})
    result.save(tmp_path)
    saved = json.loads((tmp_path / "search.json").read_text())
    assert saved["pick"] == [1, 1] and saved["tokens"] == "fitted"
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert result.table().count("*") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [9]}, r"layer \(j\): expected a reward block in 1..3"),
        ({"held_out_share": 0.0}, "held-out part"),
        ({"tokens": "mean"}, r"tokens: expected one of \('fitted', 'literal'\), got 'mean'"),
    ],
)
def test_bad_input(pipe, reward, images, null, options, message):
    latents = encode_images(pipe.vae, images)
    with pytest.raises(ValueError, match=message):
        search_stitch(backbone_of(pipe), reward, latents, images, null, **options)
