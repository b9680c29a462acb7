"""Chips of the tests, with datasheet figures; profiles are not needed here."""

from runtime.pricing import Chip, Link

NVLINK, RDMA = Link(450e9, 1e-6, 8), Link(50e9, 5e-6, 1 << 20)
HOPPER = {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}
CHIPS = {
    "h200-sxm": Chip("h200-sxm", HOPPER, 4.8e12, NVLINK, RDMA),
    "h100-sxm": Chip("h100-sxm", HOPPER, 3.35e12, NVLINK, RDMA),
    "b200-sxm": Chip("b200-sxm", {"bf16": 2250e12, "fp8": 4500e12, "fp4": 9000e12}, 8e12, NVLINK, RDMA),
    "b300-sxm": Chip("b300-sxm", {"bf16": 2250e12, "fp8": 4500e12, "fp4": 14000e12}, 8e12, NVLINK, RDMA),
    "gb200-nvl72": Chip("gb200-nvl72", {"bf16": 2500e12, "fp8": 5000e12, "fp4": 10000e12}, 8e12, NVLINK, RDMA),
    "a100-sxm-80gb": Chip("a100-sxm-80gb", {"bf16": 312e12, "int8": 624e12}, 2.039e12, NVLINK, RDMA),
}
UNMEASURED = Chip("some-npu", {"bf16": 353.9e12, "int8": 707.8e12}, 1.6e12, Link(196e9, 1e-6, 8), RDMA)
