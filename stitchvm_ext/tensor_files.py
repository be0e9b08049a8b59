"""Files of tensors in the safetensors format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_partial(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors beside ``path``, under a temporary name that the caller renames; returns that one.

    Raises:
        OSError: the file cannot be written, for instance on a full disk; what was written of it is removed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:  # the writer's own error is none of the system's
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error
    return partial
