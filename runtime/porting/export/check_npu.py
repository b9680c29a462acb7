"""The calls of torch_npu's operators in a package's graphs: against their documentation, and torch_npu's own Meta
kernels where it imports."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from backends.ascend.check import refusal
from backends.ascend.declare import declare
from backends.ascend.device import why_not_imported
from backends.ascend.operators import npu_release
from backends.errors import ArtifactError
from foundation.errors import first_line
from runtime.execution.package.torch_archive import checked as opened


@dataclasses.dataclass
class NpuCalls:
    """refused: (file, what, why). checked, unchecked: see `check.CheckReport`."""

    calls: int = 0
    refused: list[tuple[Path, str, str]] = dataclasses.field(default_factory=list)
    checked: list[str] = dataclasses.field(default_factory=list)
    unchecked: list[str] = dataclasses.field(default_factory=list)


def check_calls(folder: Path, files: Sequence[Path]) -> NpuCalls:
    """Of all graphs of a package."""
    release, absent, found = npu_release(), why_not_imported(), NpuCalls()
    declare()
    for path in files:
        try:
            archive = opened(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.load(archive)
        except ArtifactError as error:
            found.refused.append((path, "graph", first_line(error)))
            continue
        except Exception as error:  # torch's own have no common base
            found.refused.append((path, "graph", f"torch does not read it ({first_line(error)})"))
            continue
        for node in program.graph.nodes:
            name = str(node.target).removeprefix("npu.").removesuffix(".default")
            if name not in release.operators or node.op != "call_function":
                continue
            found.calls += 1
            args, attributes = map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
            why = refusal(name, args, attributes)
            if why is None and absent is None:
                why = _of_the_vendor(node, args, attributes)
            if why is not None:
                found.refused.append((path, f"{name} -> {node.name}", why))
    found.checked += ["graphs (that torch opens them without trust)"]
    if found.calls:
        found.checked.append(
            f"calls of torch_npu's operators (documentation of {release.version}: types, ranks, values)"
        )
        meta = f"torch_npu {release.version}'s Meta kernels: shapes and types of results"
        if absent is None:
            found.checked.append(meta)
        else:
            found.unchecked.append(f"{meta} ({absent})")
    found.unchecked.append("a chip: what kernels take beyond that, and what they compute")
    return found


def _of_the_vendor(node: torch.fx.Node, args: Any, attributes: Any) -> str | None:
    """Why torch_npu's Meta kernel refuses a call, or how its results are others than the graph's."""
    args, attributes = pytree.tree_map_only(
        torch.Tensor,
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
        (args, attributes),
    )
    try:
        results = node.target(*args, **attributes)  # type: ignore[operator]
    except Exception as error:
        return f"torch_npu refuses it ({first_line(error)})"
    kinds = [[(tuple(x.shape), x.dtype) for x in pytree.tree_leaves(each)] for each in (results, node.meta["val"])]
    return None if kinds[0] == kinds[1] else f"torch_npu returns {kinds[0]}, the graph has {kinds[1]}"
