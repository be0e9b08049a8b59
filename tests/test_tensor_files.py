"""Files of tensors: whole under their temporary name, or not there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from stitchvm_ext.tensor_files import write_partial
from tests.programs import file_limit


def test_the_caller_renames_what_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    write_partial(path, {"w": torch.arange(6.0).view(2, 3).T}, {"digest": "1"}).replace(path)
    assert torch.equal(load_file(path)["w"], torch.arange(6.0).view(2, 3).T)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the one before")
    with file_limit(1000), pytest.raises(OSError, match="model.safetensors could not be written"):
        write_partial(path, {"w": torch.zeros(1000)})
    assert path.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [path]
