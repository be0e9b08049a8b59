"""What GPUs can do at most, what programs get of it, and how long a counted cost takes in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .count import Cost, Kernel

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A card by its data sheet.

    Attributes:
        tflops: bfloat16 products with float32 accumulation, dense.
        float32, float64: TFLOP/s of products in these.
        bandwidth: TB/s of its memory.
        memory: GB as the card is sold; 1 GB is 2**30 bytes.
    """

    tflops: float
    float32: float
    float64: float
    bandwidth: float
    memory: float


DEVICES: dict[str, Device] = {
    "h200": Device(989, 67, 67, 4.8, 141),
    "h100": Device(989, 67, 67, 3.35, 80),
    "gh200": Device(989, 67, 67, 4.0, 96),
    "b200": Device(2250, 75, 37, 8.0, 180),
    "a100-80gb": Device(312, 19.5, 19.5, 2.04, 80),
    "a100-40gb": Device(312, 19.5, 19.5, 1.56, 40),
    "l40s": Device(362, 91.6, 1.43, 0.864, 48),
    "rtx-5090": Device(209.5, 104.8, 1.64, 1.79, 32),
    "rtx-4090": Device(165.2, 82.6, 1.29, 1.01, 24),
    "rtx-4080": Device(97.5, 48.7, 0.76, 0.717, 16),
    "rtx-3090": Device(71, 35.6, 0.56, 0.936, 24),
    "rtx-3060": Device(25.5, 12.7, 0.2, 0.36, 12),
}
"""Peak rates of the vendors' data sheets."""

# Shares of the data sheet that large products and streaming kernels reach at best: the lower end of a range.
ROOF_FLOPS, ROOF_BANDWIDTH = 0.8, 0.9
# Shares that eager PyTorch is assumed to reach: the upper end. On an H200 600 TFLOP/s in products and 3.4 TB/s;
# attention 400 forward and 300 backward at head dimension 64, 550 and 400 from 128 on.
EAGER_PRODUCT, EAGER_BANDWIDTH = 0.607, 0.708
EAGER_ATTENTION = {("attention", False): 0.404, ("attention", True): 0.556, ("attention backward", False): 0.303,
                   ("attention backward", True): 0.404}  # fmt: skip
EAGER_LAUNCH, EAGER_LAUNCH_BACKWARD = 8e-6, 6e-6  # seconds from one kernel to the next: from Python, and by autograd


class Seconds(NamedTuple):
    """From the roofline up to what eager PyTorch is assumed to reach."""

    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.low * times, self.high * times)


def seconds(cost: Cost, device: Device) -> Seconds:
    """A range for the time that a cost takes.

    Its lower end is the larger of arithmetic and memory traffic, each at the roof, where of the traffic only that of
    products and attention is counted: everything else fused away. Its upper end adds up the kernels, each as long as
    the longest of arithmetic, traffic and launch at eager rates.
    """
    arithmetic = sum(kernel.flops * times / _peak(kernel, device) for kernel, times in cost.kernels.items())
    traffic = cost.product_bytes / (device.bandwidth * 1e12)
    low = max(arithmetic / ROOF_FLOPS, traffic / ROOF_BANDWIDTH)
    return Seconds(low, sum(_eager(kernel, device) * times for kernel, times in cost.kernels.items()))


def _peak(kernel: Kernel, device: Device) -> float:
    rates = {"float64 product": device.float64, "float32 product": device.float32}
    return 1e12 * rates.get(kernel.kind, device.tflops)


def _eager(kernel: Kernel, device: Device) -> float:
    share = EAGER_ATTENTION.get((kernel.kind, kernel.head_dim >= 128), EAGER_PRODUCT)
    return max(
        kernel.flops / (share * _peak(kernel, device)),
        kernel.bytes / (EAGER_BANDWIDTH * device.bandwidth * 1e12),
        EAGER_LAUNCH_BACKWARD if kernel.backward else EAGER_LAUNCH,
    )
