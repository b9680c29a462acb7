"""Writes docs/ops.md from the op contract: names, operands, attributes, meanings, kernels.

    python -m tools.docs_ops [FILE]      [default: docs/ops.md]

The meanings are the docstrings of `model/ops.py`; kernels are what the backends' `lowerings` name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from backends import registry
from backends.toolchains.forms_table import forms
from model.ops import OPS, Op
from tools import page

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "ops.md"

HEAD = """# Ops

<!-- made by `python -m tools.docs_ops`; do not edit -->

The named operations the graph is made of. Each is a `jax.lax.composite`: one equation in a traced graph, one
`stablehlo.composite` in an export. Its decomposition in `model/ops.py` is its meaning; a backend may have a kernel
of its own, and runs the decomposition where it has none.

Shapes use: b sequences, t query tokens, c context tokens (pages x page size), h heads, d model width, l latent width,
n flat tokens, k choices, e experts, f expert width, p pages per sequence, s page size. Operands marked `*` are one
array, or FP8 values and their block scales.

"""

EXPORTS = """## In exports

What `glm5 export` makes of each op ([export.md](export.md)). A function is model-local: any runtime can inline it.
"Decomposed" says into what, or why. torch_npu's operators are used where a call's shapes and formats suit them
([ascend.md](ascend.md)). Of matrices in `w8a8-int8`, `w4a8` and `w4a16`, `glm.linear` and `glm.expert_ffn` carry the
attribute `format` and are the products of that format ([your_compiler.md](your_compiler.md)).

"""


def kernels() -> dict[str, list[str]]:
    """Op name to the backends with a kernel of their own for it."""
    found: dict[str, list[str]] = {}
    for backend in registry.names():
        for name in registry.get(backend).lowerings():
            found.setdefault(name, []).append(backend)
    return found


def signature(op: Op) -> tuple[str, str]:
    """An op's operands and its attributes, with their types."""
    operands, attributes = [], []
    for parameter in inspect.signature(op.meaning).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            attributes.append(f"{parameter.name}: {parameter.annotation}")
        else:
            starred = parameter.kind is parameter.VAR_POSITIONAL
            operands.append("*" * starred + parameter.name)
    return ", ".join(operands), ", ".join(attributes)


def render(ops: Mapping[str, Op] = OPS) -> str:
    """The page."""
    own = kernels()
    table = ["| op | operands | attributes | kernels |", "|---|---|---|---|"]
    meanings = ["## Meanings"]
    for name, op in ops.items():
        operands, attributes = signature(op)
        table.append(
            f"| `{name}` | `{operands}` | {attributes and f'`{attributes}`'} | {', '.join(own.get(name, []))} |"
        )
        meanings.append(f"### {name}\n\n{inspect.getdoc(op.meaning)}")
    exported = ["| op | StableHLO | ONNX | torch | ascend |", "|---|---|---|---|---|"]
    for name in ops:
        found = forms(name)
        exported.append(f"| `{name}` | {found.stablehlo} | {found.onnx} | {found.torch} | {found.npu} |")
    sections = ["\n".join(table), EXPORTS + "\n".join(exported), *meanings]
    return HEAD + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    page.write(__doc__, DEFAULT, render)
