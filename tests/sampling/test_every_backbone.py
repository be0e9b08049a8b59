"""Particles with proposals on every backbone: the replayed prefix, and values at the clean end."""

import warnings

import pytest
import torch

from stitchvm_ext import guided_sample
from stitchvm_ext.backbones import backbone_of
from tests.sampling.test_guided_sample import Unshared
from tests.tiny.catalogue import PIPELINES


@pytest.mark.parametrize("name", list(PIPELINES))
def test_proposals_share_the_prefix_and_change_nothing(make_stitched, name):
    pipe = PIPELINES[name]()
    backbone = backbone_of(pipe)
    height, width = getattr(pipe, "test_size", (None, None))
    latent_size = backbone.latent_size(pipe, height, width)
    value = make_stitched(pipe, min(2, backbone.depth), latent_size)

    def run(value):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*distilled to few steps.*")
            return guided_sample(
                pipe, value, "a red circle", method="fk", num_particles=2, num_proposals=2, proposal_window=(0.0, 1.0),
                resample_window=(1, 2), num_inference_steps=3, guidance_scale=3.0, height=height, width=width,
                generator=torch.Generator().manual_seed(0), output_type="latent", progress=False,
            )  # fmt: skip

    shared, apart = run(value), run(Unshared(value))
    scale = apart.particles.abs().max().item()
    torch.testing.assert_close(shared.particles, apart.particles, rtol=0, atol=1e-4 * scale)
    assert shared.rewards.isfinite().all() and shared.evaluations.prefix == apart.evaluations.prefix > 0
    if not backbone.distilled_guidance:  # these have no unconditional branch to share
        assert shared.evaluations.denoiser < apart.evaluations.denoiser
