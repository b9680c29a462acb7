"""What a lowering by our own kernels is, and what all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backends.kernels.forms import FORMS
from backends.kernels.library import Capability
from model.formats import E4M3
from model.ops import OPS

PROGRAMS = 264
"""How many programs a launch should have at least, so that no multiprocessor waits: two for each of an H200's 132."""
MOST_SPLITS = 64


@dataclasses.dataclass(frozen=True)
class KernelLowering:
    """An op's kernels. serves: which calls they take, in words. why_not: of a call's operands and attributes, why they
    do not take it, or None. lower: the call by launches, of a capability, operands and attributes."""

    op: str
    serves: str
    why_not: Callable[..., str | None]
    lower: Callable[..., Any]

    def at(self, capability: Capability) -> Callable[..., Any]:
        """The op for a compute capability: by kernels, or as XLA runs it where they do not take the call."""
        other = FORMS.get(self.op, OPS[self.op].meaning)

        def call(*operands: Array, **attributes: Any) -> Any:
            if self.why_not(*operands, **attributes):
                return other(*operands, **attributes)
            return self.lower(capability, *operands, **attributes)

        return call


def blocks(size: int, each: int) -> int:
    """How many blocks of `each` hold `size`."""
    return -(-size // each)


def splits(programs: int, steps: int) -> int:
    """Into how many parts to cut work of `steps` steps a program, so that `programs` become enough; a part has four
    steps at the least."""
    return max(1, min(MOST_SPLITS, blocks(PROGRAMS, programs), steps // 4))


def out(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def not_bfloat16(**operands: Array) -> str | None:
    """Why not, where an operand is no bfloat16."""
    other = [f"{name} in {value.dtype}" for name, value in operands.items() if value.dtype != jnp.bfloat16]
    return f"{', '.join(other)}: kernels are for bfloat16" if other else None


def is_fp8(matrix: tuple[Array, ...]) -> bool:
    """Whether a matrix is FP8 values with float32 scales."""
    return len(matrix) == 2 and matrix[0].dtype == E4M3 and matrix[1].dtype == jnp.float32
