"""Ascend packages for the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.ascend.target import NpuOptions
from model.checkpoint import Checkpoint
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.manifest import Gear, Manifest, Phase
from runtime.porting.export import options as cutting
from runtime.porting.export import package
from runtime.porting.export.job import ExportJob
from tests.npu.graphs import F32


def request(
    model: str | Path,
    scheme: str,
    gears: Mapping[Phase, Sequence[Gear]],
    layout: Layout = Layout(),
    page_size: int = 16,
) -> ExportJob:
    """Of a preset by its name, without weights, or of a checkpoint."""
    checkpoint = Checkpoint(model) if isinstance(model, Path) else None
    cfg = checkpoint.config if checkpoint else load_config(str(model))
    placed = cutting.from_layout(cfg, layout)
    return ExportJob(
        cfg=cfg,
        checkpoint=checkpoint,
        format="ascend",
        gears=gears,
        grid=placed.grid,
        layout=placed.name,
        scheme=scheme,
        page_size=page_size,
        weights=checkpoint is not None,
    )


def export(job: ExportJob, folder: Path, options: NpuOptions = F32) -> Manifest:
    """By default with operators in float32 too, to compare what graphs mean and not how they round."""
    return package.export(dataclasses.replace(job, options={**job.options, "npu_options": options}), folder)


def operators(manifest: Manifest) -> set[str]:
    """Of torch_npu, that a package's graphs call."""
    return set(manifest.extra["ascend"]["operators"])
