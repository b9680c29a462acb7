"""What an exported package says of itself: `manifest.json`, schema-versioned. Free of JAX. See docs/export.md.

A package holds *units* (embedding, one for each layer type, head, ..). A unit is a chain of *steps* over named
values: run a graph, or do a collective between devices. A unit of one device is one graph; under tensor or expert
parallelism it is cut where the devices must talk, and the host (or HCCL, NCCL) does the collective between the
graphs, so that every graph is one that any runtime can load.

The names of values are the wiring, and the same in every format:
- "tokens", "start", "length", "page_table": the batch; "positions", "slots": made of it by the unit "view";
- "x": hidden states; "selected": the sparse selection; "hidden", "logits": results of the head;
- "w.NAME": a weight of the layer, "outer.NAME": of the embedding or head (in a narrow format
  "w.NAME.values" and "w.NAME.scale"); "cache.NAME": a layer's pages;
- "rank.tp", "rank.dp": int32 scalars, the device's place; graphs are the same on all devices;
- "mid.N": what one graph of a unit hands to a later one;
- "NAME.out": the new NAME, an output; the runner feeds it as NAME to the next unit (or as the layer's cache to the
  next step).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from backends.errors import ArtifactError
from foundation.paths import Outside, inside
from foundation.reading import Unreadable, parse_json, read_text
from runtime.deployment.document import Fault, place, validated
from runtime.deployment.sound import manifest_faults, number_faults

SCHEMA_VERSION = 2
FILE = "manifest.json"
OUT = ".out"  # suffix of the new value of a name

Format = Literal["stablehlo", "onnx", "torch", "ascend"]
PACKAGE_FORMATS: tuple[Format, ...] = get_args(Format)
Phase = Literal["prefill", "decode"]
StepKind = Literal["graph", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

MOST_STEP = 1 << 26
"""Tokens of a step, and pages of the contexts that it reads; of a gear's sizes in all."""


@dataclasses.dataclass(frozen=True)
class Gear:
    """A static size of a step: `tokens` new ones of each of `sequences`, over `context_pages` pages each."""

    sequences: int
    tokens: int
    context_pages: int


@dataclasses.dataclass(frozen=True)
class Value:
    """An input or output of a graph. `dtype` in numpy's spelling, "bfloat16" and "float8_e4m3fn" included."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class OpUse:
    """An op of the contract in a graph: how often, and its form there: "composite", "function", "custom"
    (an operator of the target, named in `target`) or "decomposed"."""

    name: str
    form: Literal["composite", "function", "custom", "decomposed"]
    count: int
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A link of a unit's chain.

    kind "graph": `files` maps a platform to the graph's file: "any" is what any toolchain takes, "cpu" and "cuda" are
    what JAX loads there;
    inputs and outputs in the graph's own order; `aliases` maps an output to the input whose buffer it may take over.
    Other kinds are collectives over mesh axis `axis`, from the value `inputs[0]` to `outputs[0]`:
    "all_reduce" sums; "all_gather" concatenates along `dim` in order of rank; "reduce_scatter" sums and returns
    each device its part of `dim`; "all_to_all" sends part r of `dim` to rank r, and concatenates what comes.
    """

    kind: StepKind
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    name: str = ""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    ops: tuple[OpUse, ...] = ()
    axis: str = ""
    dim: int = 0


@dataclasses.dataclass(frozen=True)
class GearUnits:
    """The units of one phase at one gear, by name."""

    phase: Phase
    gear: Gear
    units: dict[str, tuple[Step, ...]]


@dataclasses.dataclass(frozen=True)
class WeightRef:
    """A weight of a unit: its share on one device, and how it is made of the checkpoint's tensors.

    sources: names with `{layer}` for the layer's index and `{e}` for an expert's. layout: docs/checkpoints.md.
    whole: the shape of the undivided weight; split: for each of its dims the mesh axes it is divided over, in order.
    format: of the values or scales of a matrix in a narrow format, which one; they are the sources rounded to it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    whole: tuple[int, ...]
    split: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]
    layout: str
    format: str = ""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An entry of the schedule: layer `index` runs `unit`."""

    index: int
    unit: str


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """A device of the layout: its stage and its rank on each mesh axis, the layers it runs, and, where weights are
    written out, its safetensors file: tensors "layers.INDEX.NAME", "outer.NAME", "mtp.NAME" in the graph's layout."""

    index: int
    stage: int
    ranks: dict[str, int]
    layers: tuple[int, ...]
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class PackageModel:
    """Which model: enough to run a package. `config_sha256` is of the config.json's canonical JSON.
    `stop_token_ids` end an answer."""

    name: str
    model_type: str
    config_sha256: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    stop_token_ids: tuple[int, ...]
    index_topk: int | None = None


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the package."""

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A package. `axes`: mesh axes and their sizes ("dp", "tp"), empty on one device. `pool_pages`: pages of every
    cache, page 0 (padding) included; `caches`: unit -> its caches, as "cache.NAME" values. `mtp`: the unit of the MTP
    layer, where there is one. `plan_hash`: of the plan
    the package was cut by. `expert_slots`: layer -> the expert in each slot, where slot e is not expert e; ep rank r
    holds an equal run of slots, the r-th. `toolchain`: versions of what made it. `files`: every other file. `extra`:
    what only one format has."""

    format: Format
    model: PackageModel
    dtype: str
    formats: str
    page_size: int
    pool_pages: int
    axes: dict[str, int]
    programs: tuple[GearUnits, ...]
    layers: tuple[Layer, ...]
    caches: dict[str, tuple[Value, ...]]
    weights: dict[str, tuple[WeightRef, ...]]
    devices: tuple[DeviceShare, ...]
    toolchain: dict[str, str]
    files: dict[str, File]
    layout: str = ""
    mtp: str | None = None
    plan_hash: str | None = None
    tokenizer: str | None = None
    expert_slots: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = FILE) -> Manifest:
        """Raises `ArtifactError` for another version, missing, unknown or mistyped fields."""
        try:
            raw = parse_json(text)
            version = raw["schema_version"]
        except (Unreadable, KeyError, TypeError):
            raise ArtifactError(f"{where}: not a manifest, or it is truncated; export it again") from None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where}: manifest version {version!r}, this release reads {SCHEMA_VERSION}; export it again"
            )
        return validated(cls, raw, ArtifactError, where, say=_say)

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest of a package folder; the other files are not touched (see `check_files`)."""
        path = Path(folder) / FILE
        try:
            text = read_text(inside(folder, FILE))
        except (Outside, Unreadable):
            raise ArtifactError(f"{folder}: no exported package (it has no readable {FILE})") from None
        made = cls.from_json(text, str(path))
        if fault := next(itertools.chain(number_faults(dataclasses.asdict(made)), manifest_faults(made)), None):
            raise ArtifactError(f"{path}: {fault}; export it again")
        return made

    @property
    def owner_units(self) -> dict[str, str]:
        """The unit that each owner's weights belong to: "outer", "layers.INDEX" and "mtp"."""
        found = {"outer": "outer"} | {f"layers.{layer.index}": layer.unit for layer in self.layers}
        return found | ({"mtp": self.mtp} if self.mtp else {})

    def owners(self, device: DeviceShare) -> list[str]:
        """Whose weights a device holds: "outer" on the first and last stage, its layers', on the last stage MTP's."""
        last = device.layers[-1] == self.layers[-1].index
        held = ["outer"] * (last or device.stage == 0) + [f"layers.{layer}" for layer in device.layers]
        return held + ["mtp"] * (last and self.mtp is not None)

    def named_files(self) -> Iterator[tuple[str, str]]:
        """What the fields name as files, each behind its field: `devices[0].weights`."""
        for number, program in enumerate(self.programs):
            for unit, chain in program.units.items():
                for link, step in enumerate(chain):
                    for platform, name in step.files.items():
                        yield place(("programs", number, "units", unit, link, "files", platform)), name
        for number, device in enumerate(self.devices):
            if device.weights is not None:
                yield place(("devices", number, "weights")), device.weights
        if self.tokenizer is not None:
            yield "tokenizer", self.tokenizer

    def program(self, phase: Phase) -> tuple[GearUnits, ...]:
        """The programs of a phase, smallest gear first."""
        found = [program for program in self.programs if program.phase == phase]
        return tuple(sorted(found, key=lambda p: (p.gear.context_pages, p.gear.sequences, p.gear.tokens)))


def _say(where: str, fault: Fault) -> str:
    at = place(("manifest", *fault.path))
    if fault.missing:
        what = f"{at} lacks the field `{fault.missing[0]}`"
    elif fault.unknown:
        what = f"{at} has the unknown field `{fault.unknown[0]}`"
    else:
        what = f"{at} {fault.wrong}, not {fault.shown}"
    return f"{where}: {what}; export it again"


def hash_file(path: Path) -> File:
    """Hash and size of a file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(digest, path.stat().st_size)


def wrong_files(folder: str | Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What of a package's files is not as its manifest says: name and reason. No file outside the folder is read.

    What a graph, a device's weights or the tokenizer is must be listed in `files`, with its size and hash.
    """
    for field, name in manifest.named_files():
        if name not in manifest.files:
            yield name, f"{field} names it and the manifest's `files` do not list it"
    for name, expected in manifest.files.items():
        try:
            path = inside(folder, name)
        except Outside as error:
            yield name, f"{error}, the manifest lists it"
            continue
        size = path.stat().st_size
        if size != expected.bytes:
            yield name, f"{size} bytes where the manifest says {expected.bytes}"
        elif hash_file(path).sha256 != expected.sha256:
            yield name, "altered (its hash is not the manifest's)"


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """Raises `ArtifactError` for the first file that is missing, truncated, altered, outside or not listed."""
    for name, why in wrong_files(folder, manifest):
        shown = Path(folder) / name if name.isprintable() else repr(name)
        raise ArtifactError(f"{shown}: {why}; export the package again")
