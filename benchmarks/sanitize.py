"""Every CUDA kernel once on small, odd shapes: what compute-sanitizer watches (see gpu.sh)."""

from __future__ import annotations

import torch
from bench_ops import all_cases, backward_call, forward_call, parser

args = parser().parse_args(["--device", "cuda", "--side", "3", "--backbones", "sd3.5-medium", "flux.1-dev"])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in all_cases(args, dtype):
        forward_call(case.fused, case)()
        if case.differentiate:
            backward_call(case.fused, case)()
torch.cuda.synchronize()
print("every kernel ran")
