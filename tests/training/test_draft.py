"""DRaFT: its gradient is that of the value at the end of the sampler's last steps, to finite differences."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.training import DraftConfig
from stitchvm_ext.training.draft import differentiable_steps
from stitchvm_ext.training.rollout import roll_out
from stitchvm_ext.training.samples import collect
from tests.oracle import image_like_world, two_dimensional_world
from tests.training.build import build


def world_policy(world, parameters):
    """The exact velocity, bent by a linear map and a bias: what a trained policy is near."""
    matrix, bias = parameters
    return lambda z, sigma: world.velocity(z, float(sigma[0])) + 0.3 * torch.tanh(z @ matrix + sigma[:, None] * bias)


@pytest.mark.parametrize("last_steps", [1, 3])
@pytest.mark.parametrize(("end", "kind"), [(10, "clean"), (6, "soft"), (6, "expected")])
@pytest.mark.parametrize("make", [lambda: two_dimensional_world(quadratic=True), image_like_world])
def test_the_gradient_is_that_of_finite_differences(make, end, kind, last_steps):
    world = make()
    size, sigmas = world.prior.means.shape[1], torch.linspace(1, 0, 11, dtype=torch.float64)
    draw = lambda seed, *shape: torch.randn(  # noqa: E731
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    parameters = [0.3 * draw(0, size, size), draw(1, size)]
    levels = sigmas[end - last_steps : end + 1, None].expand(-1, 5)
    start = (1 - levels[0, 0]) * world.prior.sample(5, 2) + levels[0, 0] * draw(3, 5, size)

    def objective(*parameters):
        reference = lambda z, sigma: world.velocity(z, float(sigma[0]))  # noqa: E731
        z, distance = differentiable_steps(world_policy(world, parameters), reference, start, levels)
        scores = {
            "clean": lambda: world.reward(z),
            "soft": lambda: world.soft_value(z, float(sigmas[end]), 2.0),
            "expected": lambda: world.expected_reward(z, float(sigmas[end])),
        }[kind]()
        return (scores - 0.7 * distance).mean()

    leaves = [p.clone().requires_grad_() for p in parameters]
    found = torch.autograd.grad(objective(*leaves), leaves)
    for number, parameter in enumerate(parameters):
        for place in list(range(parameter.numel()))[:: max(1, parameter.numel() // 6)]:
            ends = []
            for step in (1e-5, -1e-5):
                moved = [p.clone() for p in parameters]
                moved[number].view(-1)[place] += step
                ends.append(objective(*moved))
            difference = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(found[number].reshape(-1)[place], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("stitched", "last_steps"), [(False, 1), (False, 3), (True, 1)])
def test_the_trainers_gradient_in_a_direction_is_the_change_of_its_loss(tmp_path, stitched, last_steps):
    """With rollout fixed, through denoiser, decoder or value, LoRA and regulariser, guided."""
    trainer = build(
        tmp_path, method="draft", stitched=stitched, last_steps=last_steps, kl_weight=0.5, guidance_scale=2.0,
        prompts_per_iteration=4,
    )  # fmt: skip
    trainer.train(stop_at=1, progress=False)  # B is zero before, and so is the regulariser's gradient
    starts = [4 - last_steps - k % 2 for k in range(4)] if stitched else [5 - last_steps] * 4
    samples = collect(trainer, 1, range(4), trainer.next_prompts(4), starts)
    loss = lambda: trainer.losses(samples, [0, 1, 2, 3])["loss"].sum()  # noqa: E731
    parameters = list(trainer.parameters.values())
    grads = torch.autograd.grad(loss(), parameters)
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    step, ends = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.add_(sign * step * g / norm)
            ends.append(loss())
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(sign * step * g / norm)
    assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(norm), rel=0.03)


@pytest.mark.parametrize("stitched", [False, True])
def test_the_differentiated_steps_end_where_the_sampler_does(tmp_path, stitched):
    trainer = build(tmp_path, method="draft", stitched=stitched, last_steps=1, prompts_per_iteration=4)
    trainer.train(stop_at=1, progress=False)
    ends = [2, 3, 4, 3] if stitched else [5] * 4
    prompts = trainer.next_prompts(4)
    samples = collect(trainer, 1, range(4), prompts, [end - 1 for end in ends])
    columns = trainer.losses(samples, [0, 1, 2, 3])
    condition = trainer.encode(prompts)
    merged, generators = trainer.merged(), trainer.generators(1, range(4))
    z, tau = roll_out(merged, condition, trainer.sigmas, generators, trainer.latent_shape, "ode", ends)
    torch.testing.assert_close(columns["latents"], z.flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(columns["reward/mean"], trainer.value.value(z, tau, condition), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stitched", [False, True])
def test_training_raises_the_reward(tmp_path, stitched):
    settings = {"method": "draft", "stitched": stitched, "depths": (1, 3), "kl_weight": 0.0, "learning_rate": 1e-3}
    settings["last_steps"] = 1 if stitched else 3
    trainer = build(tmp_path, iterations=12, eval_every=12, save_every=12, prompts_per_iteration=8, **settings)
    probe = [trainer.encode([text]) for text in trainer.prompts.texts]

    def reward():
        stop = [3] if stitched else [5]
        scores = []
        for condition in probe:
            for seed in range(4):
                noise = [torch.Generator().manual_seed(seed)]
                ends = roll_out(trainer.merged(), condition, trainer.sigmas, noise, trainer.latent_shape, "ode", stop)
                scores.append(trainer.value.value(*ends, condition))
        return torch.cat(scores).mean().item()

    with torch.no_grad():
        before = reward()
        with torch.enable_grad():
            rows = trainer.train(progress=False)
        assert reward() > before  # of the prompts that it trains on: those of a random reward have nothing in common
    expected = {"reward/mean", "loss", "kl", "gradient_norm", "drift", "seconds"}
    assert expected <= rows[1].keys() and rows[1]["kl"] == 0 and "latents" not in rows[1]
    assert not stitched or sum(name.startswith("reward/") for name in rows[1]) == 3


def test_rewards_that_teach_nothing(tmp_path):
    """Not finite, constant, or without a gradient."""
    trainer = build(tmp_path, method="draft", kl_weight=0.0)
    trainer.train(stop_at=1, progress=False)
    before = {name: tensor.clone() for name, tensor in trainer.adapter_state("default").items()}
    trainer.value.value = lambda latents, sigma, condition: latents.flatten(1).sum(1) * torch.nan
    with pytest.raises(FloatingPointError, match="reward/mean is not finite at iteration 1"):
        trainer.train(progress=False)
    constant = build(tmp_path, method="draft", kl_weight=0.0)
    assert constant.iteration == 1
    constant.optimizer.state.clear()  # no momentum of the first iteration
    constant.value.value = lambda latents, sigma, condition: latents.flatten(1).sum(1) * 0 + 1
    assert constant.iterate(1)["gradient_norm"] == 0
    for name, tensor in constant.adapter_state("default").items():
        assert torch.equal(tensor, before[name])
    constant.value.value = lambda latents, sigma, condition: torch.ones(len(latents))
    with pytest.raises(ValueError, match="value: expected one with a gradient, got CleanReward without"):
        constant.iterate(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_steps": 10}, "last_steps: expected fewer than the 10 steps of the shortest rollout, got 10"),
        ({"last_steps": 3, "stop_window": (3, 7)}, "last_steps: expected fewer than the 3 steps"),
        ({"stop_window": (3, 11)}, "stop_window: expected"),
        ({"kl_weight": -0.1}, "kl_weight: expected at least 0, got -0.1"),
        ({"last_steps": 0}, "last_steps: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DraftConfig(**settings)


def test_defaults_are_the_papers():
    config = DraftConfig()
    found = (
        config.lora_rank, config.lora_alpha, config.learning_rate, config.weight_decay, config.max_grad_norm,
        config.kl_weight, config.num_inference_steps, config.guidance_scale,
    )  # fmt: skip
    assert found == (32, 64, 5e-5, 0.0, 1.0, 0.01, 10, 1.0)
