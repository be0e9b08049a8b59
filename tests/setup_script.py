"""setup.py as a module, for its flags and its decisions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_setup() -> ModuleType:
    """A fresh copy; it builds only when run. pybind11, which only a build needs, may be missing."""
    spec = importlib.util.spec_from_file_location("stitchvm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    meanwhile = {spec.name: module}
    if importlib.util.find_spec("pybind11") is None:
        meanwhile["pybind11"] = ModuleType("pybind11")
    sys.modules.update(meanwhile)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in meanwhile:
            del sys.modules[name]
    return module
