"""Files of tensors: whole under their temporary name, or not there."""

from __future__ import annotations

import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from stitchvm_ext.tensor_files import write_partial


def test_the_caller_renames_what_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    write_partial(path, {"w": torch.arange(6.0).view(2, 3).T}, {"digest": "1"}).replace(path)
    assert torch.equal(load_file(path)["w"], torch.arange(6.0).view(2, 3).T)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the one before")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors could not be written"):
            write_partial(path, {"w": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [path]
