"""The particle methods on a real (tiny) StableDiffusion3Pipeline: what they evaluate, share, and refuse."""

import math

import pytest
import torch

from stitchvm_ext import MonteCarloValue, TweedieValue, ValueSum, guided_sample
from stitchvm_ext.sampling import METHODS
from stitchvm_ext.value import ScheduledValue
from stitchvm_ext.value.base import ValueEstimator
from tests.sampling.test_guided_sample import PROMPTS, QUIET, Unshared

STEPS, BLOCKS, DEPTH = 5, 4, 2
RUN = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **QUIET}
EVERY_STEP = {"resample_window": (0, None), "resample_every": 1}


class Recorded(ValueEstimator):
    """Notes what it is asked, and what it answered."""

    def __init__(self, inner):
        self.backbone, self.inner, self.text_options = inner.backbone, inner, getattr(inner, "text_options", {})
        self.calls = []

    def value(self, latents, sigma, condition):
        value = self.inner.value(latents, sigma, condition)
        self.calls.append((latents, sigma, value))
        return value

    def value_and_carry(self, latents, sigma, condition):
        value, carry = self.inner.value_and_carry(latents, sigma, condition)
        self.calls.append((latents, sigma, value))
        return value, carry


# -- what is shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(
    "method, options",
    [
        ("fk", {"num_particles": 3, **EVERY_STEP}),
        ("fk", {"num_particles": 2, "num_proposals": 3, "proposal_window": (0.0, 1.0)}),
        ("svdd", {"num_proposals": 2}),
        ("search", {"num_particles": 2, "proposals_per_step": 2}),
        ("best_of_n", {"num_particles": 4, "keep": ((1, 3), (3, 2))}),
    ],
)
def test_the_kept_prefix_serves_the_next_step(pipe, stitched, reward, seeds, method, options, batch_size):
    """The same samples as with a prefix and a pass of its own each time, for fewer block evaluations."""
    run = lambda value: guided_sample(  # noqa: E731
        pipe,
        value,
        PROMPTS,
        method=method,
        reward=reward,
        generator=seeds(0, 1),
        batch_size=batch_size,
        **RUN,
        **options,
    )
    shared, apart = run(stitched), run(Unshared(stitched))
    torch.testing.assert_close(shared.particles, apart.particles, rtol=0, atol=1e-4)
    torch.testing.assert_close(shared.values, apart.values, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert shared.evaluations.value == apart.evaluations.value
    assert shared.evaluations.prefix == apart.evaluations.prefix > 0
    assert shared.evaluations.denoiser < apart.evaluations.denoiser


def test_evaluations_of_fk_with_proposals(pipe, stitched, reward, seeds):
    """K particles, two branches; M prefixes a particle at the steps that choose, of which the next step reuses one."""
    k, m, samples = 3, 2, 2
    result = guided_sample(
        pipe, stitched, PROMPTS, method="fk", reward=reward, num_particles=k, num_proposals=m,
        proposal_window=(0, 3), resample_window=(3, 4), generator=seeds(0, 1), **RUN,
    )  # fmt: skip
    rows, share = samples * k, DEPTH / BLOCKS
    events = 1  # outside of the proposals' window: its value is one more prefix, which the next step reuses
    assert result.evaluations.prefix == rows * (3 * m + events)
    assert result.evaluations.denoiser == pytest.approx(rows * (2 * STEPS + 3 * (m - 1) * share))
    assert result.evaluations.value == rows * (3 * m + events) + rows  # and the rewards of the finished samples
    assert result.evaluations.decoder == rows
    assert result.rewards.shape == result.log_weights.shape == (samples, k)


def test_a_sum_of_values_shares_the_prefix_too(pipe, stitched, reward, seeds):
    run = lambda value: guided_sample(  # noqa: E731
        pipe, value, PROMPTS, method="svdd", generator=seeds(0, 1), num_proposals=2, **RUN
    )
    double, single = run(ValueSum.mean([stitched, stitched])), run(stitched)
    torch.testing.assert_close(double.latents, single.latents, rtol=0, atol=1e-4)
    assert double.evaluations.denoiser == single.evaluations.denoiser
    assert double.evaluations.value == 2 * single.evaluations.value


def test_tweedie_is_fresh_and_its_pass_serves_the_next_step(pipe, reward, seeds):
    """Public code weighs z_{k+1} by the estimate from z_k, one step stale."""
    value = Recorded(TweedieValue(pipe, reward))
    result = guided_sample(
        pipe, value, PROMPTS, method="fk", num_particles=2, scale=5.0, generator=seeds(0, 1), **EVERY_STEP, **RUN
    )
    sigmas = [sigma for _, sigma, _ in value.calls]
    torch.testing.assert_close(torch.tensor(sigmas), torch.cat([result.sigmas[1:-1], torch.zeros(1)]))
    for latents, sigma, answer in value.calls:
        condition = stub_condition(pipe, latents)
        torch.testing.assert_close(answer, value.inner.value(latents, sigma, condition), rtol=1e-4, atol=1e-5)
    assert result.evaluations.denoiser == STEPS * 2 * 2 * 2  # that of plain guidance: every pass was used twice


def stub_condition(pipe, latents):
    from stitchvm_ext.backbones import backbone_of
    from stitchvm_ext.sampling.encoding import encode_condition

    prompts = [p for p in PROMPTS for _ in range(len(latents) // 2)]
    return encode_condition(pipe, backbone_of(pipe), prompts, [""] * len(prompts), 3.0, {"max_sequence_length": 0})


def test_gradients_every_other_step_go_on_in_between(pipe, stitched, seeds):
    run = lambda **options: guided_sample(  # noqa: E731
        pipe, stitched, PROMPTS, generator=seeds(0, 1), strength=0.3, **RUN, **options
    )
    always, held, skipped = run(), run(every=2, between="last"), run(every=2)
    assert held.valued_steps == skipped.valued_steps == 3 < always.valued_steps == STEPS
    assert held.evaluations.value == skipped.evaluations.value
    distance = lambda other: (other.latents - always.latents).norm()  # noqa: E731
    assert distance(held) < distance(skipped)


# -- equivalences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fk", "svdd", "best_of_n"])
def test_one_of_everything_is_plain_sampling(pipe, stitched, reward, seeds, method):
    options = {
        "fk": {"num_particles": 1, "num_proposals": 1},
        "svdd": {"num_proposals": 1},
        "best_of_n": {"num_particles": 1},
    }[method]
    plain = guided_sample(pipe, None, PROMPTS, generator=seeds(0, 1), transition="linear_sde", **RUN)
    result = guided_sample(
        pipe, stitched, PROMPTS, method=method, generator=seeds(0, 1), transition="linear_sde", **RUN, **options
    )
    torch.testing.assert_close(result.latents, plain.latents, rtol=0, atol=1e-5)


def test_the_first_of_n_is_the_plain_sample(pipe, reward, seeds):
    plain = guided_sample(pipe, None, PROMPTS, generator=seeds(0, 1), **RUN)
    best = guided_sample(
        pipe, None, PROMPTS, method="best_of_n", reward=reward, num_particles=3, generator=seeds(0, 1), **RUN
    )
    torch.testing.assert_close(best.particles[:, 0], plain.latents, rtol=0, atol=1e-5)
    chosen = best.particles[torch.arange(2), best.rewards.argmax(1)]
    assert torch.equal(chosen, best.latents)


def test_best_of_n_stops_early(pipe, reward, seeds):
    """As soon as a sample is good enough; its candidates are those of a run that does not stop."""
    run = lambda **options: guided_sample(  # noqa: E731
        pipe, None, PROMPTS, method="best_of_n", reward=reward, num_particles=4, generator=seeds(0, 1), **RUN, **options
    )
    whole, never = run(), run(stop_above=1e9)
    # One candidate after the other: noise is drawn in the same order.
    torch.testing.assert_close(never.particles, whole.particles, rtol=0, atol=1e-5)
    threshold = whole.rewards[:, 1].min().item() - 1e-4
    stopped = run(stop_above=threshold)
    tried = (~stopped.rewards.isnan()).sum(1)
    assert (tried <= 2).all() and (stopped.rewards.nan_to_num(nan=-math.inf).amax(1) >= threshold).all()
    assert stopped.evaluations.denoiser == tried.sum() * STEPS * 2


def test_scheduled_values(pipe, stitched, reward, seeds):
    high, low = Recorded(stitched), Recorded(TweedieValue(pipe, reward))
    value = ScheduledValue([(0.6, high), (0.0, low)])
    guided_sample(pipe, value, PROMPTS, method="svdd", num_proposals=2, generator=seeds(0, 1), **RUN)
    assert high.calls and all(sigma >= 0.6 for _, sigma, _ in high.calls)
    assert low.calls and all(sigma < 0.6 for _, sigma, _ in low.calls)
    guided = guided_sample(pipe, value, PROMPTS, generator=seeds(0, 1), **RUN)
    assert guided.valued_steps == STEPS
    with pytest.raises(ValueError, match="stages.*fall to 0"):
        ScheduledValue([(0.0, high), (0.6, low)])
    with pytest.raises(TypeError, match="stages"):
        ScheduledValue([high])


def test_monte_carlo_values_steer_particles(pipe, reward, seeds):
    value = MonteCarloValue(pipe, reward, num_rollouts=2, num_steps=3)
    result = guided_sample(pipe, value, PROMPTS[0], method="fk", num_particles=2, generator=seeds(0)[0], **RUN)
    assert result.values.isfinite().any() and result.rewards.isfinite().all()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_value_of_another_backbone(stitched, reward, seeds, pipe, method):
    """A value of the same latent space runs beside the denoiser: nothing is shared."""
    from diffusers import StableDiffusion3Pipeline

    from stitchvm_ext.backbones.identity import latent_space
    from tests import tiny

    other = StableDiffusion3Pipeline(**{**pipe.components, "transformer": tiny.tiny_transformer(seed=5)})
    stitched.latent_space = latent_space(stitched.backbone, pipe)
    result = guided_sample(other, stitched, PROMPTS, method=method, reward=reward, generator=seeds(0, 1), **RUN)
    assert result.latents.isfinite().all()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("beam", {}, ValueError, "method.*'beam'"),
        (3, {}, TypeError, "method.*int"),
        ("fk", {"strength": 0.1}, TypeError, "strength: expected one of the options of method 'fk'"),
        ("dps", {"num_particles": 2}, TypeError, "num_particles.*'dps'"),
        ("dps", {"window": (10, 20)}, ValueError, "window.*at least one guided step out of 5"),
        ("dps", {"schedule": lambda sigma: 0.0}, ValueError, "at least one guided step"),
        ("dps", {"between": "first"}, ValueError, "between.*'first'"),
        ("fk", {"num_particles": 0}, ValueError, "num_particles"),
        ("fk", {"num_proposals": 1.5}, TypeError, "num_proposals.*float"),
        ("fk", {"resample_window": (8, 32)}, ValueError, "resample_window.*among 5, got 8"),
        ("fk", {"num_proposals": 2, "proposal_window": (3, 9)}, ValueError, "proposal_window.*among 5, got 9"),
        ("fk", {"resample_window": (0.91, 0.93)}, ValueError, "resample_window.*at least one of 5 steps"),
        ("fk", {"resample_window": (0.5, 0.2)}, ValueError, "resample_window.*first < end"),
        ("fk", {"transition": "ode"}, ValueError, "transition.*stochastic one for num_particles"),
        ("fk", {"num_particles": 1, "num_proposals": 2, "transition": "ode"}, ValueError, "for num_proposals"),
        ("dps+fk", {"num_particles": 1, "transition": "ode"}, ValueError, "for guidance"),
        ("dps+fk", {"transition": lambda z, u, s, t, n: z}, ValueError, "transition.*by name"),
        ("fk", {"potential": "mean"}, ValueError, "potential"),
        ("fk", {"resampling": "none"}, ValueError, "resampling"),
        ("fk", {"scale": -1.0}, ValueError, "scale"),
        ("fk", {"target_ess": 0.0}, ValueError, "target_ess"),
        ("fk", {"value": None}, ValueError, "value: expected an estimator for method 'fk'"),
        ("best_of_n", {"value": None}, ValueError, "value: expected an estimator, or a reward"),
        ("best_of_n", {"value": None, "reward": True, "keep": ((1, 2),)}, ValueError, "value.*estimator for keep"),
        ("best_of_n", {"keep": ((1, 4),)}, ValueError, "keep.*fewer than 4"),
        ("best_of_n", {"keep": ((5, 2),)}, ValueError, "keep.*below 5"),
        ("best_of_n", {"keep": ((1, 2),), "stop_above": 0.5}, ValueError, "keep.*stop_above"),
        ("svdd", {"transition": "ode"}, ValueError, "transition.*num_proposals"),
        ("search", {"transition": "ode"}, ValueError, "transition.*search"),
        ("fk", {"reward": "clip"}, TypeError, "reward.*str"),
        ("fk", {"latents": torch.zeros(2, 4, 16, 16)}, ValueError, r"latents: expected shape \[8, 4, 16, 16\]"),
    ],
)
def test_bad_options_are_refused_before_any_work(pipe, stitched, reward, block_rows, method, options, error, message):
    options = options | ({"reward": reward} if options.get("reward") is True else {})
    with pytest.raises(error, match=message):
        guided_sample(pipe, **{"value": stitched, "prompt": PROMPTS, "method": method, **RUN, **options})
    assert not block_rows


@pytest.mark.parametrize("answer", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["fk", "svdd", "search", "best_of_n"])
def test_values_that_are_no_numbers_stop(pipe, stitched, seeds, method, answer):
    class Broken(Recorded):
        def value(self, latents, sigma, condition):
            return super().value(latents, sigma, condition).index_fill(0, torch.tensor([1]), answer)

        def value_and_carry(self, latents, sigma, condition):
            return self.value(latents, sigma, condition), None

    with pytest.raises(FloatingPointError, match="value: .*NaN or .inf"):
        guided_sample(pipe, Broken(stitched), PROMPTS, method=method, generator=seeds(0, 1), **RUN)
