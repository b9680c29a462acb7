"""Would ATC take the package? Files, operators, opset, number formats, shapes and gears against the lists that the
project ships (`backends/ascend/*.toml`, each entry with its source), a line for each thing that would be refused.

ATC is not needed and not run. What the lists do not say (which types and shapes a kernel takes beyond the fused
operators' documented limits) is not checked: see docs/ascend.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.ascend import catalog, constraints
from backends.ascend.catalog import PLUGIN, STANDARD
from foundation.errors import UsageError, first_line
from runtime.deployment.manifest import Manifest, wrong_files

if TYPE_CHECKING:
    import onnx

_BUILT_IN = ("Constant",)  # what the parser handles itself (onnx_parser.cc: kOnnxOpMap)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What ATC would refuse: in which file of the package, what, why, and where that is written."""

    file: str
    what: str
    why: str
    source: str

    def line(self) -> str:
        return f"refused  {self.file}: {self.what}: {self.why} [{self.source}]"


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """refusals: in order of file. graphs, nodes: what was looked at. plugin: operators that need the package's ATC
    plugin. family: the chip family that was assumed, None for any."""

    refusals: tuple[Refusal, ...]
    graphs: int
    nodes: int
    gears: dict[str, int]
    plugin: tuple[str, ...]
    family: str | None


def check(folder: str | Path, soc_version: str | None = None) -> CheckReport:
    """Checks a package of format onnx or ascend, for the chip it names or for `soc_version`.

    Raises `ArtifactError` where the folder is no package, `UsageError` for a format that ATC does not read,
    `Unsupported` for a chip that it does not know.
    """
    from backends.ascend.atc import check_soc

    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest.format not in ("onnx", "ascend"):
        raise UsageError(f"{folder}: holds {manifest.format}, and ATC takes ONNX; export with --format ascend")
    soc = soc_version or manifest.extra.get("ascend", {}).get("soc_version")
    family = catalog.family(check_soc(soc)) if soc else None
    refusals = [*_files(folder, manifest), *_gears(manifest, soc)]
    nodes, custom, graphs = 0, set(), sorted(_graphs(manifest))
    for name in graphs:
        if any(refusal.file == name for refusal in refusals):
            continue  # damaged: what is in it says nothing
        model, found = _load(folder / name, name)
        refusals += found
        if model is not None:
            refusals += _model(name, model, manifest, family)
            nodes += len(model.graph.node)
            custom |= {node.op_type for node in model.graph.node if node.domain == PLUGIN}
    return CheckReport(
        tuple(sorted(refusals, key=lambda r: r.file)), len(graphs), nodes, _gear_counts(manifest),
        tuple(sorted(custom)), family,
    )  # fmt: skip


# --- files and gears -----------------------------------------------------------------------------


def _graphs(manifest: Manifest) -> set[str]:
    chains = (chain for program in manifest.programs for chain in program.units.values())
    return {file for chain in chains for step in chain for file in step.files.values()}


def _files(folder: Path, manifest: Manifest) -> Iterator[Refusal]:
    for name, why in wrong_files(folder, manifest):
        yield Refusal(name, "file", why, "manifest.json")


def _gear_counts(manifest: Manifest) -> dict[str, int]:
    return dict(Counter(program.phase for program in manifest.programs))


def _gears(manifest: Manifest, soc: str | None) -> Iterator[Refusal]:
    limits = catalog.limits()["gears"]
    most = catalog.most_gears(soc)
    for phase, count in _gear_counts(manifest).items():
        if count > most:
            yield Refusal("manifest.json", f"{phase} gears", f"{count}, and ATC takes at most {most}", "E10036")
        if manifest.format == "ascend" and count < limits["fewest"] and _dynamic(manifest):
            yield Refusal("manifest.json", f"{phase} gears", f"{count}, and ATC takes no fewer than 2", "E10035")
    shapes = Counter((program.phase, program.gear) for program in manifest.programs)
    for (phase, gear), count in shapes.items():
        if count > 1:
            yield Refusal("manifest.json", f"{phase} gears", f"{gear} is there {count} times", "E10039")
        if min(dataclasses.astuple(gear)) < 1:
            yield Refusal("manifest.json", f"{phase} gears", f"{gear} has a size below 1", "E10038")


def _dynamic(manifest: Manifest) -> bool:
    return bool(manifest.extra.get("ascend", {}).get("dynamic_dims"))


# --- a graph -------------------------------------------------------------------------------------


def _load(path: Path, name: str) -> tuple[onnx.ModelProto | None, list[Refusal]]:
    import onnx

    most = catalog.limits()["file"]["most_bytes"]
    if path.stat().st_size >= most:
        return None, [Refusal(name, "file", f"{path.stat().st_size} bytes; a model has at most {most}", "protobuf")]
    try:
        return onnx.load(str(path), load_external_data=False), []
    except Exception as error:  # protobuf's errors have no public base
        return None, [Refusal(name, "file", f"not an ONNX model ({first_line(error)})", "E16001")]


def _model(name: str, model: onnx.ModelProto, manifest: Manifest, family: str | None) -> Iterator[Refusal]:
    graph, limits = model.graph, catalog.limits()
    opsets = {entry.domain or STANDARD: entry.version for entry in model.opset_import}
    opset, low, high = opsets.get(STANDARD), limits["opset"]["oldest"], limits["opset"]["newest"]
    if opset is None or not low <= opset <= high:
        yield Refusal(name, f"opset {opset}", f"ATC takes {low} to {high}", _title("opset"))
    if model.ir_version > limits["ir"]["newest"]:
        why = f"ATC's ONNX is 1.12, whose IR is {limits['ir']['newest']}"
        yield Refusal(name, f"IR version {model.ir_version}", why, _title("onnx_1_12"))
    for part, held in (("inputs", graph.input), ("outputs", graph.output)):
        if not held:
            yield Refusal(name, f"no {part}", "a graph needs some", "E16001")
    for each, count in Counter(node.name for node in graph.node if node.name).items():
        if count > 1:
            yield Refusal(name, f"node name {each}", f"{count} nodes have it", _title("parser"))
    yield from _operators(name, model, opsets, manifest, family)
    yield from _types(name, graph)
    yield from _shapes(name, graph)


def _operators(
    name: str, model: onnx.ModelProto, opsets: dict[str, int], manifest: Manifest, family: str | None
) -> Iterator[Refusal]:
    known = catalog.atc_operators()
    brought = set(manifest.extra.get("ascend", {}).get("plugin", ()))
    functions = {(function.domain, function.name) for function in model.functions}
    seen: Counter[tuple[str, str]] = Counter(
        (node.domain or STANDARD, node.op_type) for node in model.graph.node if node.op_type not in _BUILT_IN
    )
    for (domain, type_), count in sorted(seen.items()):
        what = f"{count} x {domain}::{opsets.get(domain, '?')}::{type_}"
        if domain not in opsets:
            yield Refusal(name, what, f"the model imports no opset of {domain}", _title("parser"))
        elif (domain, type_) in functions:
            why = "a model-local function, which ATC does not inline (E16002); export with --format ascend"
            yield Refusal(name, what, why, _title("parser"))
        elif domain == PLUGIN:
            yield from _plugged(name, what, type_, brought, family)
        elif (entry := known.get((domain, type_))) is None:
            yield Refusal(name, what, "no registered operator (E16002)", _title("parser"))
        elif opsets[domain] not in entry.opsets:
            newest = max(entry.opsets)
            yield Refusal(name, what, f"registered up to opset {newest} only (E16002)", entry.source)
    shapes = _known_shapes(model.graph)
    for node in model.graph.node:
        yield from _attributes(name, node)
        operator = catalog.cann_by_node(node.domain, node.op_type)
        if operator is not None:
            given = {key: shapes[i] for key, i in zip(operator.inputs, node.input, strict=False) if i in shapes}
            if why := constraints.of_node(operator.name, given, _values(node), family):
                yield Refusal(name, _place(node), why, operator.source)


def _plugged(name: str, what: str, type_: str, brought: set[str], family: str | None) -> Iterator[Refusal]:
    operator = catalog.cann_by_node(PLUGIN, type_)
    if operator is None:
        yield Refusal(name, what, "no such operator of CANN is known", "cann_operators.toml")
    elif type_ not in brought:
        yield Refusal(name, what, "the package brings no plugin that registers it (E16002)", _title("parser"))
    elif family is not None and family not in operator.chips:
        yield Refusal(name, what, f"CANN has no kernel of it for {family}", operator.source)


def _values(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _place(node: onnx.NodeProto) -> str:
    return f"{node.op_type} -> {node.output[0] if node.output else '?'}"


def _attributes(name: str, node: onnx.NodeProto) -> Iterator[Refusal]:
    """What the operators' own plugins refuse."""
    if node.domain:
        return
    values = _values(node)
    reduction = values.get("reduction", b"none")
    bad = {
        "ScatterND": reduction not in (b"none", b"add", b"max", b"min"),
        "Slice": len(node.input) < 3,
        "Split": "num_outputs" in values and values["num_outputs"] != len(node.output),
        "Clip": not any(node.input[1:]),
        "Transpose": not values.get("perm"),
        "Cast": "to" not in values,
    }
    if bad.get(node.op_type):
        source = catalog.atc_operators()[STANDARD, node.op_type].source
        yield Refusal(name, _place(node), catalog.limits()["refusals"][node.op_type], source)


def _types(name: str, graph: onnx.GraphProto) -> Iterator[Refusal]:
    from onnx import TensorProto

    accepted = set(catalog.limits()["types"]["accepted"])
    held = [(info.name, info.type.tensor_type.elem_type) for info in (*graph.input, *graph.output)]
    held += [(tensor.name, tensor.data_type) for tensor in graph.initializer]
    held += [
        (_place(node), _values(node).get("to", TensorProto.FLOAT)) for node in graph.node if node.op_type == "Cast"
    ]
    for what, kind in held:
        if (spelt := TensorProto.DataType.Name(kind)) not in accepted:
            yield Refusal(name, what, f"type {spelt}; ATC's ONNX 1.12 and opset 18 have none such", _title("onnx"))


def _shapes(name: str, graph: onnx.GraphProto) -> Iterator[Refusal]:
    fixed = {tensor.name for tensor in graph.initializer}
    for info in graph.input:
        if info.name in fixed:
            continue
        if not info.type.tensor_type.HasField("shape"):
            yield Refusal(name, f"input {info.name}", "no shape; export it again", _title("parser"))
        for place, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                why = f"dim {place} is open and no gears are given for it (E10040)"
                yield Refusal(name, f"input {info.name}", why, _title("gears"))
            elif dim.dim_value < 1:
                yield Refusal(name, f"input {info.name}", f"dim {place} is {dim.dim_value}", _title("parser"))


def _known_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[info.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _title(source: str) -> str:
    found = catalog.sources()[source]
    return f"{found['title']}, {found['date']}"
