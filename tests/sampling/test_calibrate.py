"""The strength of guidance by short runs."""

import pytest
import torch

from stitchvm_ext import calibrate, guided_sample
from stitchvm_ext.sampling import Guidance
from tests.sampling.test_guided_sample import PROMPTS, QUIET

RUN = {"num_inference_steps": 4, "guidance_scale": 3.0, **QUIET}


@pytest.mark.parametrize("judged_by", ["reward", "value"])
def test_the_best_strength_is_chosen(pipe, stitched, reward, seeds, judged_by):
    judge = reward if judged_by == "reward" else None
    found = calibrate(pipe, stitched, PROMPTS, reward=judge, strengths=(0.3, 0.1), generator=seeds(0, 1, 2, 3), **RUN)
    assert found.strengths == (0.0, 0.1, 0.3)
    assert found.guidance.strength == found.strengths[max(range(3), key=found.scores.__getitem__)]
    assert found.standard_errors[0] == 0 < found.standard_errors[1]
    assert found.table().count("<- chosen") == 1
    if judge is not None:  # each score is that of a plain call with the same noise
        for strength, score in zip(found.strengths, found.scores, strict=True):
            result = guided_sample(
                pipe, stitched, PROMPTS, reward=reward, strength=strength, num_images_per_prompt=2,
                generator=seeds(0, 1, 2, 3), output_type="latent", **RUN,
            )  # fmt: skip
            assert result.rewards.mean().item() == pytest.approx(score, abs=1e-5)


def test_the_other_settings_are_kept(pipe, stitched, reward):
    guidance = Guidance(mode="raw", window=(1, 3), schedule="alpha")
    found = calibrate(
        pipe, stitched, PROMPTS, reward=reward, guidance=guidance, strengths=(5.0,),
        generator=torch.Generator().manual_seed(0), **RUN,
    ).guidance  # fmt: skip
    assert (found.mode, found.window, found.schedule) == ("raw", (1, 3), "alpha") and found.strength in (0.0, 5.0)


def test_bad_input(pipe, stitched):
    with pytest.raises(ValueError, match="strengths.*above 0"):
        calibrate(pipe, stitched, PROMPTS, strengths=(0.0, 1.0))
    with pytest.raises(ValueError, match="strengths"):
        calibrate(pipe, stitched, PROMPTS, strengths=())
    with pytest.raises(TypeError, match="strength: expected it in guidance"):
        calibrate(pipe, stitched, PROMPTS, strength=1.0)
    with pytest.raises(TypeError, match="method"):
        calibrate(pipe, stitched, PROMPTS, method="fk")
