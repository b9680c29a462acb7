"""Whether a call of a torch_npu operator is one that its documentation has: types, ranks and enumerations.

torch_npu's Meta kernels find what results a call has, and look at few of its arguments. This looks at the others, by
`npu_operators.toml`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend.constraints import ACTIVATIONS
from backends.ascend.declare import SCALAR_TYPES
from backends.ascend.operators import npu_release


def refusal(
    name: str, args: Sequence[Any], attributes: Mapping[str, Any], also: frozenset[str] = frozenset()
) -> str | None:
    """Why a call of a recorded operator is not as documented; None where it is. also: types that pass for those of 16
    bits."""
    operator, also = npu_release().operators[name], also - ACTIVATIONS
    given = named(name, args, attributes)
    for argument, allowed in operator.types.items():
        for x in _tensors(given.get(argument)):
            if (found := type_name(x)) not in allowed and not (found in also and ACTIVATIONS & set(allowed)):
                return f"{name} takes {argument} in {', '.join(allowed)}, not {found}"
    for argument, ranks in operator.ranks.items():
        for x in _tensors(given.get(argument)):
            if x.dim() not in ranks:
                return f"{name} takes {argument} of {' or '.join(map(str, ranks))} dims, not {x.dim()}"
    numbers = {number for dtype, number in SCALAR_TYPES.items() if str(dtype).removeprefix("torch.") in also}
    for argument, values in operator.values.items():
        found = given.get(argument)
        if found is not None and found not in values and not (argument == "output_dtype" and found in numbers):
            return f"{name} takes {argument} {' or '.join(map(str, values))}, not {found}"
    for group in operator.same:
        found = {type_name(x) for argument in group for x in _tensors(given.get(argument))}
        if len(found) > 1:
            return f"{name} takes {', '.join(group)} in one type, not {', '.join(sorted(found))}"
    if operator.pairs:
        held = [{type_name(x) for x in _tensors(given.get(argument))} for argument in operator.pairs["arguments"]]
        together = ["bfloat16" if name in also else name for each in held for name in sorted(each)]
        if together not in operator.pairs["types"]:
            return f"{name} takes no {', '.join(operator.pairs['arguments'])} in {', '.join(together)}"
    return None


def named(name: str, args: Sequence[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a recorded operator by their names."""
    return {**dict(zip(argument_names(name), args, strict=False)), **attributes}


@functools.cache
def argument_names(name: str) -> tuple[str, ...]:
    """Of a recorded operator, in the order of its schema."""
    return tuple(argument.name for argument in torch._C.parse_schema(npu_release().operators[name].schema).arguments)


def _tensors(value: Any) -> Iterator[Tensor]:
    """An argument's tensors: one, those of a list, or none."""
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, Tensor):
            yield each


def type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
