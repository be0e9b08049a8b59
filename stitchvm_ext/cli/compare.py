"""``stitchvm compare``."""

from __future__ import annotations

import ast
from pathlib import Path

from .options import BackboneOptions, RewardOptions, SizeOptions, hide_loading_bars, parse_reward, prompts_of

ESTIMATORS = ("stitched", "tweedie")


def compare(
    backbone: BackboneOptions,
    reward: RewardOptions,
    size: SizeOptions,
    methods: tuple[str, ...],
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    value: str | None = None,
    held_out: tuple[str, ...] = (),
    out: Path = Path("stitchvm-compare"),
    steps: int = 28,
    guidance_scale: float = 7.0,
    images_per_prompt: int = 1,
    prompts_per_batch: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
) -> None:
    """The same prompts and seeds through several methods: rewards, evaluations, time, memory, pictures side by side.

    Prints a table and writes compare.json, compare.png and grid.png. Interrupted, the same command goes on.

    Args:
        methods: each METHOD, METHOD:NAME=VALUE,... or METHOD@ESTIMATOR:NAME=VALUE,..., such as unguided
            dps:strength=0.2 fk:num_particles=4,num_proposals=2 fk@tweedie:num_particles=4 best_of_n:num_particles=4;
            the estimator is stitched (default) or tweedie, the names are options of the method, "transition" or
            "num_inference_steps".
        reward: the target: scores finished pictures, and is what tweedie follows.
        prompt: texts, one or several.
        prompts: instead of these a file: a text per line, or .jsonl lines with "prompt", "seed" and "negative_prompt".
        value: folder of the stitched value model, or owner/name on the Hub.
        held_out: rewards that nobody follows, each KIND, KIND=PATH or KIND=PATH,NAME=OPTION, kinds as for --reward.
        out: folder for the results.
        steps: sampling steps.
        guidance_scale: classifier-free guidance, 1 for none; of FLUX the distilled guidance.
        images_per_prompt: pictures per text; from two on their diversity is measured.
        prompts_per_batch: texts that are sampled together.
        batch_size: latents that go through the networks together; all of a batch by default.
        seed: of the first picture.
    """
    from ..evaluation.compare import Contender
    from ..evaluation.compare import compare as run
    from ..playground.experiments import checker_measures
    from ..value import StitchedValue, TweedieValue

    parsed = [parse_method(text) for text in methods]
    texts = prompts_of(prompt, prompts)
    judges = {_judge_name(text): parse_reward(text) for text in held_out}
    if len(judges) < len(held_out):
        raise ValueError(f"held_out: expected rewards of different kinds or file names, got {list(held_out)}")
    if value is None and any(estimator == "stitched" for _, estimator, _ in parsed):
        raise ValueError("value: expected a value model for methods with the stitched estimator, got None")
    hide_loading_bars()
    scorer, pipe = reward.load(backbone.torch_device), backbone.load()
    rewards = {"reward": scorer}
    rewards |= {name: judge.load(scorer.device) for name, judge in judges.items()}
    estimators = {None: None, "tweedie": TweedieValue(pipe, scorer)}
    if value is not None:
        estimators["stitched"] = StitchedValue.from_pretrained(value, pipe)
    contenders = [
        Contender(text, estimators[estimator], options | ({} if options["method"] == "dps" else {"reward": scorer}))
        for text, (_, estimator, options) in zip(methods, parsed, strict=True)
    ]
    found = run(
        pipe,
        contenders,
        texts,
        rewards,
        images_per_prompt=images_per_prompt,
        prompts_per_batch=prompts_per_batch,
        seed=seed,
        measures=checker_measures if backbone.backbone == "playground" else None,
        work_dir=out / "work",
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=size.height,
        width=size.width,
        batch_size=batch_size,
    )
    found.save(out)
    print(f"\n{found.table()}\n\nwrote compare.json, compare.png and grid.png into {out}")


def _judge_name(text: str) -> str:
    """A heading: the kind, and of a path the last part."""
    kind, _, path = text.partition(",")[0].partition("=")
    return f"held-out {kind} {Path(path).name}".rstrip()


def parse_method(text: str) -> tuple[str, str | None, dict]:
    """The name, the estimator's (None where no value is asked) and the options of guided_sample in a text."""
    head, _, tail = text.partition(":")
    name, _, estimator = head.partition("@")
    options: dict = {"method": "dps" if name == "unguided" else name}
    for item in _items(tail):
        key, found, literal = item.partition("=")
        if not found:
            raise ValueError(f"methods: expected NAME=VALUE in {text!r}, got {item!r}")
        try:
            options[key] = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            options[key] = literal
    if estimator and estimator not in ESTIMATORS:
        raise ValueError(f"methods: expected one of {list(ESTIMATORS)} after @ in {text!r}, got {estimator!r}")
    own = {k: v for k, v in options.items() if k not in ("method", "transition", "num_inference_steps")}
    if name == "unguided":
        if estimator or own:
            raise ValueError(f"methods: expected no estimator and no options of a method in {text!r}")
        return name, None, options
    from ..sampling.methods import make_options

    make_options(name, own)
    if name == "best_of_n" and "keep" not in own:
        return name, estimator or None, options  # the reward chooses, no value is asked
    return name, estimator or "stitched", options


def _items(text: str) -> list[str]:
    """Parts between commas that no bracket encloses."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return [item for item in items if item]
