"""The generated pages are what their generators make of the code as it is, and what pages point at is there: links,
files and the names in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tools import docs_cli, docs_engines, docs_formats, docs_ops, docs_validation

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("hw_profiles/*.md"), *ROOT.glob("tests/**/*.md")]
)
FOLDERS = ("foundation", "hw_profiles", "model", "backends", "runtime", "tests", "bench", "tools", "docs")
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
OURS = re.compile(rf"(?:{'|'.join(FOLDERS)})(?:/[\w.*-]+)*/?")
A_FILE = re.compile(r"([\w/-]+\.py|[\w-]+/[\w/-]+\.toml)(?:: (\w+(?:\.\w+)*))?")


@pytest.mark.parametrize("tool", [docs_ops, docs_cli, docs_formats, docs_engines])
def test_generated_pages(tool: ModuleType) -> None:
    committed = tool.DEFAULT.read_text(encoding="utf-8")
    assert committed == tool.render(), f"run `python -m {tool.__name__}`"


@pytest.mark.parametrize(
    "block",
    [
        "causes",
        "bands",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("steps", "silicon", "groups", "peers")),
    ],
)
def test_tables_of_predictions(block: str) -> None:
    """The dearer ones (`front-end`, `ablation`) are made by hand."""
    made = docs_validation.BLOCKS[block]()
    assert docs_validation.held(block) == made, f"run `python -m tools.docs_validation {block}`"


def test_every_command_and_op_is_there() -> None:
    commands = docs_cli.DEFAULT.read_text(encoding="utf-8")
    assert all(f"## glm5 {verb}\n" in commands for verb in ("run", "model", "backends", "profiles show"))
    assert "`--prompt-ids TEXT`" in commands and "`--set TEXT`" in commands
    assert "| `glm.expert_ffn` | `x, experts, weights, *matrices` | `across: Across` | cpu" in docs_ops.render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def quoted(text: str) -> list[str]:
    """What a page has between backticks, blocks of code left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a module or class defines, those of its classes as `Class.name` too."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef(name=name):
                yield name
                yield from (f"{name}.{inner}" for inner in defined(node))
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from (found.id for found in ast.walk(target) if isinstance(found, ast.Name))


def missing(spans: list[str]) -> list[str]:
    """Paths and `file.py: name` among what a page quotes that lead nowhere. A file without its folder may be any of
    that name."""
    found = []
    for span in spans:
        if OURS.fullmatch(span) and "/" in span and not any(ROOT.glob(span.rstrip("/"))):
            found.append(span)
        elif match := A_FILE.fullmatch(span):
            path, name = match.groups()
            files = [ROOT / file for file in FILES if f"/{file}".endswith(f"/{path}")]
            if not any(name is None or name in defined(ast.parse(file.read_text())) for file in files):
                found.append(span)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_quoted_files_are_there(page: Path) -> None:
    assert missing(quoted(page.read_text(encoding="utf-8"))) == []


def test_what_leads_nowhere_is_caught() -> None:
    there = "`model/ops.py: substitute`, `ops.py: OPS`, `model/split.py:\nLayout.check`, `runtime/deployment/`, `/a/b`"
    assert missing(quoted(there)) == []
    gone = ["runtime/engine/", "model/layout.py", "model/ops.py: Layout", "gone.py", "split.py: Layout.gone"]
    assert missing(quoted(" ".join(f"`{span}`" for span in gone) + "\n```sh\n`x/y.py`\n```")) == gone
