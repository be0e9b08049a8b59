"""Muon (Jordan et al. 2024) for hidden matrices and convolution kernels, AdamW for everything else.

``torch.optim.Muon`` takes matrices only and orthogonalises them one by one; here convolution kernels are flattened to
[out, in·kh·kw] and all tensors of one shape are orthogonalised in one batched call, which is what makes it cheap on a
CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def step_seed(seed: int, *position: int) -> int:
    """A seed for one step of a run, so that a resumed run draws what an uninterrupted one would have drawn."""
    return int(np.random.SeedSequence((seed, *position)).generate_state(1)[0])


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on a batch of matrices [K, m, n]: about the nearest orthogonal matrix of each."""
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.transpose(1, 2) if tall else x


class Muon:
    """Muon with AdamW beside it, one learning-rate multiplier for both.

    Args:
        model: every trainable parameter of it is optimised.
        lr: rate of the orthogonalised updates, scaled to AdamW's root-mean-square (0.2·sqrt(max(m, n))).
        lr_adam: rate of AdamW for vectors and for parameters whose name contains a word of ``adam_names``.
        compute_dtype: dtype of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        lr_adam: float,
        weight_decay: float,
        adam_names: tuple[str, ...] = (),
        momentum: float = 0.95,
        compute_dtype: torch.dtype = torch.float32,
    ):
        self.lr, self.lr_adam, self.weight_decay = lr, lr_adam, weight_decay
        self.momentum, self.compute_dtype = momentum, compute_dtype
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        vectors = []
        for name, p in model.named_parameters():
            if p.ndim in (2, 4) and not any(word in name for word in adam_names):
                self.groups.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
            else:
                vectors.append(p)
        self.buffers = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(vectors, lr=lr_adam, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, multiplier: float) -> None:
        """One update with both rates times ``multiplier``; gradients are cleared."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr_adam * multiplier
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        lr = self.lr * multiplier
        for shape, params in self.groups.items():
            grads = torch.stack(
                [p.grad.reshape(shape) if p.grad is not None else torch.zeros(shape, device=p.device) for p in params]
            )
            buffer = self.buffers[shape].lerp_(grads, 1 - self.momentum)
            updates = orthogonalize(grads.lerp(buffer, self.momentum).to(self.compute_dtype)).to(grads.dtype)
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            torch._foreach_add_(
                params,
                [u.reshape(p.shape) for u, p in zip(updates, params, strict=True)],
                alpha=-0.2 * max(shape) ** 0.5 * lr,
            )
            for p in params:
                p.grad = None

    def state_dict(self) -> dict:
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for shape, buffer in state["buffers"].items():
            self.buffers[shape].copy_(buffer)
        self.adam.load_state_dict(state["adam"])
