"""What is taken of the program in a `.pt2` archive (torch._export.serde.schema, by its names there): arguments are
tensors and numbers, sizes are numbers. The rest of torch's schema is not there: symbols, whose expressions torch
evaluates, guards, custom objects, graphs inside graphs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Pt2Size:
    as_int: int


@dataclasses.dataclass(frozen=True)
class Pt2Device:
    type: Literal["cpu"]
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Tensor:
    dtype: int
    sizes: tuple[Pt2Size, ...]
    requires_grad: bool
    device: Pt2Device
    strides: tuple[Pt2Size, ...]
    storage_offset: Pt2Size
    layout: int


@dataclasses.dataclass(frozen=True)
class Pt2Name:
    name: str


@dataclasses.dataclass(frozen=True)
class Pt2Optional:
    as_tensor: Pt2Name | None = None
    as_none: bool | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Argument:
    as_none: bool | None = None
    as_tensor: Pt2Name | None = None
    as_tensors: tuple[Pt2Name, ...] | None = None
    as_optional_tensors: tuple[Pt2Optional, ...] | None = None
    as_int: int | None = None
    as_ints: tuple[int, ...] | None = None
    as_float: float | Literal["Infinity", "-Infinity", "NaN"] | None = None
    as_bool: bool | None = None
    as_string: str | None = None
    as_scalar_type: int | None = None
    as_memory_format: int | None = None
    as_layout: int | None = None
    as_device: Pt2Device | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Given:
    name: str
    arg: Pt2Argument
    kind: int | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Node:
    target: str
    inputs: tuple[Pt2Given, ...]
    outputs: tuple[Pt2Argument, ...]
    metadata: dict[str, str]
    is_hop_single_tensor_return: bool | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Nothing:
    """An object without fields."""


@dataclasses.dataclass(frozen=True)
class Pt2Graph:
    inputs: tuple[Pt2Argument, ...]
    outputs: tuple[Pt2Argument, ...]
    nodes: tuple[Pt2Node, ...]
    tensor_values: dict[str, Pt2Tensor]
    sym_int_values: Pt2Nothing
    sym_bool_values: Pt2Nothing
    is_single_tensor_return: bool = False
    custom_obj_values: Pt2Nothing = Pt2Nothing()
    sym_float_values: Pt2Nothing = Pt2Nothing()


@dataclasses.dataclass(frozen=True)
class Pt2User:
    arg: Pt2Argument


@dataclasses.dataclass(frozen=True)
class Pt2Constant:
    arg: Pt2Name
    tensor_constant_name: str


@dataclasses.dataclass(frozen=True)
class Pt2Input:
    user_input: Pt2User | None = None
    tensor_constant: Pt2Constant | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Output:
    user_output: Pt2User


@dataclasses.dataclass(frozen=True)
class Pt2Signature:
    input_specs: tuple[Pt2Input, ...]
    output_specs: tuple[Pt2Output, ...]


@dataclasses.dataclass(frozen=True)
class Pt2Call:
    inputs: tuple[Pt2Argument, ...]
    outputs: tuple[Pt2Argument, ...]
    in_spec: str
    out_spec: str
    forward_arg_names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Pt2Entry:
    fqn: Literal[""]
    signature: Pt2Call


@dataclasses.dataclass(frozen=True)
class Pt2Module:
    graph: Pt2Graph
    signature: Pt2Signature
    module_call_graph: tuple[Pt2Entry, ...]
    metadata: dict[str, str]
    treespec_namedtuple_fields: Pt2Nothing = Pt2Nothing()


@dataclasses.dataclass(frozen=True)
class Pt2Version:
    major: int
    minor: int


@dataclasses.dataclass(frozen=True)
class Pt2Program:
    graph_module: Pt2Module
    opset_version: dict[str, int]
    range_constraints: Pt2Nothing
    schema_version: Pt2Version
    verifiers: tuple[Literal["TRAINING"], ...]
    torch_version: str
    guards_code: tuple[Pt2Nothing, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pt2Payload:
    path_name: str
    is_param: Literal[False]
    use_pickle: Literal[False]
    tensor_meta: Pt2Tensor


@dataclasses.dataclass(frozen=True)
class Pt2Payloads:
    config: dict[str, Pt2Payload]
