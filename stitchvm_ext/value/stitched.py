"""The stitched value model: V(z_t, t) = r_{>=j}( s( u_{<=i}(z_t, t) ) ) (METHOD.md §2)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Condition, DiffusionBackbone, Encoding, backbone_of, expand_rows, is_same_encoding
from ..backbones.identity import check_fingerprint, fingerprint
from ..backbones.replay import can_replay, recorded
from ..measure import count, phase
from ..rewards import reward_suffix_from_description
from ..rewards.base import RewardModel, RewardOutput, skip_blocks
from .base import ValueEstimator
from .carry import PrefixCarry
from .folder import FORMAT_VERSION, find_folder, read_folder, upload_folder, write_folder
from .side_stream import side_stream
from .stitch_layer import StitchLayer, patchify


class StitchedValue(nn.Module, ValueEstimator):
    """The first ``depth`` blocks of a frozen backbone, a stitching layer, and a reward from block ``layer`` on.

    Holds a reference to the pipeline's own blocks and never a copy; parameters and state dict are those of the stitch
    and the reward's suffix alone. Depth 0 reads the noisy latent itself: the baseline that stitches to the VAE.

    Args:
        backbone: the adapter of the pipeline's transformer.
        stitch: the stitching layer.
        suffix: the reward without the blocks before ``layer``, see :meth:`RewardModel.suffix`; for literal tokens also
            :func:`rewards.base.skip_blocks`.
        depth: i, backbone blocks kept; 0 for none.
        layer: j, the reward block that the stitch feeds.
        tokens: "fitted", or "literal" where the suffix adds its input class token and position to the stitch's patch
            tokens at any j, see :func:`search_stitch`.
        latent_size: (H, W) of the latents it is made for.
        null_condition: one row, the backbone's encoding of the empty prompt.
        text_options: what ``null_condition`` was encoded with (for SD3 ``max_sequence_length``).
        prompt_conditioned: the backbone reads the sample's own prompt instead of the null text, for values that were
            trained so (``FinetuneConfig.prompt_share``). The prefix is then shared with the conditional branch, which
            is the only one where guidance is distilled (FLUX).
        latent_space: by which another backbone of the same space is known, see :mod:`backbones.identity`.
        backbone_licence: of the backbone's weights, for the model card.
        details: what else the model card should tell (search losses, training settings).

    Attributes:
        memory: what the fused blocks keep for the gradient: "save" (default), or "recompute", which keeps a third of
            that and computes queries, keys, values and the first MLP layer twice.
    """

    memory: str = "save"

    def __init__(
        self,
        backbone: DiffusionBackbone,
        stitch: StitchLayer,
        suffix: RewardModel,
        *,
        depth: int,
        layer: int,
        tokens: str = "fitted",
        latent_size: tuple[int, int],
        null_condition: Encoding,
        text_options: dict[str, Any],
        prompt_conditioned: bool = False,
        latent_space: dict[str, Any] | None = None,
        backbone_licence: str | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__()
        if depth:
            backbone.check_depth(depth)
        object.__setattr__(self, "backbone", backbone)  # out of parameters(), state_dict() and .to()
        self.stitch = stitch
        self.suffix = suffix
        self.depth, self.layer, self.token_mode = depth, layer, tokens
        self.latent_size = tuple(latent_size)
        self.grid = backbone.grid(self.latent_size, depth)
        self.text_options = dict(text_options)
        self.prompt_conditioned, self.latent_space = prompt_conditioned, latent_space
        self.backbone_licence = backbone_licence
        self.details = dict(details or {})
        # The tokens that the stitch reads: the prefix computes no others in its last block.
        self.register_buffer("read_tokens", stitch.read_tokens(self.grid) if depth else None, persistent=False)
        self._null_names = tuple(null_condition)
        for name, row in null_condition.items():
            self.register_buffer(f"null_{name}", row.detach().clone())

    @property
    def null_condition(self) -> Encoding:
        return {name: getattr(self, f"null_{name}") for name in self._null_names}

    @property
    def reads_encoding(self) -> bool:
        return self.prompt_conditioned

    # -- the value -----------------------------------------------------------------------------------------------------

    def check_latent_size(self, latent_size: tuple[int, int]) -> None:
        """Raises ValueError unless latents of this (H, W) are what the model was made for."""
        if tuple(latent_size) != self.latent_size:
            raise ValueError(
                f"latents: this value model was made for latents of {self.latent_size}, got {tuple(latent_size)}"
            )

    def tokens(self, latents: Tensor, sigma: float | Tensor, encoding: Encoding | None = None) -> Tensor:
        """Tokens for the stitch [B, N, C]: backbone features, or the latent's patches. Features of tokens that the
        stitch does not read are not defined. Frames of video latents count as samples: [B·T, N, C].

        Args:
            encoding: what the backbone reads, one row per latent; None for the null text.
        """
        self.check_latent_size(latents.shape[-2:])
        if self.depth == 0:
            self.backbone.check_latents(latents, sigma)
            return self.by_frame(patchify(latents, latents.shape[-1] // self.grid[1]))
        if encoding is None:
            encoding = expand_rows(self.null_condition, latents.shape[0])
        rows = self.rows_read(latents)
        return self.by_frame(
            self.backbone.features(latents, sigma, encoding, self.depth, rows=rows, memory=self.memory)
        )

    def text_of(self, condition: Condition) -> Encoding:
        """What the backbone reads for samples of this condition: their prompts, or the null text in every row."""
        return condition.cond if self.prompt_conditioned else expand_rows(self.null_condition, len(condition))

    def rows_read(self, latents: Tensor) -> Tensor | None:
        """The tokens that the stitch reads; None if these are all, or if there is more than one frame of them."""
        return self.read_tokens if latents.ndim == 4 or latents.shape[2] == 1 else None

    def by_frame(self, tokens: Tensor) -> Tensor:
        """The backbone's tokens [B, T·N, C] as [B·T, N, C]."""
        per_frame = self.grid[0] * self.grid[1]
        return tokens if tokens.shape[1] == per_frame else tokens.reshape(-1, per_frame, tokens.shape[-1])

    def forward(self, tokens: Tensor, pooled_only: bool = False) -> RewardOutput:
        """Stitch and reward suffix on backbone tokens [B, N, C]: the trainable part, which data parallelism wraps.

        ``pooled_only``: the embedding alone will be read, see :meth:`RewardModel.forward_from`.
        """
        enters_at = 1 if self.token_mode == "literal" else self.layer
        with phase("stitch"):
            entering = self.stitch(tokens, self.grid)
        with phase("suffix"):
            return self.suffix.forward_from(entering, enters_at, self.memory, pooled_only)

    def output(self, latents: Tensor, sigma: float | Tensor) -> RewardOutput:
        """The suffix's tokens and embedding for noisy latents [B, C, H, W]."""
        return self(self.tokens(latents, sigma))

    def frame_scores(self, output: RewardOutput, condition: Condition) -> Tensor:
        """Rewards [B, T] of the suffix's output for B·T frames."""
        frames = len(output.embedding) // len(condition)
        prompts = tuple(p for p in condition.prompts for _ in range(frames))
        return self.suffix.score(output, self.suffix.encode_condition(prompts)).view(-1, frames)

    def score(self, output: RewardOutput, condition: Condition) -> Tensor:
        """Rewards [B]: of video latents the mean over frames."""
        return self.frame_scores(output, condition).mean(1)

    def score_tokens(self, tokens: Tensor, condition: Condition) -> Tensor:
        """V [B] from the backbone's tokens [B, T·N, C] after block ``depth``."""
        count("value", len(condition))
        return self.score(self(self.by_frame(tokens), pooled_only=True), condition)

    def value(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        self.check_condition(latents, condition)
        return self.score_tokens(self.tokens(latents, sigma, self.text_of(condition)), condition)

    @torch.no_grad()
    def value_and_carry(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, PrefixCarry | None]:
        """As the base class says: where a branch of the denoiser runs the very prefix that the value has run."""
        if not self.can_share(condition) or not can_replay(self.backbone.denoiser, self.backbone.blocks):
            return super().value_and_carry(latents, sigma, condition)
        self.check_condition(latents, condition)
        self.check_latent_size(latents.shape[-2:])
        with recorded(self.backbone.blocks[: self.depth]) as outputs:
            tokens = self.backbone.features(latents, sigma, self.text_of(condition), self.depth, whole=True)
        return self.score_tokens(tokens, condition), PrefixCarry(self, outputs)

    def frame_values(self, latents: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        """V of every latent frame of videos, [B, T]; of images [B, 1]."""
        self.check_condition(latents, condition)
        tokens = self.tokens(latents, sigma, self.text_of(condition))
        return self.frame_scores(self(tokens, pooled_only=True), condition)

    def is_null_text(self, encoding: Encoding | None) -> bool:
        """Whether a branch with this encoding runs the very prefix that the value needs: its null text in every row."""
        return self.depth > 0 and encoding is not None and is_same_encoding(encoding, self.null_condition)

    def can_share(self, condition: Condition) -> bool:
        """Whether one of the denoiser's branches serves the value too: the unconditional one of guidance under the null
        text, the conditional one for a prompt-conditioned value.
        """
        if self.prompt_conditioned:
            return self.depth > 0
        return condition.guidance_scale > 1 and self.is_null_text(condition.uncond)

    def shared_branches(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Conditional and unconditional velocity, V and its gradient, at the denoiser's cost of plain sampling."""
        self.check_latent_size(latents.shape[-2:])
        shared, other = self.text_of(condition), self.other_branch(condition)
        # Both branches on the same blocks: their rounding errors then cancel in the difference that guidance amplifies.
        with self.backbone.fused(), torch.inference_mode(False), torch.enable_grad():
            shared_velocity, tokens, leaf = self.backbone.velocity_and_features(
                latents, sigma, shared, self.depth, rows=self.rows_read(latents), memory=self.memory
            )
            # Two backward passes: on a GPU the suffix runs beside the other branch, on a stream of its own.
            with side_stream(tokens.device) as join:
                entering = tokens.detach().requires_grad_()
                value = self.score_tokens(entering, condition)
                with phase("backward"):
                    (token_grad,) = torch.autograd.grad(value.sum(), entering)
            with torch.no_grad():
                other_velocity = None if other is None else self.backbone.velocity(latents, sigma, other)
            join(value, token_grad)
            with phase("backward"):
                (grad,) = torch.autograd.grad(tokens, leaf, token_grad)
        return *self.as_branches(shared_velocity, other_velocity), value.detach(), grad.float()

    def other_branch(self, condition: Condition) -> Encoding | None:
        """What the denoiser reads beside the text of the shared branch; None if that is its only branch, or if the
        condition holds no text for another one.
        """
        if not self.prompt_conditioned:
            return condition.cond or None
        return condition.uncond if condition.guidance_scale > 1 else None

    def as_branches(self, shared: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity from those of the shared branch and the other one."""
        return (shared, other) if self.prompt_conditioned else (other, shared)

    def branches_with_value(
        self, latents: Tensor, sigma: float | Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As the base class says; with an empty negative prompt the unconditional branch's prefix serves the value too,
        and the conditional one's serves a prompt-conditioned value always.

        The denoiser then runs exactly as often as for plain sampling; what guidance adds is the stitch, the suffix, and
        a backward pass through ``depth`` blocks.
        """
        self.check_condition(latents, condition)
        if not self.can_share(condition):
            return super().branches_with_value(latents, sigma, condition)
        return self.shared_branches(latents, sigma, condition)

    # -- folders -----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What :meth:`save_pretrained` writes as config.json."""
        return {
            "format_version": FORMAT_VERSION,
            "depth": self.depth,
            "layer": self.layer,
            "tokens": self.token_mode,
            "prompt_conditioned": self.prompt_conditioned,
            "latent_size": list(self.latent_size),
            "latent_space": self.latent_space,
            "stitch": {
                "in_width": self.stitch.project.in_features,
                "out_width": self.stitch.project.out_features,
                "out_grid": list(self.stitch.out_grid),
                "num_prefix_tokens": 0 if self.stitch.prefix is None else len(self.stitch.prefix),
                "with_position": self.stitch.position is not None,
            },
            "backbone": {**fingerprint(self.backbone, self.depth), "licence": self.backbone_licence},
            "reward": self.suffix.describe(),
            "null_condition": {name: list(row.shape) for name, row in self.null_condition.items()},
            "text_options": self.text_options,
            "details": self.details,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and README.md (the model card) into a folder."""
        write_folder(Path(folder), self.config(), self.state_dict())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload StitchedValue",
    ) -> str:
        """Save into a repository ``owner/name`` of the Hugging Face Hub, made if needed. Returns the commit's address.

        The model inherits the licences of backbone and reward; see that they allow it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(Path(folder), repo_id, private=private, token=token, commit_message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        pipe,
        dtype: torch.dtype = torch.float32,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> StitchedValue:
        """Load a saved value model onto the backbone of a pipeline (or a bare transformer), on its device, frozen.

        Args:
            folder: a local folder, or ``owner/name`` on the Hugging Face Hub.
            revision, token: of the Hub.

        Raises:
            OSError: the folder or one of its files is missing or unreadable.
            ValueError: the value model was made for another backbone.
        """
        config, state = read_folder(find_folder(folder, revision, token))
        backbone = backbone_of(pipe)
        check_fingerprint(backbone, config["backbone"], config["depth"])
        missing = [name for name in config["null_condition"] if f"null_{name}" not in state]
        if missing:
            raise OSError(f"folder: the weights in {folder} do not fit its config.json: no null text {missing}")
        layer, tokens = config["layer"], config.get("tokens", "fitted")
        if tokens == "literal":
            suffix = skip_blocks(reward_suffix_from_description(config["reward"], 1), layer)
        else:
            suffix = reward_suffix_from_description(config["reward"], layer)
        value = cls(
            backbone,
            StitchLayer(**config["stitch"]),
            suffix,
            depth=config["depth"],
            layer=layer,
            tokens=tokens,
            latent_size=tuple(config["latent_size"]),
            null_condition={name: state[f"null_{name}"] for name in config["null_condition"]},
            text_options=config["text_options"],
            prompt_conditioned=config.get("prompt_conditioned", False),
            latent_space=config.get("latent_space"),
            backbone_licence=config["backbone"]["licence"],
            details=config["details"],
        )
        try:
            value.load_state_dict(state)
        except RuntimeError as error:
            raise OSError(f"folder: the weights in {folder} do not fit its config.json: {error}") from error
        for part in (value.stitch, value.suffix):  # the null text keeps its dtype: rounded, it would be another text
            part.to(dtype)
        return value.to(backbone.device).eval().requires_grad_(False)


def rows_read_by(values: Sequence[StitchedValue], latents: Tensor) -> Tensor | None:
    """The tokens after one block that several stitches read between them; None if these are all."""
    read = [value.rows_read(latents) for value in values]
    return None if any(rows is None for rows in read) else torch.cat(read).unique()
