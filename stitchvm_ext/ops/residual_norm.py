"""Gated residual and (adaptive) layer norm: what stands between the matrix products of a transformer block.

One compiled op, `residual_norm`, adds up to two gated branches to the residual stream and normalises the sum under up
to two modulations. `adaln`, `gated_residual`, `gated_residual_adaln` and `layer_norm` are its checked faces.
`residual_norm` and `residual_norm_input_grad` here are the bare op and its gradient, for hand-written backward passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, check_like, check_tokens, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adaptive layer norm: y = LayerNorm(x) * (1 + scale) + shift (DiT, arXiv:2212.09748, adaLN).

    With scale2 and shift2 the same normalised x is modulated a second time, as in the blocks of SD3.5 medium.

    The compiled kernels read x once from memory, compute in float32 (float64 for float64) and round once. They
    differentiate for x alone: where a scale or shift requires grad, the reference runs instead, which differentiates
    for all.

    Args:
        x: [B, N, C], floating point. Non-contiguous tensors are copied.
        scale: [B, C], or [1, C] to share one row over the batch; dtype and device of x. With `rows`, a table [R, C]. A
            chunk of a wider tensor is read in place.
        shift: like scale.
        scale2, shift2: like scale; both or neither.
        eps: added to the variance; finite, >= 0.
        rows: int64 [B] on the device of x: sample b uses row rows[b] of each table, e.g. the row of its time step. A
            row outside the table raises on the CPU and stops the kernel on CUDA.
        backend: "reference", "cpu" or "cuda"; None takes the kernel for x's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        y, [B, N, C], contiguous, dtype of x; or (y, y2) with scale2.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, a row, eps or backend does not fit, or backend is a kernel and a scale or shift
            requires grad.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    _check("adaln", x, {}, _norm_tables(scale, shift, scale2, shift2), rows, eps)
    _, y, y2 = _run("adaln", backend, x, None, None, None, None, scale, shift, scale2, shift2, rows, False, eps)
    return y if y2 is None else (y, y2)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    branch2: Tensor | None = None,
    gate2: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + gate * branch + gate2 * branch2: the residual of a transformer block (DiT, arXiv:2212.09748, adaLN-Zero).

    Args:
        x: [B, N, C], floating point. Non-contiguous tensors are copied.
        branch: shape, dtype and device of x.
        gate: [B, C] or [1, C], or with `rows` a table [R, C]; None for 1. The kernels do not differentiate for it.
        branch2, gate2: a second branch and its gate; gate2 needs branch2.
        rows: int64 [B], as in `adaln`; needs a gate.
        backend: as in `adaln`.

    Returns:
        [B, N, C], contiguous, dtype of x; the sum is rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: as in `adaln`.
    """
    branches = {"branch": branch} if branch2 is None else {"branch": branch, "branch2": branch2}
    _check("gated_residual", x, branches, _gate_tables("gated_residual", gate, branch2, gate2), rows, 0.0)
    args = (x, branch, gate, branch2, gate2, None, None, None, None, rows, False, 0.0)
    return _run("gated_residual", backend, *args)[0]


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    branch2: Tensor | None = None,
    gate2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """residual = x + gate * branch + gate2 * branch2 and y = LayerNorm(residual) * (1 + scale) + shift, in one pass.

    The end of one half of a diffusion transformer's block and the start of the next. The norm is that of the rounded
    residual, as if the two ran one after the other.

    Args:
        x: [B, N, C], floating point. Non-contiguous tensors are copied.
        branch: shape, dtype and device of x.
        gate: [B, C] or [1, C], or with `rows` a table [R, C]; None for 1.
        scale, shift: like gate, as in `adaln`; not None.
        branch2, gate2: a second branch and its gate; gate2 needs branch2.
        scale2, shift2: a second modulation of the same norm; both or neither.
        eps, rows, backend: as in `adaln`.

    Returns:
        (residual, y), or (residual, y, y2) with scale2; each [B, N, C], contiguous, dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as in `adaln`.
    """
    op = "gated_residual_adaln"
    branches = {"branch": branch} if branch2 is None else {"branch": branch, "branch2": branch2}
    tables = _gate_tables(op, gate, branch2, gate2) | _norm_tables(scale, shift, scale2, shift2)
    _check(op, x, branches, tables, rows, eps)
    results = _run(op, backend, x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, False, eps)
    return results if scale2 is not None else results[:2]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x) * weight + bias over the last dimension (arXiv:1607.06450), after adding a branch if one is given.

    The compiled kernels differentiate for x and residual alone: where weight, bias or gate requires grad, the
    reference runs instead.

    Args:
        x: [B, N, C] or [B, C], floating point. Non-contiguous tensors are copied.
        weight: [C]; dtype and device of x. Without a weight, `adaln` with zeros is the plain norm.
        bias: [C], or None for none.
        residual: the branch to add first; shape, dtype and device of x.
        gate: [B, C] or [1, C], multiplies residual; None for 1. Needs residual.
        eps: added to the variance; finite, >= 0.
        backend: as in `adaln`.

    Returns:
        y, shape and dtype of x, contiguous; or with residual (x + gate * residual, y).

    Raises:
        TypeError, ValueError, RuntimeError: as in `adaln`.
    """
    op = "layer_norm"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x: expected a tensor, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x: expected shape [B, N, C] or [B, C], got {shape_of(x)}")
    for name, t in (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias)):
        check_like(op, name, t, x)
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name}: expected shape [{x.shape[-1]}], got {shape_of(t)}")
    if residual is None and gate is not None:
        raise ValueError(f"{op}: gate: expected None without residual, got shape {shape_of(gate)}")
    if residual is not None:
        _check_shape(op, "residual", residual, x)
    flat = x.dim() == 2
    if flat:
        x = x[:, None]
        residual = None if residual is None else residual[:, None]
    _check(op, x, {}, {} if gate is None else {"gate": gate}, None, eps)
    bias = None if bias is None else bias[None]
    args = (x, residual, gate, None, None, weight[None], bias, None, None, None, True, eps)
    total, y, _ = _run(op, backend, *args)
    if flat:
        y = y[:, 0]
        total = None if total is None else total[:, 0]
    return y if total is None else (total, y)


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch2: Tensor | None = None,
    gate2: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    rows: Tensor | None = None,
    affine: bool = False,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Results:
    """The op itself: (residual, y, y2) as `reference.residual_norm` defines them.

    Shapes are checked in the kernels alone (RuntimeError), which keeps a call cheap. Chooses its backend, and falls
    back to the reference for gradients of gates, scales and shifts, as the faces do.

    Returns:
        (residual, y, y2), each [B, N, C] or None: residual without a branch, y without a scale, y2 without a scale2.
    """
    args = (x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, affine, eps)
    return _run("residual_norm", backend, *args)


def residual_norm_input_grad(
    grad_residual: Tensor | None = None,
    grad_y: Tensor | None = None,
    grad_y2: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate2: Tensor | None = None,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    rows: Tensor | None = None,
    affine: bool = False,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Results:
    """Gradients of `residual_norm` for x and its branches, as `reference.residual_norm_input_grad` defines them.

    Args:
        grad_residual, grad_y, grad_y2: gradients of the results, [B, N, C]; at least one. grad_y needs scale and
            residual, grad_y2 needs scale2 and residual.
        residual: the result of that name; x where the forward had no branch.
        gate, gate2, scale, scale2, rows, affine, eps: those of the forward. A gate is needed only where the gradient
            of its branch is wanted.
        backend: as in `adaln`.

    Returns:
        (grad_x, grad_branch, grad_branch2): grad_x is None without grad_y and grad_y2 (it is grad_residual then), a
        branch's gradient is None without its gate (it is that of x then).
    """
    like = grad_residual if grad_residual is not None else grad_y if grad_y is not None else grad_y2
    if like is None:
        raise ValueError("residual_norm_input_grad: expected grad_residual, grad_y or grad_y2, got None for each")
    args = (grad_residual, grad_y, grad_y2, residual, gate, gate2, scale, scale2, rows, affine, eps)
    chosen = _loader.choose_backend("residual_norm_input_grad", like, backend, KERNELS)
    if rows is not None:
        _check_rows("residual_norm_input_grad", rows, (gate, gate2, scale, scale2))
    if chosen == "reference":
        return reference.residual_norm_input_grad(*args)
    grad_x, grad_branch, grad_branch2 = _loader.op("residual_norm_input_grad", chosen).default(*args)
    norm = grad_y is not None or grad_y2 is not None
    return (
        grad_x if norm else None,
        grad_branch if gate is not None else None,
        grad_branch2 if gate2 is not None else None,
    )


def _run(op: str, backend: str | None, *args: Any) -> Results:
    """Chooses the backend and calls it with the op's arguments; absent results are None."""
    x, branch, gate, _, gate2, scale, shift, scale2, shift2, rows, *_ = args
    chosen = _loader.choose_backend(op, x, backend, KERNELS)
    if rows is not None:
        _check_rows(op, rows, (gate, gate2, scale, shift, scale2, shift2))
    if chosen != "reference" and torch.is_grad_enabled():
        tables = {"gate": gate, "gate2": gate2, "scale": scale, "shift": shift, "scale2": scale2, "shift2": shift2}
        for name, t in tables.items():
            if t is None or not t.requires_grad:
                continue
            if backend is not None:
                name = {"scale": "weight", "shift": "bias"}.get(name, name) if op == "layer_norm" else name
                raise ValueError(
                    f"{op}: backend {backend!r} gives gradients of activations alone, but {name} requires grad; "
                    "expected backend=None or 'reference'"
                )
            chosen = "reference"
    if chosen == "reference":
        return reference.residual_norm(*args)
    residual, y, y2 = _loader.op("residual_norm", chosen).default(*args)
    return (
        residual if branch is not None else None,
        y if scale is not None else None,
        y2 if scale2 is not None else None,
    )


def _norm_tables(scale: Any, shift: Any, scale2: Any, shift2: Any) -> dict[str, Any]:
    tables = {"scale": scale, "shift": shift}
    if scale2 is not None or shift2 is not None:
        tables |= {"scale2": scale2, "shift2": shift2}
    return tables


def _gate_tables(op: str, gate: Any, branch2: Any, gate2: Any) -> dict[str, Any]:
    if gate2 is not None and branch2 is None:
        raise ValueError(f"{op}: gate2: expected None without branch2, got {type(gate2).__name__}")
    return {name: t for name, t in (("gate", gate), ("gate2", gate2)) if t is not None}


def _check_shape(op: str, name: str, t: Tensor, x: Tensor) -> None:
    check_like(op, name, t, x)
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name}: expected the shape of x, {shape_of(x)}, got {shape_of(t)}")


def _check(
    op: str, x: Tensor, branches: dict[str, Tensor], tables: dict[str, Tensor], rows: Tensor | None, eps: float
) -> None:
    check_tokens(op, x)
    batch, _, channels = x.shape
    for name, t in branches.items():
        _check_shape(op, name, t, x)
    for name, t in tables.items():
        check_like(op, name, t, x)
        if t.dim() == 2 and t.shape[1] == channels and (rows is not None or t.shape[0] in (batch, 1)):
            continue
        expected = f"[{batch}, {channels}] or [1, {channels}]" if rows is None else f"[R, {channels}]"
        raise ValueError(f"{op}: {name}: expected shape {expected}, got {shape_of(t)}")
    if rows is not None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"{op}: rows: expected a tensor, got {type(rows).__name__}")
        if rows.dtype != torch.int64:
            raise TypeError(f"{op}: rows: expected torch.int64, got {rows.dtype}")
        if rows.device != x.device:
            raise ValueError(f"{op}: rows: expected the device of x, {x.device}, got {rows.device}")
        if rows.shape != (batch,):
            raise ValueError(f"{op}: rows: expected shape [{batch}], got {shape_of(rows)}")
        if not tables:
            raise ValueError(f"{op}: rows: expected None without a gate, got shape {shape_of(rows)}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps: expected a finite number >= 0, got {eps}")


def _check_rows(op: str, rows: Tensor, tables: tuple[Tensor | None, ...]) -> None:
    """Rows of CPU tensors lie inside every table. Looking would stall CUDA, where the kernel traps instead."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    size = min((t.shape[0] for t in tables if t is not None), default=None)
    for row in rows.tolist() if size is not None else ():
        if not 0 <= row < size:
            raise ValueError(f"{op}: rows: expected rows in [0, {size}), the rows of the smallest table, got {row}")


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).residual_norm_input_grad.default

    def result(like: Tensor, wanted: bool) -> Tensor:
        return like.new_empty(like.shape if wanted else 0)

    @torch.library.register_fake(f"{namespace}::residual_norm")
    def _(x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, affine, eps):
        return tuple(result(x, t is not None) for t in (branch, scale, scale2))

    @torch.library.register_fake(f"{namespace}::residual_norm_input_grad")
    def _(grad_residual, grad_y, grad_y2, residual, gate, gate2, scale, scale2, rows, affine, eps):
        like = next(t for t in (grad_residual, grad_y, grad_y2) if t is not None)
        norm = grad_y is not None or grad_y2 is not None
        return result(like, norm), result(like, gate is not None), result(like, gate2 is not None)

    def setup_context(ctx, inputs, output):
        x, branch, gate, _, gate2, scale, _, scale2, _, rows, ctx.affine, ctx.eps = inputs
        residual = x if branch is None else output[0]
        ctx.save_for_backward(None if scale is None else residual, gate, gate2, scale, scale2, rows)
        ctx.present = tuple(t is not None for t in (branch, scale, scale2))
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        # An absent result is an empty tensor, for which a gradient may come too.
        grad_residual, grad_y, grad_y2 = (g if here else None for g, here in zip(grads, ctx.present, strict=True))
        needs = ctx.needs_input_grad
        if any(needs[i] for i in (2, 4, 5, 6, 7, 8)):
            raise RuntimeError(
                "residual_norm: the kernel gives gradients of activations alone; call the functions of "
                "stitchvm_ext.ops instead"
            )
        if grad_residual is None and grad_y is None and grad_y2 is None:
            return (None,) * 12
        residual, gate, gate2, scale, scale2, rows = ctx.saved_tensors
        gate = gate if needs[1] else None
        gate2 = gate2 if needs[3] else None
        norm = grad_y is not None or grad_y2 is not None
        grad_x, grad_branch, grad_branch2 = grad_residual, None, None
        if norm or gate is not None or gate2 is not None:
            tables = (gate, gate2, scale, scale2, rows)
            result = input_grad(grad_residual, grad_y, grad_y2, residual, *tables, ctx.affine, ctx.eps)
            grad_x = result[0] if norm else grad_residual
            grad_branch, grad_branch2 = result[1:]
        return (
            grad_x,
            (grad_x if gate is None else grad_branch) if needs[1] else None,
            None,
            (grad_x if gate2 is None else grad_branch2) if needs[3] else None,
            *(None,) * 8,
        )

    torch.library.register_autograd(f"{namespace}::residual_norm", backward, setup_context=setup_context)

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="residual_norm"))

    torch.library.register_autograd(f"{namespace}::residual_norm_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
