"""What is built, what is loaded, and which op has which backend: the content of `stitchvm info`."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from .._version import __version__
from . import _loader
from .activation import KERNELS as ACTIVATION
from .guidance_step import KERNELS as GUIDANCE_STEP
from .qk_norm import KERNELS as QK_NORM
from .resample_tokens import KERNELS as RESAMPLE_TOKENS
from .residual_norm import KERNELS as RESIDUAL_NORM

# The compiled ops, by the name that all their files carry; and the public functions that each one serves.
OPS = {
    "activation": ACTIVATION,
    "guidance_step": GUIDANCE_STEP,
    "qk_norm": QK_NORM,
    "resample_tokens": RESAMPLE_TOKENS,
    "residual_norm": RESIDUAL_NORM,
}
FUNCTIONS = {
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
    "guidance_step": ("guidance_step",),
    "qk_norm": ("qk_norm",),
    "resample_tokens": ("resample_tokens",),
    "residual_norm": ("adaln", "gated_residual", "gated_residual_adaln", "layer_norm"),
}


def info() -> dict[str, Any]:
    """The state of the library as plain values (JSON-serialisable).

    Returns:
        version, python, torch, cuda (of torch, or None), gpus (names of the visible ones);
        build: versions, compiler, CUDA architectures and the account of the build's decision, or None without _C;
        cpu: features of this processor, compiled levels and the one in use, threads, or None without _C;
        libraries: for _C and _cuda, whether each is loaded and the reason if not;
        ops: op -> backend -> the dtypes it takes, or why it is not available ("no: ..."); and the public functions that
            it serves.
    """
    c = _loader.C
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "build": _loader.BUILD,
        "cpu": None
        if c is None
        else {
            "features": c.cpu_features(),
            "levels": c.compiled_cpu_levels(),
            "level": c.cpu_level(),
            "threads": torch.get_num_threads(),
        },
        "libraries": {lib.name: asdict(lib) for lib in (_loader.library_c, _loader.library_cuda)},
        "ops": {name: {**_backends(OPS[name]), "functions": ", ".join(FUNCTIONS[name])} for name in OPS},
    }


def _backends(kernels: dict[str, tuple[torch.dtype, ...]]) -> dict[str, str]:
    row = {"reference": "any dtype, any device"}
    for backend, library in (("cpu", _loader.library_c), ("cuda", _loader.library_cuda)):
        row[backend] = _loader.dtype_names(kernels[backend]) if library.loaded else f"no: {library.name} is not loaded"
    return row


def format_info(state: dict[str, Any]) -> str:
    """`info()` as lines of text."""
    cuda = f"CUDA {state['cuda']}" if state["cuda"] else "no CUDA"
    lines = [
        f"stitchvm_ext {state['version']}, Python {state['python']}, torch {state['torch']} ({cuda})",
        f"GPUs       {', '.join(state['gpus']) or 'none visible'}",
    ]
    build = state["build"]
    if build is None:
        lines.append("build      no compiled library: every op runs on the plain PyTorch reference")
    else:
        built = f"{build['version']} with torch {build['torch']} (runs on {build['torch_target']} or newer)"
        lines += [f"build      {build['account']}", f"           {built}, {build['compiler']}"]
    if state["cpu"] is not None:
        cpu = state["cpu"]
        lines += [
            f"CPU        {cpu['level']} kernels of {', '.join(cpu['levels'])}; {cpu['threads']} threads",
            f"           this processor has {' '.join(cpu['features']) or 'no listed feature'}",
        ]
    for name, library in state["libraries"].items():
        lines.append(f"{name:<10} {'loaded' if library['loaded'] else 'not loaded: ' + library['reason']}")
    return "\n".join([*lines, "", *_table(state["ops"])])


def _table(ops: dict[str, dict[str, str]]) -> list[str]:
    columns = [*_loader.BACKENDS, "functions"]
    header = ["op", *columns]
    rows = [header, *([name, *(row[column] for column in columns)] for name, row in ops.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
