"""One function per subcommand; its docstring is the help text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..value import FinetuneConfig
from .align import align
from .bench import bench
from .compare import compare
from .methods import MethodOptions
from .options import (
    BackboneName,
    BackboneOptions,
    DeviceName,
    OptionalRewardOptions,
    RewardOptions,
    SizeOptions,
    TowerName,
    hide_loading_bars,
    prompts_of,
)


def info() -> None:
    """Print versions, how the extension was built, and which op has which backend."""
    from ..ops import format_info
    from ..ops import info as ops_info

    print(format_info(ops_info()))


def demo(out: Path = Path("stitchvm-demo"), prompts: int = 12, steps: int = 20, seed: int = 0) -> None:
    """Sample the embedded model unguided, with Tweedie-DPS and with StitchVM-DPS; write pictures, a plot and a table.

    Args:
        out: folder for the results.
        prompts: how many held-out captions to draw.
        steps: sampling steps.
        seed: of the starting noise.
    """
    from ..playground.demo import run_demo

    hide_loading_bars()
    run_demo(out, num_prompts=prompts, num_inference_steps=steps, seed=seed)


def search(
    backbone: BackboneOptions,
    reward: RewardOptions,
    images: str,
    size: SizeOptions,
    out: Path = Path("stitchvm-search"),
    probe_images: int = 200,
    tokens: Literal["fitted", "literal"] = "fitted",
    max_sequence_length: int | None = None,
    seed: int = 0,
) -> None:
    """Where to cut: rate every pair of a backbone depth i and a reward block j in closed form, without training.

    Writes search.json and search.png, and prints the table. `stitchvm train` makes the same search by itself.

    Args:
        images: folder of pictures, which need no labels, or webdataset shards; the first ones are used.
        out: folder for the results.
        probe_images: how many pictures to use.
        tokens: class token and position where j > 1: fitted to the probe images, or the reward's own.
        max_sequence_length: rows of the text encoding (SD3, FLUX); by default the backbone's own.
        seed: of noise levels and noise.
    """
    from ..backbones import backbone_of
    from ..data import as_image_source
    from ..value import search_stitch
    from ..value.stitching import encode_probe

    source = as_image_source(images)
    count = source.count(probe_images)
    if not 8 <= probe_images <= count:
        raise ValueError(f"probe_images: expected 8 to {count}, the pictures in {images}, got {probe_images}")
    scorer, pipe = reward.load(backbone.torch_device), backbone.load()
    adapter = backbone_of(pipe)
    probe, latents = encode_probe(pipe, source.resized(size.pixels(pipe)), probe_images)
    null = adapter.null_condition(pipe, **_text_options(max_sequence_length))
    found = search_stitch(adapter, scorer, latents, probe, null, tokens=tokens, seed=seed)
    found.save(out)
    print(f"\n{found.table()}\n\nwrote search.json and search.png into {out}")


def train(
    backbone: BackboneOptions,
    reward: RewardOptions,
    images: str,
    size: SizeOptions,
    out: Path,
    work_dir: Path | None = None,
    depth: int | None = None,
    layer: int | None = None,
    tokens: Literal["fitted", "literal"] = "fitted",
    probe_images: int = 200,
    max_sequence_length: int | None = None,
    backbone_licence: str | None = None,
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008 (frozen)
) -> None:
    """Stitch a reward onto a backbone: closed-form search, then finetuning on unlabelled pictures.

    Writes the value model: config.json, model.safetensors and README.md, the model card. Interrupted, the same command
    goes on where it stopped. On several GPUs: torchrun --nproc-per-node 8 -m stitchvm_ext.cli train ...

    Args:
        images: folder of pictures, which need no labels, or webdataset shards such as "shards/{000..099}.tar".
        out: folder for the value model.
        work_dir: for the search's table, cached targets and the resumable state; by default OUT with ".work" behind.
        depth: backbone blocks kept, i; 0 for the baseline without the backbone; by default the search's pick.
        layer: reward block entered, j; by default the search's pick.
        tokens: class token and position where j > 1: fitted to the probe images, or the reward's own.
        probe_images: pictures for the search alone, the first ones.
        max_sequence_length: rows of the text encoding (SD3, FLUX); by default the backbone's own.
        backbone_licence: of the pipeline's weights, for the model card.
        config: the finetuning.
    """
    from ..data import as_image_source
    from ..value import stitch
    from ..value.processes import processes

    source = as_image_source(images)
    scorer, pipe = reward.load(backbone.torch_device), backbone.load()
    value = stitch(
        pipe,
        scorer,
        source,
        size=size.pixels(pipe),
        depth=depth,
        layer=layer,
        tokens=tokens,
        work_dir=work_dir or out.with_name(out.name + ".work"),
        probe_images=probe_images,
        config=config,
        text_options=_text_options(max_sequence_length),
        backbone_licence=backbone_licence,
    )
    if not processes(pipe.device).is_main_process:
        return
    value.save_pretrained(out)
    print(f"wrote the value model of depth {value.depth} and layer {value.layer} into {out}")


def evaluate(
    backbone: BackboneOptions,
    reward: OptionalRewardOptions,
    value: tuple[str, ...],
    annotations: Path,
    images: Path,
    format: Literal["coco", "hpdv2", "ava"],
    out: Path = Path("stitchvm-eval"),
    tweedie: bool = False,
    sigmas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9),
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    write_card: bool = False,
) -> None:
    """How well do value models read noisy pictures? Accuracy by noise level against people and the clean reward.

    Prints a table and writes accuracy.json and accuracy.png. Data: "coco" is MSCOCO captions (retrieval R@1), "hpdv2"
    HPDv2's test.json or train.json (preference accuracy), "ava" AVA.txt (rank correlation with mean ratings).

    Args:
        value: folders of value models, or owner/name on the Hub; several are compared on the same noise.
        annotations: the annotation file, such as captions_val2017.json, test.json or AVA.txt.
        images: the folder that its pictures are in.
        format: of the annotations.
        out: folder for the results.
        tweedie: also measure the one-step baseline, which denoises, decodes and asks the reward.
        sigmas: noise levels between 0 and 1.
        limit: use about the first LIMIT pictures.
        batch_size: pictures at a time.
        seed: of the noise.
        write_card: add the result to config.json and the model card of every value, which must be folders.
    """
    from ..evaluation import evaluate_noise_levels, read_evaluation_set
    from ..value import StitchedValue, TweedieValue
    from ..value.folder import add_details

    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if tweedie and reward.reward is None:
        raise ValueError("tweedie: expected a reward to ask, give --reward")
    if write_card and (remote := [name for name in value if not Path(name).is_dir()]):
        raise ValueError(f"write_card: expected folders, got {', '.join(remote)}")
    data = read_evaluation_set(format, annotations, images)
    data = data if limit is None else data.head(limit)
    scorer, pipe = reward.load(backbone.torch_device), backbone.load()
    short = {name: Path(name).name for name in value}
    labels = short if len(set(short.values())) == len(short) else {name: name for name in value}
    estimators = {labels[name]: StitchedValue.from_pretrained(name, pipe) for name in value}
    if tweedie:
        estimators["Tweedie"] = TweedieValue(pipe, scorer)
    report = evaluate_noise_levels(
        pipe, estimators, data, reward=scorer, sigmas=sigmas, batch_size=batch_size, seed=seed
    )
    report.save(out)
    print(f"\n{report.table()}\n\nwrote accuracy.json and accuracy.png into {out}")
    if write_card:
        for name in value:
            add_details(Path(name), "accuracy by noise level", {report.data: report.card_entry(labels[name])})
            print(f"wrote the model card of {name}")


def sample(
    backbone: BackboneOptions,
    size: SizeOptions,
    method: MethodOptions,
    reward: OptionalRewardOptions,
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    value: str | None = None,
    out: Path = Path("stitchvm-samples"),
    negative_prompt: str = "",
    steps: int = 28,
    guidance_scale: float = 7.0,
    transition: Literal["ode", "linear_sde", "flow_grpo"] | None = None,
    images_per_prompt: int = 1,
    images_per_batch: int = 8,
    num_frames: int = 1,
    batch_size: int | None = None,
    memory: Literal["normal", "low"] = "normal",
    seed: int = 0,
) -> None:
    """Sample pictures under a value model. Writes 00000.png, 00001.png, ..., samples.jsonl and settings.json.

    samples.jsonl has a line per picture: its prompt and seed, its values V(z_t) by step, its rewards and what it cost.
    Interrupted, the same command goes on where it stopped. On several GPUs: torchrun --nproc-per-node 8 -m
    stitchvm_ext.cli sample ...

    Args:
        reward: the clean reward, of finished pictures, for methods that choose or weigh by it; by default the value at
            noise level 0.
        prompt: texts, one or several.
        prompts: instead of these a file: a text per line, or .jsonl lines with "prompt", "seed" and "negative_prompt",
            of which the last two may be left out.
        value: folder of a value model, or owner/name on the Hub; without one, or with --dps.strength 0, the pipeline
            samples plainly.
        out: folder for the pictures.
        negative_prompt: of prompts without one of their own. With the empty one the value shares the unconditional
            branch's blocks.
        steps: sampling steps.
        guidance_scale: classifier-free guidance, 1 for none; of FLUX the distilled guidance.
        transition: "ode", or one of the stochastic ones; by default what suits the method.
        images_per_prompt: pictures per text.
        images_per_batch: pictures that are sampled together, each of as many latents as the method has particles.
        num_frames: of video models; frames become pictures of their own, 00000_000.png and so on.
        batch_size: latents that go through the networks together; all of a batch by default.
        memory: "low" moves to the host, or computes twice, what a small device has no room for.
        seed: of the first picture; every further one has the next.
    """
    from ..sampling import sample_prompts
    from ..value import StitchedValue
    from ..value.processes import processes

    options = method.options()
    texts = prompts_of(prompt, prompts)
    pipe = backbone.load()
    rows = sample_prompts(
        pipe,
        None if value is None else StitchedValue.from_pretrained(value, pipe),
        texts,
        out,
        images_per_prompt=images_per_prompt,
        images_per_batch=images_per_batch,
        seed=seed,
        negative_prompt=negative_prompt,
        method=method.method,
        reward=reward.load(backbone.torch_device),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        transition=transition,
        height=size.height,
        width=size.width,
        num_frames=num_frames,
        batch_size=batch_size,
        memory=memory,
        **options,
    )
    if processes(pipe.device).is_main_process:
        print(f"wrote {len(rows)} samples, samples.jsonl and settings.json into {out}")


def plan(
    backbone: BackboneName,
    reward: tuple[TowerName, ...],
    method: Literal["dps", "fk", "nft", "draft"] = "dps",
    resolution: int | None = None,
    device: DeviceName = "h200",
    depth: int = 4,
    layer: int = 1,
    steps: int | None = None,
    batch: int | None = None,
    particles: int = 4,
    proposals: int = 2,
    images: int = 100_000,
    epochs: int = 5,
    json: bool = False,
    plot: Path | None = None,
) -> None:
    """What would it cost? FLOPs, memory and a range of times, predicted in seconds, without a GPU or a download.

    Prints the plain pipeline or the published method, its Tweedie baselines and the stitched value at each memory
    level; what it costs to make the value; and which cards fit with which preset.

    Args:
        backbone: the pipeline.
        reward: one or several, which share the backbone's prefix.
        method: gradient guidance, particles, or an iteration of DiffusionNFT or DRaFT.
        resolution: side of the square pictures; by default 1024 for sampling and 512 for training.
        device: the card that the times are for.
        depth: backbone blocks kept, i.
        layer: reward block entered, j.
        steps: of the schedule; by default 100 for dps, 40 or 28 for fk, 25 for nft, 10 for draft.
        batch: pictures in one pass; by default 1, for nft 8.
        particles: N of fk.
        proposals: M of fk.
        images: pictures for the finetuning.
        epochs: of the finetuning.
        json: print JSON instead of tables.
        plot: write a plot into this PNG file.
    """
    from ..plan import plan as predict

    predicted = predict(
        backbone,
        reward,
        method,
        resolution=resolution,
        device=device,
        depth=depth,
        layer=layer,
        steps=steps,
        batch=batch,
        particles=particles,
        proposals=proposals,
        images=images,
        epochs=epochs,
    )
    if plot is not None:
        predicted.plot(plot)
    print(predicted.to_json() if json else predicted.table())


def _text_options(max_sequence_length: int | None) -> dict[str, int]:
    return {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}


COMMANDS = {
    "demo": demo,
    "search": search,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "compare": compare,
    "align": align,
    "plan": plan,
    "bench": bench,
    "info": info,
}
