"""A world in which everything is known in closed form.

The clean latents follow a mixture of Gaussians, ``z_0 ~ sum_k pi_k N(m_k, S_k)`` in D dimensions, and the reward is
quadratic, ``r(z_0) = b.z_0 + z_0'A z_0 / 2``. Along ``z_t = (1-t) z_0 + t eps`` velocity, posterior, soft value and
the distribution tilted by ``exp(lambda r)`` (a mixture again) all have formulas. Parameters and arithmetic are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stitchvm_ext.backbones import Condition
from stitchvm_ext.sampling.denoiser import Denoiser
from stitchvm_ext.sampling.task import SamplingTask
from stitchvm_ext.sampling.transitions import Transition, get_transition
from stitchvm_ext.value.base import ValueEstimator


@dataclass(frozen=True)
class Mixture:
    """``sum_k weights_k N(means_k, covs_k)``: weights [K], means [K, D], covs [K, D, D]."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    def sample(self, count: int, seed: int) -> Tensor:
        """[count, D]"""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(self.covs)[k], noise)

    def log_components(self, z: Tensor) -> Tensor:
        """``log weights_k N(z; means_k, covs_k)`` [B, K] of z [B, D]."""
        gaussians = torch.distributions.MultivariateNormal(self.means, self.covs)
        return self.weights.log() + gaussians.log_prob(z[:, None])

    def responsibilities(self, z: Tensor) -> Tensor:
        """Probability [B, K] that z came from each component."""
        return self.log_components(z).softmax(1)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs + centred[:, :, None] * centred[:, None, :])


@dataclass(frozen=True)
class QuadraticReward:
    """``r(z) = b.z + z'A z / 2``; b [D], A [D, D] symmetric."""

    b: Tensor
    A: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.b + 0.5 * torch.einsum("...i,ij,...j->...", z, self.A, z)

    def tilt(self, means: Tensor, covs: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """``N(mean, cov) exp(scale r)``, for means [..., D] and covs broadcastable to [..., D, D].

        Returns:
            the log of its mass ``log E exp(scale r)`` [...], its mean [..., D] and its covariance.
        """
        identity = torch.eye(len(self.b), dtype=torch.float64)
        shrink = identity - scale * covs @ self.A
        tilted_covs = torch.linalg.solve(shrink, covs)
        slope = self.b + means @ self.A  # the reward's gradient at the mean
        moved = means + scale * torch.einsum("...ij,...j->...i", tilted_covs, slope)
        log_mass = (
            scale * self(means)
            + 0.5 * scale**2 * torch.einsum("...i,...ij,...j->...", slope, tilted_covs, slope)
            - 0.5 * torch.logdet(shrink)
        )
        return log_mass, moved, tilted_covs


@dataclass(frozen=True)
class OracleWorld:
    prior: Mixture
    reward: QuadraticReward
    shape: tuple[int, int, int]  # C, H, W of the latents, C*H*W = D

    def posterior(self, z: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """``z_0 | z_t``, a mixture per sample: weights [B, K], means [B, K, D] and covariances [K, D, D] of z [B,
        D].
        """
        a, covs = 1 - t, self.prior.covs
        identity = torch.eye(covs.shape[-1], dtype=torch.float64)
        marginal = Mixture(self.prior.weights, a * self.prior.means, a * a * covs + t * t * identity)
        gain = torch.linalg.solve(marginal.covs, a * covs).mT  # a S (a² S + t² I)^-1, S symmetric
        means = self.prior.means + torch.einsum("kij,bkj->bki", gain, z[:, None] - marginal.means)
        return marginal.responsibilities(z), means, covs - a * gain @ covs

    def denoised(self, z: Tensor, t: float) -> Tensor:
        """``E[z_0 | z_t]`` [B, D]."""
        weights, means, _ = self.posterior(z, t)
        return torch.einsum("bk,bki->bi", weights, means)

    def velocity(self, z: Tensor, t: float) -> Tensor:
        """``E[eps - z_0 | z_t]`` [B, D], t > 0."""
        return (z - self.denoised(z, t)) / t

    def expected_reward(self, z: Tensor, t: float) -> Tensor:
        """``E[r(z_0) | z_t]`` [B]: the regressed value."""
        weights, means, covs = self.posterior(z, t)
        return (weights * (self.reward(means) + 0.5 * torch.einsum("kij,ji->k", covs, self.reward.A))).sum(1)

    def soft_value(self, z: Tensor, t: float, scale: float) -> Tensor:
        """``log E[exp(scale r(z_0)) | z_t] / scale`` [B]."""
        weights, means, covs = self.posterior(z, t)
        return (weights.log() + self.reward.tilt(means, covs, scale)[0]).logsumexp(1) / scale

    def soft_value_grad(self, z: Tensor, t: float, scale: float) -> Tensor:
        """Its gradient [B, D]: ``((1-t)/t²) (E_tilted[z_0 | z_t] - E[z_0 | z_t]) / scale``."""
        weights, means, covs = self.posterior(z, t)
        log_mass, moved, _ = self.reward.tilt(means, covs, scale)
        tilted = torch.einsum("bk,bki->bi", (weights.log() + log_mass).softmax(1), moved)
        return (1 - t) / t**2 * (tilted - self.denoised(z, t)) / scale

    def tilted(self, scale: float) -> Mixture:
        """``p*(z_0) ~ p(z_0) exp(scale r(z_0))``."""
        log_mass, means, covs = self.reward.tilt(self.prior.means, self.prior.covs, scale)
        return Mixture((self.prior.weights.log() + log_mass).softmax(0), means, covs)

    # -- as the library sees it: latents [B, C, H, W] ------------------------------------------------------------------

    def flat(self, latents: Tensor) -> Tensor:
        return latents.flatten(1).double()

    def noise(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))

    def condition(self, count: int) -> Condition:
        return Condition(("",) * count, {})


class OracleBackbone:
    """The part of a DiffusionBackbone that sampling uses, with the exact velocity."""

    device = torch.device("cpu")

    def __init__(self, world: OracleWorld):
        self.world = self.denoiser = world  # estimators on one world are on one denoiser

    def branches(self, latents: Tensor, sigma: float, condition: Condition) -> tuple[Tensor, None]:
        return self.world.velocity(self.world.flat(latents), sigma).view_as(latents).to(latents.dtype), None


class OracleValue(ValueEstimator):
    """An exact value of an oracle world; gradients come from autograd through the formula.

    kind: "soft" (``log E exp(scale r) / scale``), "expected" (``E[r | z_t]``) or "tweedie" (``r(E[z_0 | z_t])``).
    """

    def __init__(self, world: OracleWorld, kind: str = "soft", scale: float = 1.0):
        self.backbone = OracleBackbone(world)
        self.world, self.kind, self.scale = world, kind, scale

    def value(self, latents: Tensor, sigma: float, condition: Condition) -> Tensor:
        self.check_condition(latents, condition)
        z = self.world.flat(latents)
        if self.kind == "soft":
            return self.world.soft_value(z, sigma, self.scale).float()
        if self.kind == "expected":
            return self.world.expected_reward(z, sigma).float()
        return self.world.reward(self.world.denoised(z, sigma)).float()


class BatchNoise:
    """The random numbers of S samples from one generator: faster than one for each, where nobody reads them apart."""

    def __init__(self, samples: int, generator: torch.Generator):
        self.samples, self.generator = samples, generator

    def rows(self, index: list[int]) -> BatchNoise:
        return BatchNoise(len(index), self.generator)

    def normal(self, shape: tuple[int, ...], particles: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.samples * particles, *shape, generator=self.generator, dtype=dtype)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(self.samples, count, generator=self.generator, dtype=torch.float64)


def sampling_task(
    world: OracleWorld,
    value: ValueEstimator | None,
    samples: int,
    *,
    particles: int = 1,
    steps: int = 10,
    power: float = 1.0,
    transition: str | Transition = "ode",
    seed: int = 0,
    **options,
) -> SamplingTask:
    """S samples of a world from noise; ``power`` > 1 makes the noise levels denser towards 0."""
    backbone = OracleBackbone(world) if value is None else value.backbone
    settings = {
        "denoiser": Denoiser(backbone, value),
        "sigmas": torch.linspace(1, 0, steps + 1) ** power,
        "condition": world.condition(samples),
        "transition": get_transition(transition),
        "noise": BatchNoise(samples, torch.Generator().manual_seed(seed + 1)),
        "shape": world.shape,
        "latents": world.noise(samples * particles, seed),
        "reward": lambda latents, condition: world.reward(world.flat(latents)),
    }
    return SamplingTask(**settings | options)


def two_dimensional_world(quadratic: bool) -> OracleWorld:
    """Three correlated components on [1, 1, 2] latents; a linear reward, or one with a maximum off every mean."""
    f64 = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    prior = Mixture(
        weights=f64([0.5, 0.3, 0.2]),
        means=f64([[-1.5, 0.0], [1.0, 1.2], [0.8, -1.4]]),
        covs=f64([[[0.20, 0.05], [0.05, 0.10]], [[0.15, -0.06], [-0.06, 0.25]], [[0.10, 0.0], [0.0, 0.10]]]),
    )
    curvature = [[-0.8, 0.2], [0.2, -0.5]] if quadratic else [[0.0, 0.0], [0.0, 0.0]]
    return OracleWorld(prior, QuadraticReward(f64([0.7, 0.4]), f64(curvature)), (1, 1, 2))


def image_like_world() -> OracleWorld:
    """Two components on [4, 2, 2] latents with random covariances and a concave quadratic reward."""
    generator = torch.Generator().manual_seed(5)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factors = 0.2 * randn(2, 16, 16)
    covs = factors @ factors.mT / 4 + 0.15 * torch.eye(16, dtype=torch.float64)
    prior = Mixture(torch.tensor([0.6, 0.4], dtype=torch.float64), 0.4 * randn(2, 16), covs)
    root = randn(16, 16) / 8
    return OracleWorld(prior, QuadraticReward(0.3 * randn(16), -root @ root.mT), (4, 2, 2))
