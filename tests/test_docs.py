"""The generated pages are what their generators make of the code as it is, and links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from tools import docs_cli, docs_ops

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("hw_profiles/*.md")])


@pytest.mark.parametrize("tool", [docs_ops, docs_cli])
def test_generated_pages(tool: ModuleType) -> None:
    committed = tool.DEFAULT.read_text(encoding="utf-8")
    assert committed == tool.render(), f"run `python -m {tool.__name__}`"


def test_every_command_and_op_is_there() -> None:
    commands = docs_cli.DEFAULT.read_text(encoding="utf-8")
    assert all(f"## glm5 {verb}\n" in commands for verb in ("run", "model", "backends", "profiles show"))
    assert "`--prompt-ids TEXT`" in commands and "`--set TEXT`" in commands
    assert "| `glm.expert_ffn` | `x, experts, weights, *matrices` |  | cpu" in docs_ops.render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
