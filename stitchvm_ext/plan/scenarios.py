"""What each method runs: pipelines, baselines and stitched values composed of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..fused.function import MEMORY_LEVELS
from .count import Cost, nested
from .pieces import Pieces

TRAINED_SHARE = 0.99  # of its timesteps DiffusionNFT trains each sample on int(0.99 T), as its official code does


@dataclass(frozen=True)
class Scenario:
    """One way to do the same thing.

    Attributes:
        name: what it is.
        group: "plain", "tweedie" or "stitched".
        cost: of all steps together.
        steps: how many there are.
        once: what follows after the last step (the decoding of the result).
        weights: bytes that are resident, text encoders aside.
        offered: as a way to make it fit on a card; others are there to compare with.
    """

    name: str
    group: str
    cost: Cost
    steps: float
    weights: int
    once: Cost
    offered: bool = True

    @property
    def total(self) -> Cost:
        return self.cost + self.once

    @property
    def activations(self) -> int:
        return max(self.cost.peak, self.once.peak)


class Scenarios:
    """The scenarios of one combination of models. Weights of a baseline are those of the pipeline and the rewards."""

    def __init__(self, pieces: Pieces, batch: int):
        self.p, self.batch = pieces, batch
        self.plain_weights = pieces.denoiser_bytes + pieces.vae_bytes
        self.tweedie_weights = self.plain_weights + pieces.rewards_bytes
        self.stitched_weights = self.plain_weights + pieces.value_bytes
        self.free = pieces.architecture.classifier_free

    def branches(self) -> Cost:
        """The denoiser's pass of a plain step: both branches in one call, where there are two."""
        return self.p.denoise(self.batch * (2 if self.free else 1))

    # -- gradient guidance ---------------------------------------------------------------------------------------------

    def dps(self, steps: int) -> list[Scenario]:
        """A guided step: its velocity and the gradient of the value."""
        decode = self.p.rewards.decode(self.batch)
        found = [Scenario("plain", "plain", self.branches() * steps, steps, self.plain_weights, decode)]

        def add(name: str, group: str, cost: Cost, weights: int, offered: bool = True) -> None:
            found.append(Scenario(name, group, cost * steps, steps, weights, decode, offered))

        for checkpoint in (False, True):
            for cond_only in (False, True) if self.free else (False,):
                name = "Tweedie" + ", conditional branch alone" * cond_only + ", checkpointed" * checkpoint
                add(name, "tweedie", self.tweedie(checkpoint, cond_only), self.tweedie_weights)
        add("stitched, own prefix, as published", "stitched", self.own_prefix(None), self.stitched_weights, False)
        for memory in MEMORY_LEVELS:
            add(f"stitched, own prefix, {memory}", "stitched", self.own_prefix(memory), self.stitched_weights)
        which = "prefix shared" if self.free else "prefix shared (value on the prompt)"
        for memory in MEMORY_LEVELS:
            add(f"stitched, {which}, {memory}", "stitched", self.shared(memory), self.stitched_weights)
        return found

    def tweedie(self, checkpoint: bool, cond_only: bool) -> Cost:
        """r(D(z - t u)) and its gradient, through both branches or the conditional one."""
        rewarded = self.p.rewards.decode_reward(self.batch, grad=True, checkpoint=checkpoint)
        if cond_only:
            differentiated = self.p.denoise_input_grad(self.batch, checkpoint=checkpoint)
            return self.p.denoise(self.batch) + nested(differentiated, rewarded)
        both = self.batch * (2 if self.free else 1)
        return nested(self.p.denoise_input_grad(both, checkpoint=checkpoint), rewarded)

    def own_prefix(self, memory: str | None) -> Cost:
        """A plain step, then prefix, stitch and suffix, forward and backward."""
        return self.branches() + self.value_grad(memory)

    def value_grad(self, memory: str | None) -> Cost:
        prefix = self.p.prefix(self.batch, grad=True, memory=memory)
        return nested(prefix, self.p.rewards.suffix(self.batch, grad=True, memory=memory))

    def shared(self, memory: str) -> Cost:
        """A step whose one branch serves the value too; the other branch runs before the prefix' backward."""
        inner = self.p.rewards.suffix(self.batch, grad=True, memory=memory)
        if self.free:
            inner = inner + self.p.denoise(self.batch, fused=True)
        return nested(self.p.shared_prefix(self.batch, memory), inner)

    # -- particles -----------------------------------------------------------------------------------------------------

    def fk(self, steps: int, particles: int, proposals: int) -> list[Scenario]:
        """A trajectory of N particles, which run one after the other; M proposals each on the early steps.

        A proposal that is kept has been denoised when the next step begins: its Tweedie estimate costs decoder and
        rewards only, and where the prefix is shared its stitched value costs the suffix only.
        """
        p, n, m = self.p, particles, proposals
        proposing = int(0.4 * steps)  # the early ones; resampling every 4 steps between 20% and 80% (METHOD.md §5)
        events = (round(0.8 * steps) - round(0.2 * steps)) // 4 + 1
        decode = p.rewards.decode(self.batch) * n
        base = self.branches() * (steps * n)
        reuse, suffix = p.rewards.decode_reward(self.batch), p.rewards.suffix(self.batch)
        fresh, stitched = self.branches() + reuse, p.prefix(self.batch) + suffix
        ours = p.prefix(self.batch, memory="save") + p.rewards.suffix(self.batch, memory="save")
        rejected, kept, at_events = n * (m - 1) * proposing, n * proposing, n * events
        again = suffix if self.free else stitched
        extra: list[tuple[str, str, Cost | None, int]] = [
            (f"{n} plain trajectories", "plain", None, self.plain_weights),
            ("FK, Tweedie", "tweedie", reuse * at_events, self.tweedie_weights),
            ("FK, Tweedie, denoiser run for it", "tweedie", fresh * at_events, self.tweedie_weights),
            (f"FK, Tweedie, {m} proposals", "tweedie", fresh * rejected + reuse * (kept + at_events),
             self.tweedie_weights),
            (f"FK, stitched, {m} proposals, own prefix, as published", "stitched",
             stitched * (rejected + kept + at_events), self.stitched_weights),
            (f"FK, stitched, {m} proposals, own prefix", "stitched", ours * (rejected + kept + at_events),
             self.stitched_weights),
        ]  # fmt: skip
        if self.free:
            extra.append(
                (f"FK, stitched, {m} proposals, prefix shared with the next step", "stitched",
                 stitched * rejected + again * (kept + at_events), self.stitched_weights)
            )  # fmt: skip
        return [
            Scenario(name, group, base if cost is None else base + cost, steps, weights, decode)
            for name, group, cost, weights in extra
        ]

    # -- training ------------------------------------------------------------------------------------------------------

    def nft(self, steps: int) -> list[Scenario]:
        """An iteration of DiffusionNFT on one batch, without classifier-free guidance.

        Every sample is trained on int(0.99 T) timesteps, each with a pass of the old adapter, one of the reference and
        the trained one. A rollout that stops at step τ can be trained on the timesteps above it alone.
        """
        p, b = self.p, self.batch
        old, merged = p.denoise(b, lora=True), p.denoise(b)
        value, ours = p.prefix(b) + p.rewards.suffix(b), p.prefix(b, memory="save") + p.rewards.suffix(b, memory="save")
        stops = round(0.48 * steps), round(0.68 * steps)  # 12..17 of 25
        mean = sum(stops) / 2

        def iteration(stop: float, unmerged: bool, reward: Cost, checkpoint: bool = False) -> Cost:
            rollout = old if unmerged else merged
            trained = rollout + merged + p.train(b, checkpoint=checkpoint)
            return rollout * stop + reward + trained * int(TRAINED_SHARE * stop)

        judged = p.rewards.decode_reward(b)
        official, stitched = self.tweedie_weights, self.stitched_weights
        rows: list[tuple[str, str, Cost, int]] = [
            ("DiffusionNFT", "tweedie", iteration(steps, True, judged), official),
            ("DiffusionNFT, checkpointed", "tweedie", iteration(steps, True, judged, True), official),
            (f"stitched, stops at {mean:g}", "stitched", iteration(mean, True, value), stitched),
            (f"stitched, stops at {mean:g}, LoRA merged where it is not trained", "stitched",
             iteration(mean, False, ours), stitched),
            (f"stitched, stops at {mean:g}, LoRA merged, checkpointed", "stitched",
             iteration(mean, False, ours, True), stitched),
        ]  # fmt: skip
        earliest_and_latest = [
            (f"stitched, stops at {stop}", "stitched", iteration(stop, True, value), stitched) for stop in stops
        ]
        return [*self._iterations(rows), *self._iterations(earliest_and_latest, offered=False)]

    def draft(self, steps: int) -> list[Scenario]:
        """An iteration of DRaFT on one batch, without classifier-free guidance: a rollout, the gradient through its
        last steps, and for each of these a pass of the frozen model for the regulariser.
        """
        p, b = self.p, self.batch
        roll, frozen = p.denoise(b, lora=True), p.denoise(b)
        mean = (round(0.3 * steps) + round(0.7 * steps)) / 2  # 3..7 of 10

        def iteration(done: float, trained: int, judged: Cost, checkpoint: bool) -> Cost:
            step = p.train(b, checkpoint=checkpoint)
            chain = step * trained
            chain.peak, chain.kept = step.peak + (trained - 1) * step.kept, trained * step.kept
            return roll * (done - trained) + frozen * trained + nested(chain, judged)

        rows = []
        for checkpoint in (False, True):
            judged = p.rewards.decode_reward(b, grad=True, checkpoint=checkpoint)
            for k in (1, 3):
                name = f"DRaFT-{k}" + ", checkpointed" * checkpoint
                rows.append((name, "tweedie", iteration(steps, k, judged, checkpoint), self.tweedie_weights))
        for memory, checkpoint in (("save", False), ("recompute", False), ("recompute", True)):
            name = f"stitched, stops at {mean:g}, {memory}" + ", checkpointed" * checkpoint
            cost = iteration(mean, 1, self.value_grad(memory), checkpoint)
            rows.append((name, "stitched", cost, self.stitched_weights))
        return self._iterations(rows)

    def _iterations(self, rows: Sequence[tuple[str, str, Cost, int]], offered: bool = True) -> list[Scenario]:
        return [Scenario(name, group, cost, 1, weights, Cost(), offered) for name, group, cost, weights in rows]
