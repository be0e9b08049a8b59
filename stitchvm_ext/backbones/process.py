"""Forward processes: how a model noises latents, seen through the rectified flow ``z_t = (1-t) z_0 + t eps``.

Everything outside the backbones speaks of flow times t in [0, 1] and of velocities ``u = eps - z_0``. A model of
another kind is the same model in other coordinates: a variance-preserving latent ``alpha z_0 + sigma eps`` is the flow
latent of ``t = sigma / (alpha + sigma)``, times ``alpha + sigma``. Euler steps of the flow are then DDIM steps of the
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def expand_sigma(sigma: Tensor, latents: Tensor) -> Tensor:
    """Noise levels [B] shaped to broadcast against latents [B, ...]."""
    return sigma.view(-1, *[1] * (latents.ndim - 1))


class ForwardProcess(ABC):
    """Between flow coordinates and a model's own. Sigma is a float32 tensor [B] of flow times; latents are [B, ...]."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """What the model takes as time, float32 [B]."""

    def model_latents(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Flow latents as the model has them."""
        return latents

    def flow_latents(self, model_latents: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of :meth:`model_latents`."""
        return model_latents

    def velocity(self, output: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """``u_t(z_t)`` of flow latents z_t from the model's output there."""
        return output

    def noise_levels(self) -> list[float]:
        """A few flow times by which a process that is not the model class's own choice is known again."""
        return []


class RectifiedFlow(ForwardProcess):
    """The model is a rectified flow already; it takes ``scale * t`` as time."""

    def __init__(self, scale: float = 1000.0):
        self.scale = scale

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.scale


class ReversedFlow(ForwardProcess):
    """A flow whose time runs from noise (0) to data (1), and whose velocity points to the data (Lumina)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def velocity(self, output: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        return -output


class DDPM(ForwardProcess):
    """Discrete variance-preserving diffusion, ``z_k = sqrt(a_k) z_0 + sqrt(1 - a_k) eps`` (Ho et al. 2020).

    Flow times between those of two timesteps get a fractional timestep, linear in ``log(sigma / alpha)``. Times beyond
    the noisiest timestep (t = 0.94 for Stable Diffusion's schedule) are taken as that one, and those below the least
    noisy one (0.03) likewise: the model knows no other.

    Args:
        alphas_cumprod: a_k, [K], decreasing.
        prediction_type: what the model's output is: "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon"):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: expected one of {list(PREDICTION_TYPES)}, got {prediction_type!r}")
        a = alphas_cumprod.double().cpu()
        if prediction_type == "epsilon" and a[-1] <= 0:
            raise ValueError(
                "prediction_type: expected v_prediction or sample where the last timestep is pure noise "
                "(rescale_betas_zero_snr), got epsilon"
            )
        self.prediction_type = prediction_type
        self.times = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())  # float64 [K], increasing
        self.min_sigma, self.max_sigma = float(self.times[0]), float(self.times[-1])

    @classmethod
    def from_scheduler(cls, scheduler) -> DDPM:
        """The process that a pipeline's scheduler was built for.

        Raises ValueError for a scheduler without ``alphas_cumprod`` or whose model takes another time than the
        timestep, and for a prediction type that is not known.
        """
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"pipe.scheduler: expected one with alphas_cumprod (DDIM, Euler, DPM-Solver …), "
                f"got {type(scheduler).__name__}"
            )
        if scheduler.config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(f"pipe.scheduler: expected timestep_type discrete, got {scheduler.config.timestep_type!r}")
        return cls(scheduler.alphas_cumprod, scheduler.config.get("prediction_type", "epsilon"))

    def flow_time(self, timestep: Tensor) -> Tensor:
        """Flow times, float32, of timesteps in [0, K-1]: the inverse of :meth:`timestep`."""
        k = timestep.double().clamp(0, len(self.times) - 1)
        log_ratios = _log_ratio(self.times).to(k.device)
        low = k.floor().long().clamp(max=len(self.times) - 2)
        return torch.sigmoid(torch.lerp(log_ratios[low], log_ratios[low + 1], k - low)).float()

    def timestep(self, sigma: Tensor) -> Tensor:
        log_ratios = _log_ratio(self.times).to(sigma.device)
        log_ratio = _log_ratio(sigma.double().clamp(self.min_sigma, self.max_sigma))
        high = torch.searchsorted(log_ratios, log_ratio.contiguous()).clamp(1, len(log_ratios) - 1)
        share = (log_ratio - log_ratios[high - 1]) / (log_ratios[high] - log_ratios[high - 1])
        return (high - 1 + share).float()

    def _scale(self, latents: Tensor, sigma: Tensor) -> Tensor:
        t = expand_sigma(sigma, latents)
        return 1 / (t.square() + (1 - t).square()).sqrt()

    def model_latents(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return latents * self._scale(latents, sigma).to(latents.dtype)

    def flow_latents(self, model_latents: Tensor, sigma: Tensor) -> Tensor:
        return model_latents / self._scale(model_latents, sigma).to(model_latents.dtype)

    def velocity(self, output: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        t = expand_sigma(sigma, latents).clamp(max=self.max_sigma)
        z, output = latents.float(), output.float()
        if self.prediction_type == "sample":
            return (z - output) / t.clamp(min=self.min_sigma)
        if self.prediction_type == "epsilon":
            return (output - z) / (1 - t)
        # v = alpha eps - sigma z_0 with (alpha, sigma) = (1 - t, t) * scale
        scale = 1 / (t.square() + (1 - t).square()).sqrt()
        return (2 * t - 1) * scale.square() * z + scale * output

    def noise_levels(self) -> list[float]:
        count = len(self.times)
        return [round(float(self.times[k * (count - 1) // 8]), 6) for k in range(9)]


def _log_ratio(t: Tensor) -> Tensor:
    """``log(sigma / alpha)`` of a flow time, finite at pure noise."""
    return torch.logit(t, eps=2**-26)
