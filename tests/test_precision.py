import time

import torch
import torch.nn.functional as F

from stitchvm_ext.precision import fast_dtype


def test_gpus_compute_in_bfloat16():
    assert fast_dtype("cuda") == torch.bfloat16


def test_a_cpu_computes_in_a_type_that_it_is_not_slow_in():
    def seconds(dtype: torch.dtype) -> float:
        image, kernel = torch.ones(1, 64, 32, 32, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            F.conv2d(image, kernel, padding=1)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(fast_dtype("cpu")) < 10 * seconds(torch.float32)
