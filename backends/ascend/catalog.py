"""The four lists of this folder, read once: ATC's operators, its limits, CANN's fused operators, and torch_npu's."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

STANDARD = "ai.onnx"  # ONNX's own domain, written "" in a node
PLUGIN = "cann"  # the domain that a package's plugin registers
SHIPPED = "npu"  # the domain that CANN registers


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("backends.ascend") / name).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class AtcOperator:
    """An ONNX operator that ATC's parser knows: `opsets` it is registered for, what it becomes, and where that is
    written."""

    domain: str
    name: str
    opsets: frozenset[int]
    cann: str
    source: str


@dataclasses.dataclass(frozen=True)
class CannOperator:
    """A fused operator of CANN: its ONNX node (`domain::type`), inputs, outputs and attributes in the order of its
    definition, and what it takes. `unused`: why no graph has it, where that is so."""

    name: str
    node: str
    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, str]
    dtypes: tuple[str, ...]
    chips: tuple[str, ...]
    source: str
    constraint: str
    covers: tuple[str, ...] = ()
    since: str = ""
    unused: str = ""

    @property
    def domain(self) -> str:
        return self.node.partition("::")[0]

    @property
    def type(self) -> str:
        return self.node.partition("::")[2]

    @property
    def shipped(self) -> bool:
        """CANN itself maps the node; otherwise the package's plugin does."""
        return self.domain != PLUGIN


@functools.cache
def atc_operators() -> Mapping[tuple[str, str], AtcOperator]:
    """ATC's operators by (domain, type)."""
    raw, found = _read("atc_operators.toml"), {}
    for domain in (STANDARD, SHIPPED):
        for name, line in raw[domain].items():
            opsets, cann, source = (part.strip() for part in line.split("|"))
            found[domain, name] = AtcOperator(domain, name, _opsets(opsets), cann, source)
    return found


def _opsets(text: str) -> frozenset[int]:
    spans = [part.partition("-") for part in text.split(",")]
    return frozenset(v for low, _, high in spans for v in range(int(low), int(high or low) + 1))


@functools.cache
def sources() -> Mapping[str, Mapping[str, str]]:
    """Title, url and date of every source, by its short name."""
    return {**_read("atc_operators.toml")["sources"], **_read("atc_limits.toml")["sources"]}


@functools.cache
def limits() -> Mapping[str, Any]:
    """`atc_limits.toml`."""
    return _read("atc_limits.toml")


@functools.cache
def cann_operators() -> Mapping[str, CannOperator]:
    """CANN's fused operators by name."""
    found = {}
    for name, entry in _read("cann_operators.toml").items():
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        found[name] = CannOperator(name=name, **fields)
    return found


def cann_by_node(domain: str, type_: str) -> CannOperator | None:
    """The fused operator of an ONNX node, if it is one."""
    return next((o for o in cann_operators().values() if (o.domain, o.type) == (domain, type_)), None)


def family(soc_version: str) -> str | None:
    """The chip family ("ascend910b") of a `--soc_version`, or None for one that no rule knows."""
    for prefix, name in limits()["families"].items():
        if soc_version.startswith(prefix):
            return name
    return None


def most_gears(soc_version: str | None) -> int:
    """How many shape gears ATC takes for a chip."""
    gears = limits()["gears"]
    return gears["most_ascend950"] if soc_version and family(soc_version) == "ascend950" else gears["most"]


@dataclasses.dataclass(frozen=True)
class NpuOperator:
    """An operator `torch.ops.npu.<name>`: its schema, the ops of the contract it is used for, and what arguments are
    documented to be, by name: the `types` and `ranks` of tensors, the `values` of others; `same`: those of one type."""

    name: str
    schema: str
    ops: tuple[str, ...]
    types: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, tuple[int, ...]]
    values: Mapping[str, tuple[Any, ...]]
    same: tuple[tuple[str, ...], ...]

    @property
    def signature(self) -> str:
        """The schema without its namespace: "npu_rms_norm(Tensor input, ..) -> (..)"."""
        return self.schema.removeprefix("npu::")


@dataclasses.dataclass(frozen=True)
class NpuRelease:
    """The release of torch_npu whose schemas these are."""

    version: str
    operators: Mapping[str, NpuOperator]


@functools.cache
def npu_release() -> NpuRelease:
    raw = _read("npu_operators.toml")
    operators = {name: _npu_operator(name, entry) for name, entry in raw["operators"].items()}
    return NpuRelease(raw["version"], operators)


def _npu_operator(name: str, entry: Mapping[str, Any]) -> NpuOperator:
    taken = {
        key: {argument: tuple(allowed) for argument, allowed in entry.get(key, {}).items()}
        for key in ("types", "ranks", "values")
    }
    same = tuple(tuple(each) for each in entry.get("same", ()))
    return NpuOperator(name, entry["schema"], tuple(entry["ops"]), **taken, same=same)
