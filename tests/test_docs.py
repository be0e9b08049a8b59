"""The documentation: every example runs, every command line is accepted, every public name is described."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import tyro
from PIL import Image

import stitchvm_ext
from stitchvm_ext.cli.commands import COMMANDS
from stitchvm_ext.cli.options import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("the documentation is not beside these tests", allow_module_level=True)

PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's blocks in a language, each with the number of its first line."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def run_blocks(page: Path, names: dict, examples: list[tuple[int, str]]) -> None:
    for line, code in examples:
        exec(compile("\n" * line + code, str(page), "exec"), names)  # tracebacks name the page and its line


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.fixture
def names():
    """What the start page defines for all pages, freshly made."""
    names: dict = {"__name__": "docs"}
    run_blocks(DOCS / "index.md", names, blocks(DOCS / "index.md", "python")[:1])
    names["pipe"].set_progress_bar_config(disable=True)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", named([p for p in PAGES if blocks(p, "python")]))
def test_examples_run(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, names, blocks(page, "python"))


class Modular:
    """A modular pipeline of the playground's parts; a modular pipeline has no default for its text's length."""

    def __init__(self, pipe):
        blocks = pytest.importorskip("diffusers.modular_pipelines").StableDiffusion3AutoBlocks()
        self.pipeline = blocks.init_pipeline()
        parts = {k: v for k, v in pipe.components.items() if v is not None and k in self.pipeline._component_specs}
        self.pipeline.update_components(**parts)
        self.update_components = self.pipeline.update_components

    def __call__(self, **options):
        return self.pipeline(max_sequence_length=0, **options)


@pytest.mark.slow
def test_the_readmes_examples_run(names, tmp_path, monkeypatch):
    """As they are written, on the playground: its reward stands in for published weights, and training is short.

    But for those that train a generator.
    """
    monkeypatch.chdir(tmp_path)
    pipe, reward, stitch = names["pipe"], names["reward"], stitchvm_ext.stitch
    aesthetic = names["playground"].load_reward("aesthetic")
    config = stitchvm_ext.FinetuneConfig(epochs=1, batch_size=8)
    short = {"size": 64, "probe_images": 8, "depth": 1, "layer": 1, "config": config, "progress": False}
    monkeypatch.setattr(stitchvm_ext, "stitch", lambda *a, **options: stitch(*a, **options | short), raising=False)
    monkeypatch.setattr(stitchvm_ext.OpenClipReward, "from_pretrained", lambda *a, **options: reward)
    (tmp_path / "shards").mkdir()
    for number in range(100):
        with tarfile.open(tmp_path / "shards" / f"{number:03d}.tar", "w") as shard:
            picture = io.BytesIO()
            Image.fromarray(names["pictures"][number % 64].image).save(picture, "png")
            entry = tarfile.TarInfo(f"{number:03d}.png")
            entry.size = picture.tell()
            shard.addfile(entry, io.BytesIO(picture.getvalue()))
    names |= {
        "images": names["images"][:24], "aesthetic_reward": aesthetic, "clip_reward": reward,
        "modular": Modular(pipe), "sigmas": [1.0, 0.5], "pooled_prompt_embeds": pipe.encode_prompt("a", "a", "a")[2],
    }  # fmt: skip
    examples = blocks(ROOT / "README.md", "python")
    training = [(line, code) for line, code in examples if "NFTConfig" in code]  # docs/training.md runs the like, small
    assert len(training) <= 2
    run_blocks(ROOT / "README.md", names, [example for example in examples if example not in training])


def command_lines() -> list:
    """Every command line of the site, the README and the contributor's guide."""
    found = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for _, block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if words:
                        found.append(pytest.param(words, id=f"{page.name}: {' '.join(words[:3])}"))
    return found


def stub(command):
    """The same options, and nothing done."""

    @functools.wraps(command)
    def accept(**options):
        return options

    return accept


def parse(words: list[str]) -> dict:
    """What `stitchvm` makes of its words. SystemExit where it does not take them."""
    with registry():
        return tyro.extras.subcommand_cli_from_dict(
            {name: stub(command) for name, command in COMMANDS.items()},
            args=words, config=(tyro.conf.OmitSubcommandPrefixes,),
        )  # fmt: skip


@pytest.mark.parametrize("words", command_lines())
def test_command_lines_are_accepted(words):
    program = next((k for k, word in enumerate(words) if word in ("stitchvm", "stitchvm_ext.cli")), None)
    if program is not None:
        assert isinstance(parse(words[program + 1 :]), dict)
    for word in words:
        if word.endswith((".py", ".sh")) and "/" in word:
            assert (ROOT / word).is_file(), word


def test_a_wrong_command_line_is_refused():
    with pytest.raises(SystemExit):
        parse(["sample", "--backbone", "playground", "--strenght", "1"])


def test_every_public_name_is_in_the_api():
    described = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    for name in stitchvm_ext.__all__:
        if name != "__version__":
            target = getattr(stitchvm_ext, name)
            assert f"{target.__module__}.{target.__qualname__}" in described, name
    for path in described:
        module, name = path.rsplit(".", 1)
        assert getattr(importlib.import_module(module), name).__doc__, path


@pytest.fixture
def numbers():
    spec = importlib.util.spec_from_file_location("numbers_page", DOCS / "numbers_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_page_has_every_result_and_its_figures(numbers, tmp_path):
    text = numbers.page()
    results = sorted(numbers.RESULTS.glob("*.json"))
    for path in results:
        assert f"`{path.name}`" in text
        assert path.stem in numbers.SECTIONS or numbers.is_of_suite(json.loads(path.read_text())), path.name
    assert set(numbers.SECTIONS) <= {path.stem for path in results}
    result = json.loads((numbers.RESULTS / "guidance.json").read_text())
    result["comparison"]["unguided"]["reward"] = 0.12345
    (tmp_path / "guidance.json").write_text(json.dumps(result))
    assert "0.769" in text and "| unguided | 0.123 |" in numbers.page(tmp_path)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "guided_sample" in (tmp_path / "api" / "index.html").read_text()
    assert "Tweedie-DPS" in (tmp_path / "numbers" / "index.html").read_text()
    assert "When does stitching pay" in (tmp_path / "report" / "index.html").read_text()
