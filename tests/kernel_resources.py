"""Registers, stack, spills and static shared memory of every CUDA kernel, as ptxas reports them.

python -m tests.kernel_resources            compiles csrc/cuda/*.cu and prints them; needs nvcc and torch's headers
python -m tests.kernel_resources --write    also writes kernel_resources.json, which test_build.py compares with
python -m tests.kernel_resources --keep F   also leaves the cubins in folder F
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.setup_script import ROOT, load_setup

RECORD = Path(__file__).with_suffix(".json")
ARCHS = ("sm_80", "sm_90")

# kernel -> architecture -> registers, stack, spilled, shared; all but the registers in bytes
Resources = dict[str, dict[str, dict[str, int]]]


def nvcc() -> Path:
    return load_setup().find_toolkit() / "bin" / "nvcc"


def nvcc_release() -> str:
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", version).group(1)


def demangle(symbols: list[str]) -> list[str]:
    """Kernel names as in the source, with their template arguments."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [re.fullmatch(r"(?:void )?(?:stitchvm::)?(.*?)\(.*\)", line).group(1) for line in done.stdout.split("\n")]


def read_report(report: str) -> dict[str, dict[str, int]]:
    """The report of ptxas -v for one architecture: kernel -> resources."""
    entries = re.split(r"Compiling entry function '(\w+)'.*\n", report)[1:]
    resources = {}
    for symbol, text in zip(demangle(entries[::2]), entries[1::2], strict=True):
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill st.*, (\d+) bytes", text).groups()
        shared = re.search(r"(\d+) bytes smem", text)
        resources[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
            "shared": int(shared.group(1)) if shared else 0,
        }
    return resources


def measure(folder: Path) -> Resources:
    """Compiles every csrc/cuda/*.cu for every architecture, two at a time; the cubins are left in `folder`."""
    flags = [f for f in load_setup().FLAGS["nvcc"] if "fatbin" not in f]
    compiler = nvcc()
    include = f"-I{Path(torch.__file__).parent / 'include'}"

    def compile_one(job: tuple[Path, str]) -> tuple[str, dict[str, dict[str, int]]]:
        source, arch = job
        cubin = folder / f"{source.stem}.{arch}.cubin"
        command = [
            compiler,
            "-std=c++17",
            *flags,
            f"-arch={arch}",
            "-cubin",
            "-Xptxas=-v",
            include,
            source,
            "-o",
            cubin,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
        return arch, read_report(done.stderr)

    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in ARCHS]
    resources: Resources = {}
    with ThreadPoolExecutor(2) as pool:
        for arch, kernels in pool.map(compile_one, jobs):
            for kernel, used in kernels.items():
                resources.setdefault(kernel, {})[arch] = used
    return dict(sorted(resources.items()))


def differences(resources: Resources, record: dict, release: str) -> list[str]:
    """What is wrong with the resources, one line each; with another nvcc than the recorded one, only spills are."""
    lines = []
    for kernel, archs in resources.items():
        for arch, used in archs.items():
            if used["spilled"]:
                lines.append(f"{kernel}, {arch}: {used['spilled']} bytes of registers are spilled")
    if release != record["nvcc"]:
        return lines
    for kernel in sorted({*resources, *record["kernels"]}):
        now, then = resources.get(kernel), record["kernels"].get(kernel)
        if now is None or then is None:
            lines.append(f"{kernel}: {'there is no such kernel' if now is None else 'is not recorded'}")
            continue
        for arch in ARCHS:
            changed = [
                f"{key} {then[arch][key]} -> {now[arch][key]}" for key in now[arch] if now[arch][key] != then[arch][key]
            ]
            if changed:
                lines.append(f"{kernel}, {arch}: {', '.join(changed)}")
    return lines


def write(resources: Resources, path: Path = RECORD) -> None:
    """One line per kernel, so that a change can be read in a diff."""
    kernels = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(archs)}" for kernel, archs in resources.items())
    path.write_text(f'{{\n  "nvcc": {json.dumps(nvcc_release())},\n  "kernels": {{\n{kernels}\n  }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--keep", type=Path, metavar="F", help="folder for the cubins")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        resources = measure(args.keep or Path(scratch))
    print(f"{'registers/stack/spilled/shared':<50}" + "".join(f"{arch:>20}" for arch in ARCHS))
    for kernel, archs in resources.items():
        print(f"{kernel:<50}" + "".join(f"{'/'.join(map(str, archs[arch].values())):>20}" for arch in ARCHS))
    if args.write:
        write(resources)


if __name__ == "__main__":
    main()
