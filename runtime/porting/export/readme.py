"""The README of a package for other toolchains: which file to feed to what."""

from __future__ import annotations

from collections.abc import Mapping

from backends.toolchains import narrow
from model.formats import MatrixFormat, matrix_format
from runtime.deployment.manifest import FILE, GearUnits, Manifest

FEEDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "stablehlo": (
        (
            "`GEAR/UNIT.mlirbc`",
            "any compiler of StableHLO: portable bytecode of version {version}, operations of the stablehlo and func "
            "dialects alone, the same for every target. Ops of the model are composites (`glm.linear`, ..); a compiler "
            "that knows none of them inlines their decompositions "
            "(`stablehlo-opt --stablehlo-legalize-composite-to-call --inline`)",
        ),
        ("`GEAR/UNIT.cpu.jax_export`, `GEAR/UNIT.cuda.jax_export`", "JAX on that platform: `jax.export.deserialize`"),
    ),
    "onnx": (
        (
            "`GEAR/UNIT.onnx`",
            "any compiler of ONNX: opset {opset}, static shapes, operators of the standard domain. Ops of the model "
            "are model-local functions of domain `glm`; for a compiler without functions, "
            "`onnx.inliner.inline_local_functions`",
        ),
    ),
    "torch": (("`GEAR/UNIT.pt2`", "`torch.export.load`: ATen operators, for Inductor or any backend of torch's"),),
}
"""Of each format: files, and what takes them."""


def readme(manifest: Manifest) -> str:
    """Of a finished package."""
    said = manifest.extra.get(manifest.format, {})
    lines = [
        f"# {manifest.model.name}: {manifest.format}",
        "",
        f"Written by `glm5 export --format {manifest.format} --formats {manifest.formats}`. `{FILE}` has everything "
        "below for a program to read; docs/export.md of the GLM-5 runtime explains its fields, docs/your_compiler.md "
        "what to take for which toolchain.",
        "",
        "| feed | to |",
        "|---|---|",
        *(f"| {files} | {to.format(**said)} |" for files, to in FEEDS[manifest.format]),
        "",
        f"Gears: {', '.join(sorted({_folder(program) for program in manifest.programs}))}. In each: "
        f"{', '.join(manifest.programs[0].units)}. A step is `view`, `embed`, each layer's unit in the order of "
        f"`layers` in {FILE}, `head`. Inputs and outputs are in the order of {FILE}; weights and caches are inputs.",
        "",
        "## Numbers",
        f"Activations, caches and all that is not named here: {manifest.dtype}.",
        *(f"- {_says(fmt, names)}" for fmt, names in _narrow(manifest).items()),
        "",
        "## Weights",
        "`weights/device-I.safetensors`, where they were exported: tensors `layers.INDEX.NAME` for the inputs "
        "`w.NAME`, `outer.NAME` for `outer.NAME`."
        + (
            " int4 tensors are vectors of bytes, two numbers to each in order, the first in the low half (as in ONNX's "
            "`raw_data`); the header's metadata `int4` has their shapes."
            if any(ref.dtype == "int4" for refs in manifest.weights.values() for ref in refs)
            else ""
        ),
    ]
    return "\n".join(lines) + "\n"


def _folder(program: GearUnits) -> str:
    return next(iter(program.units["view"][0].files.values())).partition("/")[0]


def _narrow(manifest: Manifest) -> dict[MatrixFormat, list[str]]:
    """The narrow formats of a package, and the weights in each."""
    found: dict[MatrixFormat, list[str]] = {}
    for ref in (ref for refs in manifest.weights.values() for ref in refs):
        if ref.format and ref.name.endswith(".values"):
            names = found.setdefault(matrix_format(ref.format), [])
            if (name := ref.name.removesuffix(".values")) not in names:
                names.append(name)
    return found


def _says(fmt: MatrixFormat, names: list[str]) -> str:
    of = (
        f"{', '.join(f'`{name}`' for name in sorted(names))}: {fmt.label} (`{fmt.name}`), inputs `.values` and `.scale`"
    )
    if narrow.rounds_activations(fmt):
        return f"{of}; what they multiply is rounded to int8 as the graph runs, a scale a token"
    return f"{of}; widened before the product"


__all__ = ["FEEDS", "readme"]
