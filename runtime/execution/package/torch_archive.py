"""The `.pt2` archives that are opened without asking: those that hold data alone.

`torch.export.load` runs what an archive says: pickles (weights, constants, sample inputs), compiled libraries, sizes
as Python expressions, and names that it pastes into Python source. What `glm5 export` writes has none of these. So an
archive is read here first, and refused for whatever an export would not hold; and torch is given not the file but a new
archive of what has been read.
"""

from __future__ import annotations

import dataclasses
import io
import keyword
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import Any

from torch.export.pt2_archive import PT2ArchiveWriter

from backends.ascend.operators import npu_release
from backends.errors import ArtifactError
from foundation.errors import first_line
from foundation.reading import Unreadable, parse_json
from runtime.deployment.document import Fault, place, plain, validated
from runtime.execution.package.executor import TRUST
from runtime.execution.package.torch_schema import Pt2Payloads, Pt2Program

MOST_BYTES = 1 << 26
_MOST_JSON_BYTES = 1 << 25
_PROGRAM, _WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
_CONSTANTS, _SAMPLES = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"
_CONSTANT = re.compile(r"tensor_\d{1,6}")
_FIXED: Mapping[str, re.Pattern[bytes]] = {
    "archive_format": re.compile(b"pt2"),
    "archive_version": re.compile(b"0"),
    "byteorder": re.compile(b"little"),
    ".data/version": re.compile(rb"\d{1,3}\n?"),
    ".data/serialization_id": re.compile(rb"\d{0,64}"),
    _SAMPLES: re.compile(b""),
}
"""Entries that say nothing of the program, and what they hold."""

_OPERATORS = frozenset((
    "__and__", "__or__", "_assert_tensor_metadata", "_to_copy", "abs", "add", "alias", "all", "amax", "amin", "any",
    "arange", "argmax", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_right_shift",
    "cat", "ceil", "clamp", "clone", "contiguous",
    "cos", "cumsum", "detach", "detach_", "div", "einsum", "eq", "exp", "expand", "flip", "floor", "fmod", "full",
    "full_like", "gather", "ge", "gt", "index", "index_put", "index_select", "le", "lift_fresh_copy", "log", "lt",
    "matmul", "maximum", "minimum", "mul", "narrow", "ne", "neg", "permute", "pow", "remainder", "reshape", "round",
    "rsqrt", "select", "sigmoid", "sign", "sin", "slice", "sort", "split", "split_with_sizes", "sqrt", "square",
    "squeeze", "sub", "sum", "tanh", "to", "transpose", "unsqueeze", "view", "where", "zeros",
))  # fmt: skip
"""Those of ATen that `backends/toolchains/torch.py` makes programs of. ATen has others that write files."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TARGET = re.compile(r"torch\.ops\.(aten|npu)\.([a-z0-9_]+)\.([A-Za-z_]+)")
_HELD = re.compile(
    r"[a-z]\w*_\d+", re.ASCII
)  # a name for a constant, which becomes an attribute: none that classes have
_WORD = re.compile(r"floor|trunc|[a-z,]+->[a-z]*|(PA_)?BSND|ep")
"""How to round a quotient; a product's letters; a layout; where the name of a group goes."""
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 12: 1, 13: 2, 29: 1}  # schema.ScalarType


def checked(path: Path) -> io.BytesIO:
    """An archive of what has been read of the one at `path`. Raises `ArtifactError` where that holds anything that an
    export does not."""
    try:
        return _rewritten(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {TRUST}") from None


def _rewritten(path: Path) -> io.BytesIO:
    entries = _entries(path)
    program = _program(path, entries)
    weights, constants = _config(path, entries, _WEIGHTS), _config(path, entries, _CONSTANTS)
    if weights["config"]:
        raise ArtifactError(f"{path}: {_WEIGHTS}: names weights, and those of a package are beside its graphs")
    made = io.BytesIO()
    with PT2ArchiveWriter(made) as archive:  # type: ignore[arg-type]
        archive.write_string(_PROGRAM, dumps(program))
        archive.write_string(_WEIGHTS, dumps(weights))
        archive.write_string(_CONSTANTS, dumps(constants))
        archive.write_bytes(_SAMPLES, b"")
        for name in {payload["path_name"] for payload in constants["config"].values()}:
            archive.write_bytes(f"data/constants/{name}", entries[f"data/constants/{name}"])
    made.seek(0)
    return made


def _entries(path: Path) -> dict[str, bytes]:
    """What the zip file holds, by name without the folder that all names begin with."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ArtifactError(f"{path}: larger than {MOST_BYTES:,} bytes, which no graph needs")
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
            if any(each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 for each in found):
                raise ArtifactError(f"{path}: holds compressed entries, and exports are stored as they are")
            if sum(max(each.file_size, each.compress_size) for each in found) > size:  # entries that share their bytes
                raise ArtifactError(f"{path}: no .pt2 archive (its entries are larger than the file)")
            held = [(each.filename.partition("/")[2], archive.read(each)) for each in found]
    except ArtifactError:
        raise
    except Exception as error:  # zipfile raises whatever it comes upon
        raise ArtifactError(f"{path}: no .pt2 archive ({first_line(error)})") from None
    entries = dict(held)
    if len(entries) != len(held) or len({each.filename.partition("/")[0] for each in found}) != 1:
        raise ArtifactError(f"{path}: holds an entry twice, or more than one folder")
    for name, content in entries.items():
        if name in (_PROGRAM, _WEIGHTS, _CONSTANTS) or _CONSTANT.fullmatch(name.removeprefix("data/constants/")):
            continue
        if name not in _FIXED:
            raise ArtifactError(f"{path}: holds {name[:80]!r}, which no export does: it may be code")
        if not _FIXED[name].fullmatch(content):
            raise ArtifactError(f"{path}: {name}: holds what no export does: it may be code")
    return entries


def _json(path: Path, entries: Mapping[str, bytes], name: str) -> Any:
    content = entries.get(name)
    if content is None:
        raise ArtifactError(f"{path}: lacks {name}")
    if len(content) > _MOST_JSON_BYTES:
        raise ArtifactError(f"{path}: {name}: larger than {_MOST_JSON_BYTES:,} bytes, which no graph needs")
    try:
        return parse_json(content.decode("utf-8"))
    except (Unreadable, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: {name}: no JSON ({first_line(error)})") from None


def _config(path: Path, entries: Mapping[str, bytes], name: str) -> Any:
    """A list of stored tensors, each of which has the bytes that it needs."""
    where, document = f"{path}: {name}", _json(path, entries, name)
    for key, payload in validated(Pt2Payloads, document, ArtifactError, where, say=_say).config.items():
        content, meta = entries.get(f"data/constants/{payload.path_name}"), payload.tensor_meta
        if not _HELD.fullmatch(key) or not _CONSTANT.fullmatch(payload.path_name) or content is None:
            raise ArtifactError(f"{where}: config.{key[:80]!r}: names no tensor of the archive")
        sizes = [size.as_int for size in meta.sizes]
        if min(sizes, default=0) < 0 or _BYTES.get(meta.dtype, 0) * math.prod(sizes) != len(content):
            raise ArtifactError(f"{where}: config.{key}: {len(content)} bytes, not those of its type and shape {sizes}")
    return document


def _program(path: Path, entries: Mapping[str, bytes]) -> Any:
    """The program, without notes that torch makes for itself."""
    where, document = f"{path}: {_PROGRAM}", _json(path, entries, _PROGRAM)
    module = validated(Pt2Program, document, ArtifactError, where, say=_say).graph_module
    if len(module.module_call_graph) != 1:
        raise ArtifactError(f"{where}: graph_module.module_call_graph: holds more than the program itself")
    call = module.module_call_graph[0].signature
    given = sum(each.user_input is not None for each in module.signature.input_specs)
    made = len(module.signature.output_specs)
    for field, tree in (("in_spec", [_tuple(given), _NO_KEYWORDS]), ("out_spec", [_LEAF] * made)):
        if _tree(getattr(call, field)) != [1, {**_tuple(0), "children_spec": tree}]:
            raise ArtifactError(f"{where}: {field}: is not a flat list of tensors")
    for keys, text in _texts(module, ("graph_module",)):
        field = next(key for key in reversed(keys) if isinstance(key, str))
        if (why := _wrong(field, text)) is not None:
            raise ArtifactError(f"{where}: {place(keys)}: {text[:80]!r} {why}")
    document["torch_version"] = ""
    document["graph_module"]["metadata"] = {}
    for node in document["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    return document


def _say(where: str, fault: Fault) -> str:
    if fault.missing == ("as_int",):
        return f"{where}: {place(fault.path)}: is no number; torch evaluates what stands for one as an expression"
    return plain(where, fault)


def _wrong(field: str, text: str) -> str | None:
    """Why a text of the program is not taken, if so."""
    if field == "target":
        found = _TARGET.fullmatch(text)
        known = {"aten": _OPERATORS, "npu": npu_release().operators}
        return None if found and found[2] in known[found[1]] else "is no operator that exports are made of"
    if field == "as_string":
        return None if _WORD.fullmatch(text) else "is no argument that exports have"
    if field == "tensor_constant_name":
        return None if _HELD.fullmatch(text) else "is no name of a constant"
    return None if _NAME.fullmatch(text) and not keyword.iskeyword(text) else "is no plain name"


_SEEN = ("metadata", "in_spec", "out_spec", "fqn", "type", "as_float")  # looked at by themselves, or left out
_LEAF = {"type": None, "context": None, "children_spec": []}
_NO_KEYWORDS = {"type": "builtins.dict", "context": "[]", "children_spec": []}


def _tuple(size: int) -> dict[str, Any]:
    return {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF] * size}


def _tree(text: str) -> Any:
    try:
        return parse_json(text)
    except Unreadable:
        return None


def _texts(value: Any, keys: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text below a value, keys of mappings too, each behind the fields that lead there."""
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _texts(item, (*keys, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield keys, key
            yield from _texts(item, (*keys, "entry"))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in _SEEN:
                yield from _texts(getattr(value, field.name), (*keys, field.name))
