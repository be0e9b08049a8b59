"""The part of a run that all trainers share: adapters, data parallelism, checkpoints, evaluation, logs."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor
from tqdm import tqdm

from ..backbones import Condition, backbone_of
from ..backbones.distilled import warn_if_few_step
from ..backbones.identity import fingerprint
from ..offload import offload_text_encoders
from ..rewards.base import RewardModel
from ..rewards.sum import RewardSum
from ..rewards.text import TextConditioned
from ..sampling.checks import as_prompts, check_value
from ..sampling.encoding import encode_condition, split_guidance, text_options_of
from ..sampling.schedule import pipeline_sigmas
from ..value.base import ValueEstimator, score_images
from ..value.batches import seeded_generator
from ..value.processes import from_main, gather_rows, processes, share_of, sum_over
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .health import check_finite, check_gradients, warn_if_drifted
from .logs import RunLog, plot_curves, read_metrics, save_grid
from .lora import MergedView, adapter_parameters, add_adapters, base_view, drift, export_weights
from .prompts import PromptDataset
from .rewards import on_backbone, rewards_in
from .rollout import roll_out
from .sharding import shard_blocks
from .trackers import choose_trackers

GRID = 16  # pictures of an evaluation that are kept
EVALUATION = 2**31  # first number of the keys of an evaluation's noise, which no iteration has


class Trainer(ABC):
    """Trains a LoRA of a pipeline's denoiser to raise a value. Subclasses say what an iteration is (:meth:`iterate`).

    The run's folder gets ``metrics.jsonl``, ``curves.png``, ``samples/``, ``checkpoints/`` and, at the end,
    ``pytorch_lora_weights.safetensors`` (of the moving average), which a stock pipeline loads. A trainer made again for
    the same folder goes on from the newest checkpoint, and ends with the same weights, bit for bit.

    Under ``torchrun`` or ``accelerate launch`` every process takes its share of the samples, and gradients are summed,
    so the number of processes changes no step but for the rounding of sums.

    Args:
        pipe: a pipeline whose denoiser carries no adapters; it gets them, and is frozen otherwise.
        value: what is maximised: a :class:`StitchedValue`, a :class:`ValueSum` or another estimator on this pipeline's
            denoiser, which it reads without the adapters; or a :class:`CleanReward`.
        prompts: to train on: texts, a text file with one per line, a ``datasets.Dataset`` or a :class:`PromptDataset`.
        config: settings.
        output_dir: the run's folder.
        held_out: clean rewards by name that are not trained on, and so show whether the trained one is being tricked;
            measured at every evaluation.
        eval_prompts: held-out prompts, one picture each.
        trackers: names of accelerate's, such as "tensorboard" and "wandb", or instances of its ``GeneralTracker`` that
            are set up as you like; by default TensorBoard's where it is installed. They get the numbers of
            ``metrics.jsonl`` and the evaluations' pictures, from the main process.

    Attributes:
        policy: the backbone with the trained adapter, differentiable in its parameters.
        base: the backbone without adapters, on the same weights; the value's prefix is one of it.
        value: the estimator, on ``base``.
        parameters: the trained adapter's, by name.
        sigmas: [T+1], of the rollouts' schedule.
        optimizer_steps: done so far.
    """

    adapters: tuple[str, ...] = ("default",)

    def __init__(
        self,
        pipe,
        value: ValueEstimator,
        prompts: Any,
        config: TrainingConfig,
        *,
        output_dir: str | Path,
        held_out: Mapping[str, RewardModel | RewardSum],
        eval_prompts: Sequence[str],
        trackers: Sequence[str | GeneralTracker] | None = None,
    ):
        self.pipe, self.config, self.folder = pipe, config, Path(output_dir)
        self.trackers = choose_trackers(trackers)
        self.prompts = prompts if isinstance(prompts, PromptDataset) else PromptDataset(prompts, seed=config.seed)
        self.eval_prompts, self.held_out = as_prompts("eval_prompts", eval_prompts), dict(held_out)
        if not self.held_out:
            raise ValueError("held_out: expected at least one clean reward, which shows what the trained one hides")
        self.policy = backbone_of(pipe)
        if self.policy.is_video:
            raise ValueError(f"pipe: expected a pipeline of images, got one of videos ({type(self.policy).__name__})")
        warn_if_few_step(pipe, self.policy.denoiser)
        size = self.policy.latent_size(pipe, config.height, config.width)
        self.latent_shape = (self.policy.latent_channels, *size)
        check_value(value, pipe, self.policy, (1, *self.latent_shape))
        self.text_options = text_options_of(self.policy, value, config.max_sequence_length)
        self.sigmas = pipeline_sigmas(pipe, self.policy, config.num_inference_steps, size)
        device = pipe.vae.device if config.shard_frozen_weights else self.policy.device
        self.state = processes(device)
        run = config.identity() | {"prompts": self.prompts.digest, "value": type(value).__name__, "size": list(size)}
        weights = json.dumps(fingerprint(self.policy, self.policy.depth))
        self.run = run | {"backbone": hashlib.sha256(weights.encode()).hexdigest()}

        denoiser = self.policy.denoiser
        add_adapters(denoiser, self.adapters, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
        pipe.vae.requires_grad_(False)
        if config.offload_text_encoders:
            offload_text_encoders(pipe, device)
        self.parameters = adapter_parameters(denoiser)
        self.base = self.policy.on(base_view(denoiser))
        self._merged = MergedView(denoiser)
        self._merged_backbone = self.policy.on(self._merged.denoiser)
        self.sharded = config.shard_frozen_weights and self.state.num_processes > 1
        if self.sharded:
            shard_blocks(denoiser, self.policy.blocks, device, self.state.num_processes)
        if config.shard_frozen_weights:
            denoiser.to(device), self._merged.denoiser.to(device)
        if config.gradient_checkpointing:  # of the policy alone: the views' blocks may run fused, a second time not
            denoiser.enable_gradient_checkpointing()
        self.value = on_backbone(value, self.policy, self.base)
        self._rewards = [r for source in (value, *self.held_out.values()) for r in rewards_in(source)]
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        from diffusers.training_utils import EMAModel

        self.ema = EMAModel(self.parameters.values(), decay=config.ema_decay)
        self.ema.to(self.policy.device)
        self.iteration, self.position, self.optimizer_steps = 0, 0, 0
        self._resume()

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration: changes the weights, and returns numbers for the log, the same in all processes."""

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(self, *, stop_at: int | None = None, progress: bool = True) -> list[dict[str, float]]:
        """Run to ``config.iterations``, or until ``stop_at`` iterations are done in all.

        Returns:
            the log's rows, one per iteration.
        Raises:
            FloatingPointError: something is not finite; names the iteration and the tensor. The last checkpoint stays.
            OSError: the last checkpoint of the run cannot be written; one on the way is only warned about.
        """
        stop = min(self.config.iterations, stop_at or self.config.iterations)
        main = self.state.is_main_process
        with closing(self._open_log()) if main else nullcontext() as log:
            self._run(stop, log, progress and main)
        if self.iteration == self.config.iterations and main:
            self.export(self.folder)
        self.state.wait_for_everyone()
        return read_metrics(self.folder / "metrics.jsonl")

    def _run(self, stop: int, log: RunLog | None, progress: bool) -> None:
        bar = tqdm(total=stop, initial=self.iteration, desc=type(self).__name__, disable=not progress)
        if self.iteration == 0:
            self._log(log, {"iteration": 0, **self.evaluate()})
        while self.iteration < stop:
            began = time.perf_counter()
            with self._seeded(self.iteration):
                row = self.iterate(self.iteration)
            self.iteration += 1
            done = self.iteration == self.config.iterations
            row = {"iteration": self.iteration, **row, "drift": drift(self.policy.denoiser)}
            row["seconds"] = time.perf_counter() - began
            warn_if_drifted(self.iteration, row["drift"])
            if done or self.iteration % self.config.eval_every == 0:
                row |= self.evaluate()
            self._log(log, row)
            if self.iteration == stop or self.iteration % self.config.save_every == 0:
                self.save(or_warn=self.iteration != stop)
            bar.set_postfix({name: f"{row[name]:.4g}" for name in ("reward/mean", "loss") if name in row})
            bar.update()
        bar.close()

    @contextmanager
    def _seeded(self, iteration: int) -> Iterator[None]:
        """torch's global generators, which somebody else's reward may draw from, follow from the iteration as well."""
        device = self.policy.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence((self.config.seed, iteration)).generate_state(1)[0]))
            yield

    def _open_log(self) -> RunLog:
        settings = {"trainer": type(self).__name__, "value": type(self.value).__name__, **asdict(self.config)}
        return RunLog(self.folder, self.iteration or -1, self.trackers, settings)

    def _log(self, log: RunLog | None, row: dict[str, float]) -> None:
        if log is not None:
            evaluated = any(name.startswith("held_out/") for name in row)
            log.write(row, self._grid_path() if evaluated else None)
            if evaluated:
                plot_curves(read_metrics(log.path), self.folder / "curves.png")

    # -- samples -------------------------------------------------------------------------------------------------------

    def next_prompts(self, count: int) -> list[str]:
        """The next prompts of the endless sequence; the position in it is part of a checkpoint."""
        self.position += count
        return self.prompts.at(self.position - count, count)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditional and, for guidance, null-text encodings, one row per prompt."""
        if self.config.offload_text_encoders:  # the rewards' too, which keep the texts that they have read
            for reward in self._rewards:
                if isinstance(reward, TextConditioned):
                    reward.encode_condition(list(prompts))
                    if reward.text.tower is not None:
                        reward.text.tower.to("cpu")
        scale, options = split_guidance(self.policy, self.config.guidance_scale, 1.0, self.text_options)
        return encode_condition(self.pipe, self.policy, list(prompts), [""] * len(prompts), scale, options)

    def generators(self, iteration: int, rows: Sequence[int]) -> list[torch.Generator]:
        """One per row of an iteration: what is drawn for a row does not depend on where and with whom it is made."""
        return [seeded_generator(self.config.seed, iteration, row) for row in rows]

    def share(self, count: int) -> range:
        """Which of an iteration's rows this process makes."""
        return share_of(self.state, count)

    def batches(self, rows: Sequence[Any], size: int, spare: Any = None) -> Iterator[tuple[list[Any], bool]]:
        """Rows in parts of ``size``, and whether a part counts.

        Where weights are split over the processes, all have to make as many passes. So the last part comes again, or
        ``spare`` where this process has no row, and does not count.
        """
        parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        most = max(self.gather([len(parts)])) if self.sharded else len(parts)
        for number in range(most):
            yield (parts[number], True) if number < len(parts) else ((parts or [[spare]])[-1], False)

    def gather(self, rows: list[Any]) -> list[Any]:
        """One object per row of :meth:`share` -> those of all rows, in order, in all processes."""
        return gather_rows(self.state, rows)

    def merged(self, adapter: str = "default"):
        """The backbone with an adapter's present weights merged in: for passes without a gradient, and the fastest.

        There is one such view; another call changes what it holds.
        """
        self._merged.set_to(adapter)
        return self._merged_backbone

    def autocast(self):
        """The context of trained forward passes."""
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.policy.device.type, torch.bfloat16)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def apply_gradients(self, iteration: int) -> float:
        """Sum the processes' gradients, check and clip them, and make one step of optimiser and moving average.

        So a loss that is a mean over an iteration's rows is, in each process, the sum over its own rows divided by the
        number of all rows. Returns the gradient's norm before clipping.
        """
        parameters = list(self.parameters.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.state.num_processes > 1:
            flat = sum_over(self.state, torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([grad.numel() for grad in grads])
            grads = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm).item()
        if not np.isfinite(norm):
            check_gradients(iteration, self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(parameters)
        self.optimizer_steps += 1
        return norm

    def total(self, **sums: Tensor | float) -> dict[str, float]:
        """Sums over this process's rows -> over all, by name; the same in all processes."""
        values = torch.tensor([float(s) for s in sums.values()], dtype=torch.float64)
        return dict(zip(sums, sum_over(self.state, values.to(self.policy.device)).tolist(), strict=True))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with``, the trained adapter holds the moving average of its weights."""
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Draw ``eval_prompts`` with the averaged weights, by the ODE, always from the same noise; mean of every
        held-out reward. Writes a grid of the first pictures into ``samples/``.
        """
        with self.averaged():
            backbone = self.merged()
        rows = self.share(len(self.eval_prompts))
        sigmas = pipeline_sigmas(self.pipe, self.policy, self.config.eval_steps, self.latent_shape[-2:])
        scores, kept = [], []
        for part, counts in self.batches(rows, self.config.rollout_batch_size, spare=0):
            prompts = tuple(self.eval_prompts[row] for row in part)
            generators = self.generators(EVALUATION, part)
            latents, _ = roll_out(backbone, self.encode(prompts), sigmas, generators, self.latent_shape)
            if not counts:
                continue
            images = self.policy.decode_latents(self.pipe.vae, latents).clamp(0, 1)
            found = {name: score_images(reward, images, prompts).tolist() for name, reward in self.held_out.items()}
            scores += [dict(zip(found, numbers, strict=True)) for numbers in zip(*found.values(), strict=True)]
            kept += [images[k].cpu() for k, row in enumerate(part) if row < GRID]
        scores, kept = self.gather(scores), self.gather(kept)
        means = {f"held_out/{name}": float(np.mean([row[name] for row in scores])) for name in self.held_out}
        check_finite(self.iteration, **means)
        if self.state.is_main_process:
            save_grid(torch.stack(kept), self._grid_path())
        return means

    def _grid_path(self) -> Path:
        return self.folder / "samples" / f"iteration_{self.iteration:06d}.png"

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, or_warn: bool = False) -> None:
        """Write a checkpoint from the main process; ``or_warn`` goes on without it where it cannot be written."""
        error = None
        if self.state.is_main_process:
            state = {
                "run": self.run,
                "adapters": {name: self.adapter_state(name) for name in self.adapters},
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "position": self.position,
                "optimizer_steps": self.optimizer_steps,
            }
            try:
                save_checkpoint(
                    self.folder / "checkpoints", self.iteration, state, self.config.keep_checkpoints, self.export
                )
            except OSError as raised:
                error = str(raised)
        error = from_main(self.state, error)
        if error and not or_warn:
            raise OSError(error)
        if error and self.state.is_main_process:
            warnings.warn(f"{error}; training goes on", stacklevel=2)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """An adapter's weights by name."""
        return {key: parameter.detach() for key, parameter in adapter_parameters(self.policy.denoiser, name).items()}

    def export(self, folder: str | Path) -> None:
        """Write the moving average of the trained adapter as ``pytorch_lora_weights.safetensors``, for
        ``pipe.load_lora_weights(folder)`` of a stock pipeline.
        """
        with self.averaged():
            export_weights(self.pipe, folder)

    @torch.no_grad()
    def _resume(self) -> None:
        state = load_checkpoint(self.folder / "checkpoints", self.run, self.policy.device)
        here = None if state is None else state["iteration"]
        if from_main(self.state, here) != here:
            raise OSError(f"output_dir: {self.folder} is not the same folder for all processes")
        if state is None:
            return
        for name in self.adapters:
            for key, parameter in adapter_parameters(self.policy.denoiser, name).items():
                parameter.copy_(state["adapters"][name][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.iteration, self.position = state["iteration"], state["position"]
        self.optimizer_steps = state["optimizer_steps"]
