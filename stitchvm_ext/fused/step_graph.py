"""A transformer's forward pass as a CUDA graph: one launch in the place of some two thousand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 3  # passes before the capture, in which libraries choose and allocate


class StepGraph:
    """Stands in for ``transformer.forward``: captures a pass at the first call with new shapes, replays it after.

    Only passes without gradients on a CUDA device, whose arguments are tensors, are captured; others run as they are.
    Hooks inside the transformer run at the capture alone. Weights may change in place; a moved or replaced one needs a
    new graph (``fuse`` again).

    Attributes:
        on_replay: called with the batch size at every replay.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.plain = transformer.forward
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]] = {}
        self.on_replay: Callable[[int], None] | None = None

    def __call__(self, *args, return_dict: bool = True, **kwargs):
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        if args or torch.is_grad_enabled() or not _all_on_cuda(inputs):
            return self.plain(*args, return_dict=return_dict, **kwargs)
        if "forward" in self.transformer.time_text_embed.__dict__:  # a modulation table: its checks cannot be captured
            self.transformer.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        key = (return_dict, *((name, t.shape, t.dtype, t.device) for name, t in sorted(inputs.items())))
        if key not in self.captured:
            self.captured[key] = self._capture(inputs, return_dict)
        graph, static, output = self.captured[key]
        for name, t in inputs.items():
            static[name].copy_(t)
        graph.replay()
        if self.on_replay is not None:
            self.on_replay(len(inputs["hidden_states"]))
        if return_dict:
            return type(output)(sample=output.sample.clone())
        return tuple(t.clone() for t in output)

    def _capture(self, inputs: dict[str, Tensor], return_dict: bool):
        static = {name: t.clone() for name, t in inputs.items()}
        call = lambda: self.plain(**static, return_dict=return_dict)  # noqa: E731
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        return graph, static, output


def _all_on_cuda(inputs: dict[str, Any]) -> bool:
    return all(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs.values())
