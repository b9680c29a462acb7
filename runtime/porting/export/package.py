"""Writing a package: trace, cut, write each graph, then the weights, and last the manifest; whole or not at all.

Everything goes to a temporary folder beside the target, which takes its name at the end. A format is a `Writer`;
`writers()` lists them. A writer sees each graph once, and the finished package before its files are hashed, so that it
may add files of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from backends.toolchains.cut import Exchange
from backends.toolchains.walker import Graph
from foundation.errors import UsageError
from foundation.reading import Unreadable, read_json
from foundation.writing import new_folder
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.errors import TokenizerError
from model.hf_config import GENERATION_FILE
from model.split import Grid
from runtime.deployment.manifest import (
    FILE,
    Format,
    GearUnits,
    Layer,
    Manifest,
    PackageModel,
    Step,
    hash_file,
)
from runtime.porting.export import shares
from runtime.porting.export.job import ExportJob, Writer, values
from runtime.porting.export.units import Cut, caches, units, weight_refs

TOKENIZER, CHATS = "tokenizer.json", "tokenizer_config.json"


def writers() -> Mapping[Format, Callable[[ExportJob], Writer]]:
    """A constructor for each format; what it needs is imported when called."""
    return {"stablehlo": _stablehlo, "onnx": _onnx, "torch": _torch, "ascend": _ascend}


def _stablehlo(request: ExportJob) -> Writer:
    from runtime.porting.export.writers import StableHloWriter

    return StableHloWriter()


def _onnx(request: ExportJob) -> Writer:
    from runtime.porting.export.writers import OnnxWriter

    return OnnxWriter(request)


def _torch(request: ExportJob) -> Writer:
    from runtime.porting.export.writers import TorchWriter

    return TorchWriter()


def _ascend(request: ExportJob) -> Writer:
    from runtime.porting.export.ascend import AscendWriter

    return AscendWriter(request)


Check = Callable[[Path, Manifest], None]


def export(request: ExportJob, out: Path, check: Check | None = None) -> Manifest:
    """Writes the package to `out`, which must not exist or be an empty folder.

    check: is given the finished package before it takes its name; what it raises leaves nothing behind.
    Raises `UsageError`, `Unsupported` (a number format or primitive that the format lacks).
    """
    if request.device is not None and not 0 <= request.device < request.grid.devices:
        raise UsageError(f"--device {request.device}: the layout has devices 0 to {request.grid.devices - 1}")
    with new_folder(out) as folder:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: is not an empty folder; choose another or remove it")
        writer = writers()[request.format](request)
        what = request.cut
        programs = []
        for phase, gears in request.gears.items():
            for gear in gears:
                stem = f"{phase}-b{gear.sequences}-t{gear.tokens}-c{gear.context_pages * request.page_size}"
                (folder / stem).mkdir()
                written = {
                    name: tuple(_step(writer, link, folder, f"{stem}/{_file_name(link)}") for link in chain)
                    for name, chain in units(what, phase, gear).items()
                }
                programs.append(GearUnits(phase, gear, written))
        manifest = writer.finish(folder, _manifest(request, what, programs, folder, writer))
        if request.weights and not any(device.weights for device in manifest.devices):
            manifest = _write_weights(request, folder, manifest)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        manifest = dataclasses.replace(manifest, files={name: hash_file(folder / name) for name in names})
        (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
        if check is not None:
            check(folder, manifest)
    return manifest


def _file_name(link: Graph | Exchange) -> str:
    return link.name if isinstance(link, Graph) else ""


def _step(writer: Writer, link: Graph | Exchange, folder: Path, stem: str) -> Step:
    if isinstance(link, Graph):
        return writer.write(link, folder, stem)
    kind: Any = link.kind
    return Step(kind, values([link.value]), values([link.result]), axis=link.axis, dim=link.dim)


def _manifest(request: ExportJob, what: Cut, programs: list[GearUnits], folder: Path, writer: Writer) -> Manifest:
    cfg, grid, checkpoint = request.cfg, request.grid, request.checkpoint
    found = shares.devices(cfg, grid)
    if request.device is not None:
        found = (found[request.device],)
    return Manifest(
        format=request.format,
        model=model_ref(cfg, checkpoint),
        dtype=what.dtype,
        formats=request.scheme,
        page_size=request.page_size,
        pool_pages=what.pool_pages,
        axes=what.axes,
        programs=tuple(programs),
        layers=tuple(Layer(index, kind.name) for index, kind in enumerate(cfg.layers)),
        caches=caches(what),
        weights={"outer": weight_refs(what, None)}
        | {name: weight_refs(what, kind) for name, kind in what.unit_types.items()},
        devices=found,
        toolchain={name: metadata.version(name) for name in ("glm5-runtime", "jax", "jaxlib", *writer.packages)},
        files={},
        layout=request.layout,
        mtp=cfg.mtp_type.name if what.mtp else None,
        plan_hash=request.plan_hash,
        tokenizer=_write_tokenizer(checkpoint, folder),
        expert_slots=_slots(cfg, grid),
    )


def model_ref(cfg: ModelConfig, checkpoint: Checkpoint | None) -> PackageModel:
    """Who the model is. The hash is of the config.json's canonical JSON, or of the preset's fields."""
    raw: Any = checkpoint.raw_config if checkpoint else dataclasses.asdict(cfg)
    return PackageModel(
        name=checkpoint.path.resolve().name if checkpoint else cfg.name,
        model_type=cfg.model_type,
        config_sha256=hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest(),
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        max_positions=cfg.max_positions,
        stop_token_ids=tuple(sorted({*cfg.eos_token_ids, *_stops(checkpoint)})),
        index_topk=cfg.indexer.topk if cfg.indexer else None,
    )


def _stops(checkpoint: Checkpoint | None) -> tuple[int, ...]:
    if checkpoint is None or not (checkpoint.path / TOKENIZER).exists():
        return ()
    from model.tokenizer import Tokenizer

    return Tokenizer.load(checkpoint.path).stop_token_ids


def _slots(cfg: ModelConfig, grid: Grid) -> dict[str, tuple[int, ...]]:
    placed = {str(layer): grid.placement(cfg, layer) for layer in range(cfg.num_layers)}
    return {layer: tuple(int(e) for e in found[0]) for layer, found in placed.items() if found is not None}


def _write_tokenizer(checkpoint: Checkpoint | None, folder: Path) -> str | None:
    if checkpoint is None or not (checkpoint.path / TOKENIZER).exists():
        return None
    from model.tokenizer import ChatTemplate, Tokenizer

    (folder / TOKENIZER).write_text(Tokenizer.load(checkpoint.path).to_json(), encoding="utf-8")
    with contextlib.suppress(TokenizerError):  # a package without chats generates all the same
        if template := ChatTemplate.find(checkpoint.path):
            (folder / CHATS).write_text(json.dumps(template.to_config()), encoding="utf-8")
    with contextlib.suppress(Unreadable):
        recommended = read_json(checkpoint.path / GENERATION_FILE)
        (folder / GENERATION_FILE).write_text(json.dumps(recommended), encoding="utf-8")
    return TOKENIZER


def _write_weights(request: ExportJob, folder: Path, manifest: Manifest) -> Manifest:
    if request.checkpoint is None:
        raise UsageError("--weights external needs weights to write: give --checkpoint, or --weights none")
    names = shares.write_files(folder, request.checkpoint, request.grid, manifest.devices, manifest)
    devices = tuple(dataclasses.replace(d, weights=names[d.index]) for d in manifest.devices)
    return dataclasses.replace(manifest, devices=devices)
