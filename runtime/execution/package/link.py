"""Links the ONNX graphs of a one-device package to one model of a whole step, in memory.

The graphs are the package's, each layer's under its own prefix; weights and caches become inputs "layers.3.w.q_a" and
"layers.3.cache.latent". A runtime then shares what layers have in common (rotations, masks) and starts once a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx

from runtime.deployment.manifest import OUT, GearUnits, Manifest


def link(
    folder: Path, manifest: Manifest, program: GearUnits, read: Callable[[Path], onnx.ModelProto]
) -> onnx.ModelProto:
    """The model of a step: the batch, weights and caches in; "logits.out", "hidden.out" and caches out.

    read: gives the model in a file.
    """
    runs = [("view", "view"), ("outer", "embed")]
    runs += [(f"layers.{layer.index}", layer.unit) for layer in manifest.layers]
    linked = onnx.ModelProto(producer_name="glm5-runtime")
    linked.graph.name = "step"
    models: dict[str, onnx.ModelProto] = {}
    current: dict[str, str] = {}  # the value that a name of the wiring has now
    declared: set[str] = set()
    for owner, unit in [*runs, ("outer", "head")]:
        (step,) = program.units[unit]
        if unit not in models:
            models[unit] = read(folder / step.files["any"])
            linked.ir_version = max(linked.ir_version, models[unit].ir_version)
            _add_functions(linked, models[unit], unit)
        model, names = models[unit].graph, {}
        for given in model.input:
            source = current.get(given.name)
            if source is None:
                own = given.name.startswith(("w.", "cache."))
                source = f"{owner}.{given.name}" if own else given.name
                if source not in declared:
                    declared.add(source)
                    linked.graph.input.append(_named(given, source))
            names[given.name] = source
        for result in model.output:
            stem = result.name.removesuffix(OUT)
            cache = stem.startswith("cache.")
            names[result.name] = f"{owner}.{result.name}" if cache or unit != "head" else result.name
            if cache or unit == "head":
                linked.graph.output.append(_named(result, names[result.name]))
            else:
                current[stem] = names[result.name]
        _add_nodes(linked, model, names, owner, unit)
    return linked


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    renamed = copy.deepcopy(value)
    renamed.name = name
    return renamed


def _add_functions(linked: onnx.ModelProto, model: onnx.ModelProto, unit: str) -> None:
    for function in model.functions:
        renamed = copy.deepcopy(function)
        renamed.name = f"{unit}.{function.name}"
        linked.functions.append(renamed)
    known = {each.domain for each in linked.opset_import}
    linked.opset_import.extend(each for each in model.opset_import if each.domain not in known)


def _add_nodes(linked: onnx.ModelProto, model: onnx.GraphProto, names: dict[str, str], owner: str, unit: str) -> None:
    def named(name: str) -> str:
        return names.setdefault(name, f"{owner}/{unit}/{name}") if name else name

    for tensor in model.initializer:
        renamed = copy.deepcopy(tensor)
        renamed.name = named(tensor.name)
        linked.graph.initializer.append(renamed)
    for node in model.node:
        renamed = copy.deepcopy(node)
        renamed.input[:] = [named(name) for name in node.input]
        renamed.output[:] = [named(name) for name in node.output]
        if node.domain:
            renamed.op_type = f"{unit}.{node.op_type}"
        linked.graph.node.append(renamed)
