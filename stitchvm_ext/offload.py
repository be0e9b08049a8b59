"""Weights that accelerate or diffusers keep off the device between their uses: model, sequential and group offloading.

Their hooks move weights when a module is called as a whole. Here is what a partial pass, which calls only some modules,
has to do for them, and what a backward pass needs, which calls none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# The names under which diffusers registers its hooks.
GROUP_HOOK = "group_offloading"
PREFETCH_HOOK = "lazy_prefetch_group_offloading"


def _diffusers_hook(module: nn.Module, name: str) -> Any | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def hooked_device(module: nn.Module) -> torch.device | None:
    """The device on which the hooks of this very module have it computed; None without such hooks."""
    group = _diffusers_hook(module, GROUP_HOOK)
    if group is not None:
        return _indexed(group.config.onload_device)
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "execution_device", None) is not None:
            return _indexed(part.execution_device)
    return None


def offload_device(module: nn.Module) -> torch.device | None:
    """The device on which an offloaded module is computed; None if its weights stay where they are."""
    for part in module.modules():
        device = hooked_device(part)
        if device is not None or part._parameters:
            return device  # whatever the scheme, the owner of the first parameter or a parent of it has a hook
    return None


def is_offloaded(module: nn.Module) -> bool:
    return offload_device(module) is not None


def is_split(module: nn.Module) -> bool:
    """Whether the module's parts are moved one by one (sequential and group offloading), and not the module as one."""
    return is_offloaded(module) and any(hooked_device(part) for part in module.modules() if part is not module)


def _indexed(device) -> torch.device:
    """With the number that a tensor's device has: "cuda" as "cuda:0"."""
    return torch.empty(0, device=device).device


def offload_text_encoders(pipe, device: torch.device) -> None:
    """Have accelerate keep a pipeline's text encoders on the host and send their layers to ``device`` one by one.

    Those that have hooks already stay as they are. Raises ImportError without accelerate.
    """
    from accelerate import cpu_offload

    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(encoder, nn.Module) and not is_offloaded(encoder):
            cpu_offload(encoder.to("cpu"), device)


@contextmanager
def partial_pass(module: nn.Module, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Around a pass through parts of ``module`` that does not call it: its own hooks run, as a call would run them.

    Args:
        blocks: the module's first blocks, where the pass ends after them. What offloading has fetched for a later one
            goes back.
    """
    hook, group = getattr(module, "_hf_hook", None), _diffusers_hook(module, GROUP_HOOK)
    lazy = _diffusers_hook(module, PREFETCH_HOOK)
    known = len(lazy.execution_order) if lazy is not None else 0
    try:
        if hook is not None:
            hook.pre_forward(module)
        if group is not None:
            group.pre_forward(module)
        yield
    finally:
        if lazy is not None:  # it learns the order of modules from whole passes
            del lazy.execution_order[known:]
        for ahead in _fetched_ahead(blocks):
            ahead.offload_()
        if group is not None:
            group.post_forward(module, None)
        if hook is not None:
            hook.post_forward(module, None)


def _fetched_ahead(blocks: Sequence[nn.Module]) -> list[Any]:
    """Groups on the device after a pass that ended with these blocks: cut in two by the end, or prefetched."""
    groups = []
    for block in blocks:
        hook = _diffusers_hook(block, GROUP_HOOK)
        if hook is None:
            continue
        if hook.group.offload_leader not in blocks:
            groups.append(hook.group)
        if block is blocks[-1] and hook.next_group is not None:
            groups.append(hook.next_group)
    return list(dict.fromkeys(groups))


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Around a pass in which these blocks, and with them their hooks, do not run."""
    hooks = [hook for block in blocks if (hook := _diffusers_hook(block, GROUP_HOOK)) is not None]
    groups = list(dict.fromkeys(hook.group for hook in hooks))
    for group in groups:  # one that a skipped block fetches for a later one, which also puts it back
        if group.onload_leader in blocks and group.offload_leader not in blocks:
            group.onload_()
    try:
        yield
    finally:
        for group in groups:
            if group.stream is not None and group.offload_leader in blocks:  # prefetched all the same
                group.offload_()


_weights_leave: ContextVar[bool] = ContextVar("weights_leave", default=False)


def weights_leave() -> bool:
    """Whether a backward written by hand would not find the weights of the pass that runs now."""
    return _weights_leave.get()


@contextmanager
def kept_for_backward(module: nn.Module, *, alone: bool = False) -> Iterator[None]:
    """A forward pass of an offloaded module whose weights may have left before its backward pass comes: autograd keeps
    on the device those that it needs.

    Args:
        alone: no other module of the pipeline is called in between; a model that is moved as one then stays.
    """
    if not (torch.is_grad_enabled() and is_offloaded(module)) or (alone and not is_split(module)):
        yield
        return
    token = _weights_leave.set(True)
    try:
        # An alias: what offloading does to a parameter does not reach it.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            yield
    finally:
        _weights_leave.reset(token)
