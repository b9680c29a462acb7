"""Which ops run by kernels of our own, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from backends.kernels import attention, products, selection
from backends.kernels.forms import FORMS
from backends.kernels.library import Capability
from backends.kernels.lowering import KernelLowering
from model.ops import OPS

KERNELS: Mapping[str, KernelLowering] = MappingProxyType(
    {each.op: each for each in (*products.LOWERINGS, *attention.LOWERINGS, *selection.LOWERINGS)}
)
_FUSED = "XLA fuses it with what is before or after it"
WITHOUT: Mapping[str, str] = MappingProxyType({
    "glm.embed": "a gather, which XLA has",
    "glm.rms_norm": f"{_FUSED}; a kernel would keep it from the sum before it",
    "glm.layer_norm": _FUSED,
    "glm.head_linear": "a batched product in bfloat16, which XLA's libraries have",
    "glm.bias": _FUSED,
    "glm.swiglu": _FUSED,
    "glm.rope": _FUSED,
    "glm.cache_write": "a scatter into the donated cache, which XLA does in place; of one row an update",
})  # fmt: skip


def lowerings(capability: Capability) -> dict[str, Callable[..., Any]]:
    """The ops that have kernels, for a compute capability, and those that XLA is given in another form."""
    return {**FORMS, **{name: kernel.at(capability) for name, kernel in KERNELS.items()}}


def notes() -> dict[str, str]:
    """For every op of the contract: what its kernels serve, or why it has none."""
    return {
        name: f"kernel: {KERNELS[name].serves}" if name in KERNELS else f"decomposition: {WITHOUT[name]}"
        for name in OPS
    }
