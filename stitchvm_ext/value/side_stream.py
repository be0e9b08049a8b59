"""Run part of a step beside the rest of it, on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def side_stream(device: torch.device) -> Iterator[Callable[..., None]]:
    """Within the ``with``, work on a CUDA device goes to a second stream, after what is queued on the current one.

    Yields ``join``: call it with the results before using them on the current stream. Tensors that are read inside and
    were made outside must stay alive until then. On other devices all this does nothing.
    """
    if device.type != "cuda":
        yield lambda *results: None
        return
    outer, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(outer)

    def join(*results: Tensor) -> None:
        outer.wait_stream(side)
        for result in results:  # so that its memory is not handed out again while the current stream reads it
            result.record_stream(outer)

    with torch.cuda.stream(side):
        yield join
