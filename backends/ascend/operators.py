"""torch_npu's operators for ops of the contract (`npu_operators.toml`), and what each op becomes."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

_ATEN = {
    "glm.embed": "`index_select`",
    "glm.layer_norm": "the indexer's norm of 128 values, in float32",
    "glm.head_linear": "one `bmm`",
    "glm.bias": "`add`",
    "glm.expanded_attention": "keys and values are expanded from latents: products, which dominate a chunk",
    "glm.paged_attention": "products and a softmax: npu_fused_infer_attention_score is not mapped yet",
}
"""Ops that have no operator, and why or what they are instead."""


@dataclasses.dataclass(frozen=True)
class NpuOperator:
    """An operator `torch.ops.npu.<name>`: its schema, the ops of the contract it is used for, and what arguments are
    documented to be, by name: the `types` and `ranks` of tensors, the `values` of others; `same`: those of one type;
    `pairs`: `arguments` whose types are one of `types` together. exchange: it talks to other devices. series: the chips
    that it is documented for; heads: how many it takes, by series; lacks: what it takes elsewhere, by series; nd_only:
    series whose kernel takes no FRACTAL_NZ."""

    name: str
    schema: str
    ops: tuple[str, ...]
    types: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, tuple[int, ...]]
    values: Mapping[str, tuple[Any, ...]]
    same: tuple[tuple[str, ...], ...]
    pairs: Mapping[str, Any]
    exchange: bool
    series: tuple[str, ...]
    heads: Mapping[str, frozenset[int]]
    lacks: Mapping[str, tuple[str, ...]]
    nd_only: tuple[str, ...]

    @property
    def signature(self) -> str:
        """The schema without its namespace: "npu_rms_norm(Tensor input, ..) -> (..)"."""
        return self.schema.removeprefix("npu::")


@dataclasses.dataclass(frozen=True)
class NpuRelease:
    """The release of torch_npu whose schemas these are. series: of chips, as profiles name them (`chip.series`), that
    operators' documents tell apart."""

    version: str
    series: tuple[str, ...]
    operators: Mapping[str, NpuOperator]


@functools.cache
def npu_release() -> NpuRelease:
    text = (resources.files("backends.ascend") / "npu_operators.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    series = tuple(raw["series"])
    operators = {name: _npu_operator(name, entry, series) for name, entry in raw["operators"].items()}
    return NpuRelease(raw["version"], series, operators)


def _npu_operator(name: str, entry: Mapping[str, Any], series: tuple[str, ...]) -> NpuOperator:
    taken = {
        key: {argument: tuple(allowed) for argument, allowed in entry.get(key, {}).items()}
        for key in ("types", "ranks", "values")
    }
    same, heads = tuple(tuple(each) for each in entry.get("same", ())), entry.get("heads", {})
    return NpuOperator(
        name,
        entry["schema"],
        tuple(entry["ops"]),
        **taken,
        same=same,
        pairs=entry.get("pairs", {}),
        exchange=entry.get("exchange", False),
        series=tuple(entry.get("series", series)),
        heads={chip: frozenset(each.get("any") or range(1, each["most"] + 1)) for chip, each in heads.items()},
        lacks={chip: tuple(each) for chip, each in entry.get("lacks", {}).items()},
        nd_only=tuple(entry.get("nd_only", ())),
    )


def npu_form(op: str) -> str:
    """What `glm.*` op `op` may become, as a cell of a table: `lowerings.py` looks at the shapes and number formats of
    each call, and decomposes what a kernel would not take. Raises KeyError for an op without operators or a reason."""
    operators = [name for name, operator in npu_release().operators.items() if op in operator.ops]
    return ", ".join(f"`{name}`" for name in operators) if operators else f"decomposed: {_ATEN[op]}"
