"""A scalar head on another reward's image tower: what :func:`distil_reward` makes of a black box."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..tensor_files import write_partial
from .base import RewardModel, RewardOutput
from .scalar_head import ScalarHead

FORMAT_VERSION = 1


class DistilledReward(RewardModel):
    """A scalar head on another reward's image tower, trained by :func:`~stitchvm_ext.rewards.distil_reward`.

    Scores are on the black box's own scale.

    The head reads the normalised image embedding e or, with prompts, (e, t, e t) with the tower's own text embedding t.
    It stays frozen in suffixes (METHOD.md §4).

    Args:
        tower: the reward whose image tower, preprocessing and text tower are used; its own score is not.
        head: on what :meth:`head_input` yields.
        conditioned: whether the score depends on a prompt.
        tower_trained: whether the tower's weights are no longer those that its reference names.
        licence: of the weights.
        report: how well the black box is met on held-out images.
    """

    def __init__(
        self,
        tower: RewardModel,
        head: ScalarHead,
        *,
        conditioned: bool,
        tower_trained: bool = False,
        licence: str | None = None,
        report: dict[str, float] | None = None,
    ):
        super().__init__()
        self.tower, self.head = tower, head
        self.conditioned, self.tower_trained = conditioned, tower_trained
        self.licence, self.report = licence, dict(report or {})
        self.distillation = "embedding" if conditioned else "score"
        for name in ("width", "grid", "num_prefix_tokens", "image_size", "mean", "std", "pooled_tokens"):
            setattr(self, name, getattr(tower, name))
        head.requires_grad_(False)
        self.eval()

    # -- the cut is the tower's ----------------------------------------------------------------------------------------

    @property
    def blocks(self) -> nn.ModuleList:
        return self.tower.blocks

    @property
    def kept_from(self) -> int:
        return self.tower.kept_from

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        return self.tower.patch_tokens(pixels)

    def enter(self, patches: Tensor) -> Tensor:
        return self.tower.enter(patches)

    def finish(self, tokens: Tensor) -> RewardOutput:
        return self.tower.finish(tokens)

    def preprocess(self, images: Tensor) -> Tensor:
        return self.tower.preprocess(images)

    # -- the score -----------------------------------------------------------------------------------------------------

    def head_parameters(self):
        return (*self.head.parameters(), *self.tower.head_parameters())

    def encode_condition(self, prompts: list[str] | tuple[str, ...] | Tensor) -> Tensor | None:
        """The tower's text embeddings [B, D]; None where the score does not depend on a prompt."""
        return self.tower.encode_condition(prompts) if self.conditioned else None

    def head_input(self, embedding: Tensor, condition: Tensor | None) -> Tensor:
        """Normalised image embeddings [B, D], with text embeddings [B, D] where the score depends on a prompt, as the
        head's input [B, D] or [B, 3 D].
        """
        if not self.conditioned:
            return embedding
        if condition is None:
            raise ValueError("prompts: this reward scores images for texts; expected one prompt per image, got None")
        if condition.shape != embedding.shape:
            raise ValueError(
                f"condition: expected text embeddings {list(embedding.shape)}, got {list(condition.shape)}"
            )
        return torch.cat([embedding, condition, embedding * condition], dim=-1)

    def score(self, output: RewardOutput, condition: Tensor | None) -> Tensor:
        x = self.head_input(output.normalized, condition)
        return self.head(x.to(next(self.head.parameters()).dtype)).float()

    # -- saved value models --------------------------------------------------------------------------------------------

    def describe(self) -> dict:
        tower = self.tower.describe()
        sizes = {str(index): list(size) for index, size in self.head.sizes.items()}
        return {
            "class": type(self).__name__,
            "reference": tower.get("reference"),
            "licence": self.licence,
            "tower": tower,
            "tower_trained": self.tower_trained,
            "conditioned": self.conditioned,
            "head": {"sizes": sizes, "activation": self.head.activation},
            "report": self.report,
        }

    @classmethod
    def _on(cls, tower: RewardModel, config: dict) -> DistilledReward:
        """A description's reward on a given tower, its head not yet set."""
        sizes = {int(index): tuple(size) for index, size in config["head"]["sizes"].items()}
        options = {name: config[name] for name in ("conditioned", "tower_trained", "licence", "report")}
        return cls(tower, ScalarHead(sizes, config["head"]["activation"]), **options)

    @classmethod
    def suffix_from_config(cls, config: dict, layer: int) -> DistilledReward:
        from . import reward_suffix_from_description  # the registry imports this module

        return cls._on(reward_suffix_from_description(config["tower"], layer), config)

    def suffix(self, layer: int) -> DistilledReward:
        suffix = super().suffix(layer)
        suffix.tower = self.tower.suffix(layer)  # with the text tower that is already loaded
        return suffix

    # -- folders -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: the head, and the tower if it was trained. The rest comes from the
        files that the tower was loaded from.

        Raises:
            ValueError: the tower was built in memory, so that it could not be found again.
        """
        if self.describe()["reference"] is None:
            raise ValueError(
                "student: its tower was built in memory; expected one loaded from files to save this reward"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_partial(folder / "model.safetensors", self._own_state())
        config = {"format_version": FORMAT_VERSION, "reward": self.describe()}
        (folder / "config.json.partial").write_text(json.dumps(config, indent=1))
        for name in ("model.safetensors", "config.json"):
            (folder / f"{name}.partial").replace(folder / name)

    def _own_state(self) -> dict[str, Tensor]:
        """The weights that no other file holds."""
        state = self.state_dict()
        return state if self.tower_trained else {name: t for name, t in state.items() if name.startswith("head.")}

    @classmethod
    def from_pretrained(cls, folder: str | Path, tower: RewardModel | None = None) -> DistilledReward:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            tower: the student, loaded as it was for :func:`~stitchvm_ext.rewards.distil_reward`. By default it is read
                from the files of its reference, without further options.

        Raises:
            OSError: a missing or unreadable file, or weights that do not fit.
            ValueError: the tower is another one, or was loaded with other options.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            state = load_file(folder / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise OSError(
                f"folder: expected a distilled reward (config.json, model.safetensors) in {folder}, got: {error}"
            ) from error
        found = config.get("format_version"), config.get("reward", {}).get("class")
        if found != (FORMAT_VERSION, cls.__name__):
            raise OSError(f"folder: expected {(FORMAT_VERSION, cls.__name__)} in {folder / 'config.json'}, got {found}")
        description = config["reward"]
        tower = _tower_of(description["tower"], tower)
        if description["tower_trained"]:
            tower = copy.deepcopy(tower)  # which gets other weights; the given one stays untouched
        reward = cls._on(tower, description)
        if state.keys() != reward._own_state().keys():
            raise OSError(f"folder: the weights in {folder} do not fit its config.json")
        reward.load_state_dict(state, strict=False)
        return reward


def _tower_of(description: dict, tower: RewardModel | None) -> RewardModel:
    """The tower that a description is of: the given one, or the one that its reference leads to.

    What is not in a reference (a label, other preprocessing) shows in the description, which has to be the same.
    """
    from . import REGISTRY  # the registry imports this module

    hint = "give the tower, loaded with the options that it had when it was the student"
    if tower is None:
        try:
            reference = description["reference"]
            tower = REGISTRY[description["class"]].from_pretrained(**reference, licence=description["licence"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"tower: {description['class']} needs more than its reference; {hint}") from error
    got = json.loads(json.dumps(tower.describe()))
    other = [name for name in description if name != "licence" and got.get(name) != description[name]]
    if other:
        raise ValueError(
            f"tower: expected the student that this reward was made from, got one with another {other}; {hint}"
        )
    return tower
