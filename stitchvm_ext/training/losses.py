"""Losses of the trainers, as functions of predictions alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

MIN_WEIGHT = 1e-5  # of the adaptive weights, as in the published code


def nft_loss(
    prediction: Tensor, old: Tensor, target: Tensor, optimality: Tensor, mix_beta: float, adaptive: bool = True
) -> Tensor:
    """DiffusionNFT's loss per sample: ``(r |y+ - y*|² + (1-r) |y- - y*|²) / beta`` with the implicit policies
    ``y+ = (1-beta) y_old + beta y`` and ``y- = (1+beta) y_old - beta y`` (METHOD.md §6), squares averaged over
    elements.

    Predictions may be velocities, or anything that is affine in them (clean estimates, anchors). At ``y = y_old`` the
    gradient is ``2 (2r-1) (y_old - y*)``, whatever beta.

    Args:
        prediction: y [B, ...], the only one that is differentiated.
        old: y_old; target: y*.
        optimality: r [B] in [0, 1].
        adaptive: divide each square by the mean absolute error of its own policy, without a gradient.

    Returns:
        [B], float32.
    """
    step = mix_beta * (prediction.float() - old.detach().float())
    losses = [
        share * _mean_square(old.detach().float() + sign * step - target, adaptive)
        for sign, share in ((1, optimality), (-1, 1 - optimality))
    ]
    return sum(losses) / mix_beta


def _mean_square(error: Tensor, adaptive: bool) -> Tensor:
    square = error.square().flatten(1).mean(1)
    if not adaptive:
        return square
    return square / error.detach().double().abs().flatten(1).mean(1).clamp(min=MIN_WEIGHT).float()


def velocity_distance(velocity: Tensor, reference: Tensor) -> Tensor:
    """Mean square of the difference per sample [B], float32: the divergence of two flow policies at a state, up to a
    factor of its noise level.
    """
    return (velocity.float() - reference.detach().float()).square().flatten(1).mean(1)


def dpo_loss(predictions: Tensor, references: Tensor, targets: Tensor, dpo_beta: float) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO's loss (Wallace et al. 2024) per pair: ``-log sigmoid(margin)`` with ``margin = -dpo_beta (d_w -
    d_l)`` and ``d = |y - y*|² - |y_ref - y*|²``, squares averaged over elements, of the winner w and the loser l.

    Args:
        predictions: y [B, 2, ...], the winner first, the only one that is differentiated.
        references: y_ref; targets: y*.
        dpo_beta: the paper's ``beta T`` with the weight of a noise level, which is constant there.

    Returns:
        loss and margin, float32 [B]. The margin is the model's implicit reward of the winner less that of the loser.
    """
    errors = (predictions.float() - targets).square() - (references.detach().float() - targets).square()
    winner, loser = errors.flatten(2).mean(2).unbind(1)
    margin = -dpo_beta * (winner - loser)
    return -logsigmoid(margin), margin


def old_policy_decay(schedule: str, optimizer_steps: int) -> float:
    """How much of the old policy is kept after an iteration, by the published schedules.

    "copy": 0. "linear": 0.001 per optimiser step, up to 0.5. "delayed": 0 for 75 steps, then 0.0075 per step, up to
    0.999.
    """
    return OLD_POLICY_DECAYS[schedule](optimizer_steps)


OLD_POLICY_DECAYS = {
    "copy": lambda steps: 0.0,
    "linear": lambda steps: min(0.001 * steps, 0.5),
    "delayed": lambda steps: min(0.0075 * max(0, steps - 75), 0.999),
}
