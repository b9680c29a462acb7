"""The ONNX graphs that are opened without asking: the standard's operators and their own functions, without loops and
inner graphs, whose data lies in the file or in one that the manifest lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message
from onnx import external_data_helper

from backends.errors import ArtifactError
from foundation.paths import Outside, inside
from runtime.execution.package.calls import why_not
from runtime.execution.package.executor import TRUST, refusing

MOST_BYTES = 1 << 29
_STANDARD = ("", "ai.onnx")


def read(path: Path, listed: Collection[Path], trusted: bool = False) -> onnx.ModelProto:
    """The model in a file, with its data. listed: the files that data may lie in. trusted: of any operators.

    Raises `ArtifactError`.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ArtifactError(f"{path}: larger than {MOST_BYTES:,} bytes, which no graph needs")
    with refusing(path, "ONNX"):
        model = onnx.load(path, load_external_data=False)
        parts = list(_parts(model))
    outside = [part for part in parts if isinstance(part, onnx.TensorProto) and part.external_data]
    for tensor in outside:
        _check_data(path, tensor, listed)
    if not trusted:
        _check_nodes(path, model, parts)
    if outside:
        with refusing(path, "ONNX"):
            external_data_helper.load_external_data_for_model(model, str(path.parent))
    return model


def _parts(message: Any) -> Iterator[Any]:
    """A message and all below it, but what tensors hold."""
    yield message
    if isinstance(message, onnx.TensorProto):
        return
    for _, value in message.ListFields():
        for each in (value,) if isinstance(value, Message | str | bytes | int | float) else value:
            if isinstance(each, Message):
                yield from _parts(each)


def _check_data(path: Path, tensor: onnx.TensorProto, listed: Collection[Path]) -> None:
    locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
    for location in locations or [""]:
        try:
            if inside(path.parent, location) not in listed:
                raise Outside("outside", "no file that the manifest lists in `files`")
        except Outside as error:
            raise ArtifactError(f"{path}: tensor {tensor.name[:80]!r} lies in {location[:80]!r}: {error}") from None


def _check_nodes(path: Path, model: onnx.ModelProto, parts: Collection[Any]) -> None:
    functions = {_name(each.domain, each.name): each for each in model.functions}
    for part in parts:
        if isinstance(part, onnx.AttributeProto) and (part.HasField("g") or part.graphs):
            raise ArtifactError(f"{path}: attribute {part.name[:80]!r} is a graph, which no export has; {TRUST}")
        if isinstance(part, onnx.NodeProto) and part.domain not in _STANDARD and _called(part) not in functions:
            what = _called(part)[:80]
            raise ArtifactError(f"{path}: {what!r} is no operator of ONNX and no function of the graph; {TRUST}")
    bodies = {"": model.graph.node, **{name: each.node for name, each in functions.items()}}
    calls = {name: Counter(map(_called, nodes)) for name, nodes in bodies.items()}
    if (why := why_not({name: len(nodes) for name, nodes in bodies.items()}, calls)) is not None:
        raise ArtifactError(f"{path}: {why}; {TRUST}")


def _called(node: onnx.NodeProto) -> str:
    return _name(node.domain, node.op_type)


def _name(domain: str, name: str) -> str:
    return f"{domain}.{name}"
