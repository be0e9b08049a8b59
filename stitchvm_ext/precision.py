"""Which precision a machine is fast in."""

import torch


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, and float32 on a CPU without instructions for it: PyTorch's convolutions in bfloat16 are orders
    of magnitude slower there.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32
