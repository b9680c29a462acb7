"""Writes the table of torch_npu's operators into docs/ascend.md.

python -m tools.docs_ascend
"""

from __future__ import annotations

from pathlib import Path

from backends.ascend.operators import npu_release

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ascend.md"
BEGIN, END = "<!-- made by `python -m tools.docs_ascend` -->", "<!-- end -->"


def table() -> str:
    """The operators: what they are used for, the chips that they are documented for as graphs call them, and the schema
    they were checked against."""
    release = npu_release()
    rows = [f"| operator | used for | documented for | schema in torch_npu {release.version} |", "|---|---|---|---|"]
    for name, operator in release.operators.items():
        ops = ", ".join(f"`{op}`" for op in operator.ops)
        chips = "all" if operator.series == release.series else ", ".join(operator.series)
        rows.append(f"| `{name}` | {ops} | {chips} | `{operator.signature.removeprefix(name)}` |")
    return "\n".join(rows)


def render(page: str) -> str:
    """The page with the table as it is now."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
