"""What is published: the files of the source archive and of the wheel, the extras, and a wheel at work."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from stitchvm_ext._version import __version__
from stitchvm_ext.ops import _loader
from tests.setup_script import ROOT

NOT_SOURCES = (".git", ".venv", "build", "dist", "site", "*.egg-info", "shared", ".*_cache", "stitchvm-demo")
WEIGHTS = {".json", ".safetensors", ".txt", ".md"}
# What the package imports under another name than its distribution's, or through a dependency.
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open_clip_torch"}
THROUGH = {"timm": "open_clip_torch", "huggingface_hub": "diffusers", "tokenizers": "transformers"}

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("the sources are not beside these tests", allow_module_level=True)


def can_build() -> bool:
    version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    return int(version.split(".")[0]) >= 77 and importlib.util.find_spec("pybind11") is not None


needs_setuptools = pytest.mark.skipif(not can_build(), reason="needs setuptools 77 and pybind11")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The source tree as developers have it: with a library built in place, and with caches."""
    tree = tmp_path_factory.mktemp("sources") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    (tree / "stitchvm_ext" / "_C.stray.so").touch()
    for folder in ("stitchvm_ext/ops", "tests/ops", "docs"):
        (tree / folder / "__pycache__").mkdir(exist_ok=True)
        (tree / folder / "__pycache__" / "stray.cpython-310.pyc").touch()
    return tree


def setup(tree: Path, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, words)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(sources) -> Path:
    """A wheel with the library that is loaded here, which spares compiling it."""
    if not _loader.library_c.loaded:
        pytest.skip(f"no library to put into a wheel: {_loader.library_c.reason}")
    library = Path(_loader.library_c.path)
    code = "import sysconfig; print(f'lib.{sysconfig.get_platform()}-{__import__(\"sys\").implementation.cache_tag}')"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    built = sources / "build" / name
    setup(sources, "build_py", "--build-lib", built)
    shutil.copy(library, built / "stitchvm_ext")
    setup(sources, "bdist_wheel", "--skip-build", "--dist-dir", sources / "dist")
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


def below(folder: Path, *suffixes: str) -> set[str]:
    """Files of the source tree, relative to it."""
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT).as_posix() for p in found if not suffixes or p.suffix in suffixes}


@needs_setuptools
def test_the_wheel_holds_the_package_the_weights_and_the_library(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    info = f"stitchvm_ext-{__version__}.dist-info"
    package = {name for name in files if not name.startswith(f"{info}/")}
    weights = below(ROOT / "stitchvm_ext" / "playground" / "weights", *WEIGHTS)
    library = f"stitchvm_ext/{Path(_loader.library_c.path).name}"
    assert len(weights) > 10
    assert package == below(ROOT / "stitchvm_ext", ".py") | weights | {library}
    names = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert {name.removeprefix(f"{info}/") for name in files - package} == names
    assert wheel.name.endswith(f"{sys.platform}_{os.uname().machine}.whl")  # no "any": it holds machine code


@needs_setuptools
def test_the_source_archive_holds_all_that_builds_tests_and_documents(sources):
    setup(sources, "sdist", "--dist-dir", sources / "dist")
    (archive,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {m.name.split("/", 1)[1] for m in opened.getmembers() if m.isfile()}
    expected = below(ROOT / "csrc") | below(ROOT / "stitchvm_ext", ".py") | below(ROOT / "tests", ".py", ".json")
    expected |= below(ROOT / "stitchvm_ext" / "playground" / "weights", *WEIGHTS)
    expected |= below(ROOT / "docs") | below(ROOT / "python", ".py") | below(ROOT / "benchmarks")
    expected |= {
        "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff",
        "CMakeLists.txt", "mkdocs.yml", ".clang-format",
    }  # fmt: skip
    made = {name for name in files if name.startswith("stitchvm_ext.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert files - made == expected


@pytest.mark.slow
@needs_setuptools
def test_the_wheel_works_in_a_fresh_environment_without_a_compiler(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    env = {"PATH": str(environment / "bin"), "HOME": str(tmp_path)}  # no compiler, and nothing of this environment

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert shutil.which("cc", path=env["PATH"]) is None and shutil.which("nvcc", path=env["PATH"]) is None
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = [path for path in site.getsitepackages() if Path(path).is_dir()]  # the dependencies, behind its own
    (Path(packages) / "dependencies.pth").write_text("\n".join(lent) + "\n")

    assert __version__ in run(environment / "bin" / "stitchvm", "info")
    script = (
        "import torch, stitchvm_ext\n"
        "from stitchvm_ext import ops, playground\n"
        f"assert stitchvm_ext.__file__.startswith({str(environment)!r}), stitchvm_ext.__file__\n"
        "assert ops.info()['libraries']['_C']['loaded']\n"
        "x, s = torch.randn(2, 6, 8), torch.randn(2, 8)\n"
        "torch.testing.assert_close(ops.adaln(x, s, s, backend='cpu'), ops.adaln(x, s, s, backend='reference'))\n"
        "pipe = playground.load_pipeline()\n"
        "value = playground.load_value(pipe)\n"
        "result = stitchvm_ext.guided_sample(pipe, value, 'a red circle', num_inference_steps=2, progress=False)\n"
        "print(result.images[0].size)\n"
    )
    assert run(python, "-c", script).strip().endswith("(64, 64)")


def requirements() -> dict[str, set[str]]:
    """Names of distributions by extra; those that everybody gets under ""."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is newer than this Python")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {re.match(r"[\w.-]+", entry)[0] for entry in entries} for extra, entries in lists.items()}


def test_what_the_package_imports_is_required_by_it_or_by_an_extra():
    named = requirements()
    required = named[""] | named["data"] | named["training"]
    imported = set()
    for path in (ROOT / "stitchvm_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"stitchvm_ext"}
    assert {DISTRIBUTIONS.get(name, THROUGH.get(name, name)) for name in foreign} <= required


def test_the_package_imports_without_the_extras():
    """Nothing of an extra is imported by the public names and the command."""
    named = requirements()
    extras = sorted((named["data"] | named["training"]) - named[""])
    code = (
        "import sys, stitchvm_ext, stitchvm_ext.cli.commands\n"
        "for name in stitchvm_ext.__all__: getattr(stitchvm_ext, name)\n"
    )
    for name in extras:  # as if they were not installed
        code = f"import sys; sys.modules[{name.replace('-', '_')!r}] = None\n" + code
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_the_workflow_runs_what_ci_runs():
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.is_file():
        pytest.skip("the workflow is no part of the source archive")
    assert re.search(r"^\s+(?:- )?run: \.ci/run$", workflow.read_text(), re.MULTILINE)
