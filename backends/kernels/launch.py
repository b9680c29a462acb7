"""A launch of a shipped kernel as an equation of a JAX graph.

JAX's CUDA plugin carries a launcher of PTX, which it has for Pallas and jax-triton: the custom call below, whose
attribute is a compressed protobuf (jaxlib's `triton.proto`): PTX, entry, grid, warps, shared memory and the kinds of
the parameters. Nothing is registered or built here, so a host without a GPU exports too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import jax
from jax import Array

from backends.kernels.library import Capability, CompiledKernel, compiled_kernel, target_for
from backends.kernels.variants import NUMBER, SIZE16, VARIANTS

CUSTOM_CALL = "triton_kernel_call_ffi"
_ALIGNED_BYTES = 16  # what XLA's buffers are at the least aligned to, and the kernels count on
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)


def launch(
    variant: str,
    capability: Capability,
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    arrays: Sequence[Array],
    numbers: Sequence[int | float],
) -> list[Array]:
    """Runs a kernel on `grid` programs; its parameters are `arrays`, `outs` and `numbers`, in this order.

    What a kernel does not write of an output is undefined. Raises ValueError for what is not the variant's.
    """
    kinds = list(VARIANTS[variant].parameters.values())
    count = len(arrays) + len(outs)
    if len(kinds) != count + len(numbers) or any(kind.startswith("*") != (i < count) for i, kind in enumerate(kinds)):
        raise ValueError(f"{variant} takes {kinds}, not {count} arrays and {len(numbers)} numbers")
    for kind, number in zip(kinds[count:], numbers, strict=True):
        if kind == SIZE16 and number % 16:
            raise ValueError(f"{variant} takes multiples of 16, not {number}")
    grid = (*grid, *(1,) * (3 - len(grid)))
    if any(not 0 < size <= most for size, most in zip(grid, _MOST_BLOCKS, strict=True)):
        raise ValueError(f"{variant} cannot be launched on a grid of {grid}")
    kernel = compiled_kernel(variant, target_for(capability))
    call = jax.ffi.ffi_call(CUSTOM_CALL, list(outs), vmap_method=None)
    opaque = zlib.compress(message(kernel, variant, grid, count, kinds[count:], numbers, capability), 9)
    return list(call(*arrays, name=variant, opaque=opaque))


def message(
    kernel: CompiledKernel,
    variant: str,
    grid: tuple[int, ...],
    arrays: int,
    kinds: Sequence[str],
    numbers: Sequence[int | float],
    capability: Capability,
) -> bytes:
    """The launcher's protobuf, `TritonAnyKernelCall`. Triton's entries end in two pointers to scratch memory, which
    none of ours uses: null."""
    parameters = [_field(1, _number(2, _ALIGNED_BYTES))] * arrays
    parameters += [
        _key(7, 5) + struct.pack("<f", number) if kind == NUMBER else _number(3, int(number))
        for kind, number in zip(kinds, numbers, strict=True)
    ]
    parameters += [_number(6, 0)] * 2
    body = _field(1, kernel.entry.encode()) + _number(2, VARIANTS[variant].warps)
    body += _number(3, kernel.shared_bytes) + _field(4, kernel.ptx.encode())
    body += _number(6, capability[0] * 10 + capability[1]) + _number(10, 1)
    call = _field(1, body) + b"".join(_number(2 + axis, size) for axis, size in enumerate(grid))
    call += b"".join(_field(5, parameter) for parameter in parameters)
    return _field(1, call) + _field(4, variant.encode())


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, number: int) -> bytes:
    return _key(field, 0) + _varint(number)


def _field(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content
