"""Packages for the tests, made as `glm5 export --format ascend` makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from hw_profiles import load
from model.checkpoint import Checkpoint
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.manifest import FILE, Gear, Manifest, hash_file
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting.export import options as cutting
from runtime.porting.export import package
from runtime.porting.export.job import ExportJob


def request(
    scheme: str = "f32",
    model: str | None = None,
    layout: Layout = Layout(),
    gears: dict[str, list[Gear]] | None = None,
    weights: bool = True,
    checkpoint: Path | None = None,
    device: int | None = None,
    **options: Any,
) -> ExportJob:
    """A checkpoint (the embedded one), or a preset's graphs, at one small decode gear."""
    opened = None if model else Checkpoint(checkpoint or embedded_checkpoint())
    cfg = opened.config if opened else load_config(str(model))
    placed = cutting.from_layout(cfg, layout)
    if isinstance(options.get("profile"), str):
        options["profile"] = load(options["profile"])
    return ExportJob(
        cfg=cfg,
        checkpoint=opened,
        format="ascend",
        gears=gears or {"decode": [Gear(2, 1, 8)]},  # type: ignore[arg-type]
        grid=placed.grid,
        layout=placed.name,
        scheme=scheme,
        page_size=16,
        weights=weights and opened is not None,
        device=device,
        options=options,
    )


def export(folder: Path, **arguments: Any) -> Path:
    package.export(request(**arguments), folder)
    return folder


def edit(folder: Path, file: str, change: Callable[[onnx.ModelProto], Any]) -> Path:
    """A graph of a package changed, with the manifest's hash set right."""
    model = onnx.load(str(folder / file))
    change(model)
    (folder / file).write_bytes(model.SerializeToString())
    manifest = Manifest.read(folder)
    return save(folder, dataclasses.replace(manifest, files={**manifest.files, file: hash_file(folder / file)}))


def save(folder: Path, manifest: Manifest) -> Path:
    (folder / FILE).write_text(manifest.to_json())
    return folder


def graph_file(folder: Path, unit: str) -> str:
    """The first graph of a unit."""
    steps = Manifest.read(folder).programs[0].units[unit]
    return next(step.files["any"] for step in steps if step.files)
