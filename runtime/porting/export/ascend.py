"""The Ascend package: ONNX for ATC at every gear, and all that an engineer with the chip types.

Beside the graphs and the manifest: `build.sh` (one `atc` command a graph), `plugin/` (C++ for the operators that CANN
does not map from ONNX, where graphs have them), `rank_table.json` (HCCL, more than one device), `README.md`, and with
`--weights external` one safetensors file a device, in int8 where the formats say so. What each is for: docs/ascend.md.

A gear is a graph of its own with static shapes, and an .om of its own: ATC optimises a static graph best and schedules
it on the device as a whole, and weights, being inputs, are not stored again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from backends.ascend import atc, catalog, plugin
from backends.ascend.lowerings import FUSED, CannOptions, is_latent, split_port
from backends.errors import Unsupported
from backends.toolchains.walker import Graph, Port
from foundation.errors import UsageError, first_line
from hw_profiles import Profile
from model.config import LayerType
from model.formats import FORMATS, SCHEMES
from model.weights import layer_weights
from runtime.deployment.manifest import DeviceShare, Manifest, Step, Value, WeightRef
from runtime.deployment.tensors import TensorWriter
from runtime.porting.export import shares
from runtime.porting.export.ascend_files import build_script, rank_table, readme
from runtime.porting.export.job import ExportJob, op_uses, values

_INT8 = "w8a8-int8"
SCHEMES_TAKEN = ("f32", "bf16", "w8a8")


class AscendWriter:
    """Options of the request: `profile` (a Profile or None), `soc_version` (of ATC; the profile's own by default) and
    `cann_ops` ("all", "shipped" or "none" of CANN's fused operators)."""

    packages: tuple[str, ...] = ("onnx",)

    def __init__(self, request: ExportJob):
        self.request = request
        profile: Profile | None = request.options.get("profile")
        self.profile = profile
        self.soc = _soc(request.options.get("soc_version"), profile)
        fused = request.options.get("cann_ops", "all")
        if fused not in FUSED:
            raise UsageError(f"--cann-ops {fused}: {', '.join(FUSED)}")
        _refuse(request, profile, self.soc)
        family = catalog.family(self.soc) if self.soc else None
        self.int8 = {name: _int8_weights(request, kind) for name, kind in request.cut.unit_types.items()}
        self.options = CannOptions(fused=fused, family=family)
        self.split = False
        self.custom: set[str] = set()
        self.declined: Counter[tuple[str, str]] = Counter()

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        import onnx

        from backends.ascend import writer

        unit = graph.name.partition(".")[0]
        made = writer.write(graph, dataclasses.replace(self.options, int8=self.int8.get(unit, frozenset())))
        model = made.written.model
        try:
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # of the checker, or of its shape inference
            raise Unsupported(f"{stem}: the ONNX checker refuses it: {first_line(error)}") from None
        (folder / f"{stem}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        self.custom |= {node.op_type for node in model.graph.node if node.domain == catalog.PLUGIN}
        self.declined += made.declined
        self.split |= any(port.name == "cache.latent_nope" for port in made.written.inputs)
        return Step(
            kind="graph",
            name=graph.name,
            inputs=values(made.written.inputs),
            outputs=values(made.written.outputs),
            files={"any": f"{stem}.onnx"},
            aliases=dict(made.aliases),
            ops=op_uses(Counter({(f.name, f.form, f.target): n for f, n in made.written.ops.items()})),
        )

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        plain = manifest
        manifest = dataclasses.replace(
            manifest,
            caches={unit: tuple(_caches(held, self.split)) for unit, held in manifest.caches.items()},
            weights={
                unit: tuple(part for ref in refs for part in _refs(ref, self.int8.get(unit, frozenset())))
                for unit, refs in manifest.weights.items()
            },
        )
        files = _graph_files(manifest)
        manifest.extra["ascend"] = {
            "soc_version": self.soc,
            "cann_ops": self.options.fused,
            "plugin": sorted(self.custom),
            "commands": {file: atc.line(atc.command(file, om(file), self.soc or "$SOC_VERSION")) for file in files},
            "declined": [f"{op}: {why} ({n} times)" for (op, why), n in sorted(self.declined.items())],
        }
        if self.custom:
            where = folder / plugin.VENDOR
            where.mkdir()
            needed = [o for o in plugin.registered() if o.type in self.custom]
            (where / plugin.FILE).write_text(plugin.source(needed), encoding="utf-8")
            _script(where / "build.sh", plugin.BUILD)
        _script(folder / "build.sh", build_script(files, self.soc, bool(self.custom)))
        devices = len(shares.devices(self.request.cfg, self.request.grid))
        if devices > 1:
            table = rank_table(devices, self._devices_a_server())
            (folder / "rank_table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if self.request.weights:
            manifest = self._weights(folder, manifest, plain)
        (folder / "README.md").write_text(readme(manifest, devices, self._devices_a_server()), encoding="utf-8")
        return manifest

    def _devices_a_server(self) -> int:
        figure = self.profile.get("node.devices") if self.profile else None
        return int(figure.value) if figure else 8

    def _weights(self, folder: Path, manifest: Manifest, plain: Manifest) -> Manifest:
        """A file for each device, matrices in int8 where their formats say so. `plain`: before they did."""
        request = self.request
        if request.checkpoint is None:
            raise UsageError("--weights external needs weights to write: give --checkpoint, or --weights none")
        (folder / "weights").mkdir()
        names, shapes = {}, {}
        for device in manifest.devices:
            tensors: dict[str, tuple[tuple[int, ...], str]] = {}
            for owner in manifest.owners(device):
                refs = manifest.weights[manifest.owner_units[owner]]
                tensors |= {f"{owner}.{ref.name.partition('.')[2]}": (ref.shape, ref.dtype) for ref in refs}
            names[device.index] = f"weights/device-{device.index}.safetensors"
            shapes[device.index] = tensors

        def put(device: DeviceShare, name: str, array: np.ndarray) -> None:
            owner, _, weight = name.rpartition(".")
            int8 = self.int8.get(manifest.owner_units[owner], frozenset())
            for suffix, part in _quantised(f"w.{weight}", array, int8).items():
                files[device.index].put(name + suffix, part)

        with ExitStack() as opened:
            files = {i: opened.enter_context(TensorWriter(folder / names[i], shapes[i])) for i in names}
            shares.each_share(request.checkpoint, request.grid, manifest.devices, plain, put)
        return dataclasses.replace(
            manifest, devices=tuple(dataclasses.replace(d, weights=names[d.index]) for d in manifest.devices)
        )


def _soc(named: str | None, profile: Profile | None) -> str | None:
    """What ATC is told the chip is; None where neither the user nor the profile says."""
    soc = named or (profile.labels.get("chip.soc_version") if profile else None)
    return atc.check_soc(soc) if soc else None


def _refuse(request: ExportJob, profile: Profile | None, soc: str | None) -> None:
    """Raises `UsageError` for number formats and gears that a package cannot have."""
    scheme = request.scheme
    if profile is not None and profile.family != "ascend":
        raise UsageError(f"--profile {profile.name}: {profile.description} is no Ascend chip")
    if scheme not in SCHEMES_TAKEN:
        why = "ONNX opset 18 has no 8-bit floats" if "fp" in scheme else "ONNX opset 18 has no 4-bit integers"
        raise UsageError(f"--formats {scheme}: {why}, and ATC takes no later opset; choose {', '.join(SCHEMES_TAKEN)}")
    units = {fmt for fmt in SCHEMES[scheme].formats if fmt in ("bf16", _INT8)}
    if profile is not None and (lacking := units - set(profile.formats.weights)):
        raise UsageError(f"--formats {scheme}: {profile.name} has no units for {', '.join(sorted(lacking))}")
    most = catalog.most_gears(soc)
    for phase, gears in request.gears.items():
        if len(gears) > most:
            raise UsageError(f"{len(gears)} gears of {phase}: ATC takes at most {most}; 3 or 4 are recommended")


def _int8_weights(request: ExportJob, kind: LayerType) -> frozenset[str]:
    """The inputs ("w.q_a") of a unit that are kept in int8."""
    scheme = SCHEMES.get(request.scheme)
    if scheme is None:
        return frozenset()
    found = (weight for weight in layer_weights(request.cfg, kind) if scheme.stored(weight, kind.mtp).name == _INT8)
    return frozenset(f"w.{weight.name}" for weight in found)


def _contracted(name: str) -> int:
    """The dim that a product sums over: the first of a matrix, the second of stacked experts."""
    return 1 if name in ("w.experts_gate_up", "w.experts_down") else 0


def _refs(ref: WeightRef, int8: frozenset[str]) -> list[WeightRef]:
    """A weight as the package has it: as it is, or int8 values and a float32 scale an output channel (of the
    device's own rows, where the summed dim is divided)."""
    if ref.name not in int8:
        return [ref]
    dim = _contracted(ref.name)
    shape, whole, split = ((*x[:dim], *x[dim + 1 :]) for x in (ref.shape, ref.whole, ref.split))
    scale = dataclasses.replace(ref, name=f"{ref.name}.scale", shape=shape, whole=whole, split=split, dtype="float32")  # type: ignore[arg-type]
    return [dataclasses.replace(ref, name=f"{ref.name}.values", dtype="int8"), scale]


def _quantised(name: str, array: np.ndarray, int8: frozenset[str]) -> dict[str, np.ndarray]:
    """A device's share of a weight by suffix: itself, or its int8 values and scales."""
    if name not in int8:
        return {"": array}
    from model.quantised import quantise

    dim = _contracted(name)
    matrix = quantise(FORMATS[_INT8], np.moveaxis(array, dim, -1).astype(np.float32))
    return {".values": np.ascontiguousarray(np.moveaxis(matrix.values, -1, dim)), ".scale": matrix.scale[..., 0]}


def _caches(held: tuple[Value, ...], split: bool) -> list[Value]:
    """A unit's caches as its graphs name them."""
    out = []
    for value in held:
        if split and is_latent(value.name):
            out += values(split_port(Port(value.name, value.shape, value.dtype)))
        else:
            out.append(value)
    return out


def _graph_files(manifest: Manifest) -> list[str]:
    chains = [chain for program in manifest.programs for chain in program.units.values()]
    return list(dict.fromkeys(file for chain in chains for step in chain for file in step.files.values()))


def om(file: str) -> str:
    """Where a graph is compiled to, without ATC's ".om"."""
    return f"om/{file.removesuffix('.onnx')}"


def _script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


__all__ = ["AscendWriter", "om"]
