"""What is to be exported, and what a format's writer is given and gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from backends.ascend import constraints
from backends.ascend.operators import npu_release
from backends.toolchains import narrow
from backends.toolchains.walker import Graph, Port
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.formats import matrix_format, scheme
from model.split import Grid
from runtime.deployment.manifest import Format, Gear, Manifest, OpUse, Phase, Step, Value
from runtime.porting.export.units import Cut


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What to export. `grid` and `layout` say the same, to a graph and to a reader; `device`: the one device whose
    weights are written (None: all). `wide_dtype`: what activations, caches and all that the scheme leaves wide are in
    ("": the format's default). `options`: what only one format knows."""

    cfg: ModelConfig
    checkpoint: Checkpoint | None
    format: Format
    gears: Mapping[Phase, Sequence[Gear]]
    grid: Grid
    layout: str
    scheme: str
    page_size: int
    weights: bool
    device: int | None = None
    plan_hash: str | None = None
    wide_dtype: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cut(self) -> Cut:
        """The pool holds the largest gear's pages, and page 0."""
        gears = [gear for each in self.gears.values() for gear in each]
        pages = 1 + max(gear.sequences * gear.context_pages for gear in gears)
        mtp = self.cfg.mtp_layers > 0 and (self.checkpoint is None or self.checkpoint.has_mtp)
        found = scheme(self.scheme)
        replaced = narrow.lowerings(found, self.format)
        exchange = "operators" if self._operators_exchange else "collectives"
        return Cut(self.cfg, self.grid, self.dtype, found, self.page_size, pages, mtp, replaced, exchange)

    @property
    def _operators_exchange(self) -> bool:
        """Whether Ascend's operators that talk to other devices are wanted, take the activations, and are documented
        for the chip."""
        given = self.options.get("npu_options")
        taken = constraints.ACTIVATIONS if given is None else given.dtypes if given.fused else ()
        return (
            self.format == "ascend"
            and self.options.get("npu_ops", "all") == "all"
            and self.dtype in taken
            and constraints.undocumented(constraints.DISPATCH, self.series) is None
        )

    @property
    def series(self) -> str:
        """Of the chip: whose limits of Ascend's operators hold."""
        named = self._named_series
        return named if named in npu_release().series else constraints.DEFAULT_SERIES

    @property
    def documented(self) -> bool:
        """Whether the operators' documents tell of the chip's series, or none is named."""
        return self._named_series in (None, *npu_release().series)

    @property
    def _named_series(self) -> str | None:
        profile = self.options.get("profile")
        return profile.labels.get("chip.series", "") if profile else None

    @property
    def dtype(self) -> str:
        """By default what the chips have wide, bfloat16; in quantised ONNX float32, for ONNX Runtime on a CPU has no
        products in bfloat16."""
        found = scheme(self.scheme)
        narrow_onnx = self.format == "onnx" and any(matrix_format(name).narrow for name in found.formats)
        return self.wide_dtype or ("float32" if narrow_onnx or found.wide == "f32" else "bfloat16")


class Writer(Protocol):
    """A format. `write` stores a graph as a file (or a few) named after `stem`, below `folder`, and returns its step
    in the chain; `finish` may add files and amend the manifest before files are hashed."""

    packages: tuple[str, ...]
    """Whose versions go into the manifest."""

    def write(self, graph: Graph, folder: Path, stem: str) -> Step: ...

    def finish(self, folder: Path, manifest: Manifest) -> Manifest: ...


def values(ports: Sequence[Port]) -> tuple[Value, ...]:
    """Ports of a graph as the manifest has them."""
    return tuple(Value(port.name, port.shape, port.dtype) for port in ports)


def op_uses(found: Mapping[tuple[str, str, str], int]) -> tuple[OpUse, ...]:
    """Ops by (name, form, target), sorted."""
    return tuple(OpUse(name, form, count, target) for (name, form, target), count in sorted(found.items()))  # type: ignore[arg-type]
