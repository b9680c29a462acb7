"""Packages whose graphs are of torch_npu's operators: the torch format's, with another writer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from backends.ascend.npu.target import NpuOptions
from backends.ascend.npu.writer import halves, write
from backends.toolchains.walker import Graph, Port
from model.checkpoint import Checkpoint
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.manifest import Gear, Manifest, Phase, Step
from runtime.porting.export import options as cutting
from runtime.porting.export import package
from runtime.porting.export.job import ExportJob, values


@dataclasses.dataclass
class GraphWriter:
    """A writer (`runtime.porting.export.job.Writer`). `used` counts torch_npu's operators."""

    options: NpuOptions
    used: Counter[str] = dataclasses.field(default_factory=Counter)
    packages: tuple[str, ...] = ("torch",)

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        made = write(graph, self.options)
        (folder / f"{stem}.pt2").write_bytes(made.archive)
        self.used.update(operator for _, operators in made.used.elements() for operator in operators)
        return Step(
            kind="graph",
            name=graph.name,
            inputs=values(made.inputs),
            outputs=values(made.outputs),
            files={"any": f"{stem}.pt2"},
            aliases=dict(made.aliases),
        )

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        caches = {
            unit: values([p for each in held for p in self._parts(Port(each.name, each.shape, each.dtype))])
            for unit, held in manifest.caches.items()
        }
        return dataclasses.replace(manifest, caches=caches)

    def _parts(self, port: Port) -> tuple[Port, ...]:
        return tuple(halves(port)) if self.options.splits(port) else (port,)


def request(
    model: str | Path, scheme: str, gears: dict[Phase, list[Gear]], layout: Layout = Layout(), page_size: int = 16
) -> ExportJob:
    """Of a preset by its name, without weights, or of a checkpoint."""
    checkpoint = Checkpoint(model) if isinstance(model, Path) else None
    cfg = checkpoint.config if checkpoint else load_config(str(model))
    placed = cutting.from_layout(cfg, layout)
    return ExportJob(
        cfg=cfg,
        checkpoint=checkpoint,
        format="torch",
        gears=gears,
        grid=placed.grid,
        layout=placed.name,
        scheme=scheme,
        page_size=page_size,
        weights=checkpoint is not None,
    )


def export(job: ExportJob, folder: Path, options: NpuOptions, monkeypatch: pytest.MonkeyPatch) -> GraphWriter:
    writer = GraphWriter(options)
    monkeypatch.setattr(package, "writers", lambda: {"torch": lambda _: writer})
    package.export(job, folder)
    return writer
