"""The door: from names and numbers to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones.configurations import CONFIGURATIONS
from .architectures import ARCHITECTURES, TOWERS, Architecture
from .devices import DEVICES, Device, seconds
from .fit import Savings, fits
from .pieces import Pieces
from .report import Plan, Row, StageRow
from .scenarios import Scenario, Scenarios
from .stages import finetune, search

METHODS = ("dps", "fk", "nft", "draft")
TABLE_TEXTS = 2  # prompt and null text: what a table of AdaLN vectors has per noise level


def plan(
    backbone: str,
    reward: str | Sequence[str],
    method: str = "dps",
    *,
    resolution: int | None = None,
    device: str = "h200",
    depth: int = 4,
    layer: int = 1,
    steps: int | None = None,
    batch: int | None = None,
    particles: int = 4,
    proposals: int = 2,
    images: int = 100_000,
    epochs: int = 5,
) -> Plan:
    """FLOPs, bytes, memory and a range of times of a method, its baselines and the making of its value model.

    Counted on fake tensors from the true architectures in bfloat16, in seconds and without a GPU.

    Args:
        backbone: a name of :data:`ARCHITECTURES`.
        reward: one or several of :data:`TOWERS`; several share the backbone's prefix.
        method: "dps" (a guided step), "fk" (particles), "nft" or "draft" (an iteration of training).
        resolution: side of the square images in pixels; default 1024 for sampling and 512 for training.
        device: a name of :data:`DEVICES`.
        depth: i, backbone blocks kept.
        layer: j, the reward block that the stitch feeds.
        steps: of the schedule; default 100 for dps, 40 for fk (28 without classifier-free guidance), 25 for nft, 10 for
            draft.
        batch: images in one pass; default 1, for nft 8. Of fk always 1: its particles run one after the other.
        particles, proposals: N and M of fk.
        images, epochs: of the finetuning.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    rewards = (reward,) if isinstance(reward, str) else tuple(reward)
    _check_names(backbone, rewards, method, device)
    architecture = ARCHITECTURES[backbone]
    training = method in ("nft", "draft")
    resolution = (512 if training else 1024) if resolution is None else resolution
    defaults = {"dps": 100, "fk": 40 if architecture.classifier_free else 28, "nft": 25, "draft": 10}
    steps = defaults[method] if steps is None else steps
    batch = (8 if method == "nft" else 1) if batch is None else batch
    _check_resolution(architecture, resolution)
    for name, value, low, high in (
        ("depth", depth, 1, sum(architecture.kinds()) - 1),
        ("layer", layer, 1, min(TOWERS[name].layers for name in rewards)),
        ("steps", steps, 1 if method == "dps" else 5, None),
        ("batch", batch, 1, 1 if method == "fk" else None),
        ("particles", particles, 1, None),
        ("proposals", proposals, 1, None),
        ("images", images, 1, None),
        ("epochs", epochs, 1, None),
    ):
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name}: expected {f'{low}..{high}' if high else f'at least {low}'}, got {value}")
    pieces = Pieces(architecture, rewards, resolution, depth, layer)
    ways = Scenarios(pieces, batch)
    if method == "dps":
        scenarios = ways.dps(steps)
    elif method == "fk":
        scenarios = ways.fk(steps, particles, proposals)
    else:
        scenarios = getattr(ways, method)(steps)
    card = DEVICES[device]
    text_encoders = pieces.entry * architecture.text_encoder_parameters
    released, outputs = pieces.modulation
    released -= pieces.entry * outputs * steps * TABLE_TEXTS
    return Plan(
        settings={
            "backbone": backbone, "reward": list(rewards), "method": method, "resolution": resolution,
            "device": device, "depth": depth, "layer": layer, "steps": steps, "batch": batch,
            **({"particles": particles, "proposals": proposals} if method == "fk" else {}),
            "images": images, "epochs": epochs,
        },
        parameters=architecture.parameters,
        weights={
            "denoiser": pieces.denoiser_bytes, "autoencoder": pieces.vae_bytes, "rewards": pieces.rewards_bytes,
            "stitched value": pieces.value_bytes, "text encoders": text_encoders,
            "AdaLN weights that can be released": 0 if training else max(0, released),
        },
        rows=[_row(scenario, card) for scenario in scenarios],
        stages=[
            StageRow(stage.name, stage.images, stage.cost.flops, seconds(stage.cost, card) * (1 / 3600))
            for stage in (search(pieces), *finetune(pieces, images, epochs))
        ],
        fits=fits(scenarios, Savings(text_encoders, 0 if training else released)),
    )  # fmt: skip


def _row(scenario: Scenario, device: Device) -> Row:
    cost, steps = scenario.cost, scenario.steps
    stepping = seconds(cost, device)
    return Row(
        scenario.name,
        scenario.group,
        steps,
        cost.flops / steps,
        cost.bytes / steps,
        cost.launches / steps,
        scenario.total.flops,
        scenario.weights,
        scenario.activations,
        scenario.weights + scenario.activations,
        stepping * (1 / steps),
        stepping + seconds(scenario.once, device),
    )


def _check_names(backbone: str, rewards: Sequence[str], method: str, device: str) -> None:
    known = [("backbone", backbone, ARCHITECTURES), ("method", method, METHODS), ("device", device, DEVICES)]
    known += [("reward", reward, TOWERS) for reward in rewards]
    for name, value, names in known:
        if value not in names:
            raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}")
    if not rewards:
        raise ValueError(f"reward: expected at least one of {', '.join(TOWERS)}, got none")


def _check_resolution(architecture: Architecture, resolution: int) -> None:
    multiple = architecture.multiple
    positions = CONFIGURATIONS[architecture.configuration].options.get("pos_embed_max_size")
    most = multiple * positions if positions else None
    if resolution < multiple or resolution % multiple or (most and resolution > most):
        upto = f" up to {most}" if most else ""
        raise ValueError(f"resolution: expected a multiple of {multiple}{upto}, got {resolution}")
