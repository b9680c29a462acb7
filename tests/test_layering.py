"""Imports point down only, and what plans or simulates is free of JAX. The checkers are tested too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# runtime -> backends -> model; runtime, backends -> hw_profiles; all -> foundation (docs/structure.md, "Packages")
MAY_IMPORT = {
    "runtime": {"runtime", "backends", "model", "hw_profiles", "foundation"},
    "backends": {"backends", "model", "hw_profiles", "foundation"},
    "model": {"model", "foundation"},
    "hw_profiles": {"hw_profiles", "foundation"},
    "foundation": {"foundation"},
}
STANDARD_LIBRARY_ONLY = {"hw_profiles", "foundation"}
# But these, which are the main program of a child process and what it is made of: nobody else may import them,
IN_A_CHILD = {"foundation.text_worker", "foundation.template_sandbox", "runtime.api.grammar_trial"}
# but this for texts that it knows.
NEEDS_NO_CHILD = {"foundation.known_text": {"foundation.text_worker"}}
# Inside runtime, from the ground up: a folder imports those before it, and itself.
FLOORS = (
    "deployment",
    "serving",
    "pricing",
    "simulation",
    "planning",
    "execution",
    "reports",
    "training",
    "porting",
    "api",
    "cli",
)
OURS = {*MAY_IMPORT, "tests", "bench"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Only these modules, and those below them, may need JAX. Of backends, none is imported here.
MODEL_WITHOUT_JAX = (
    "config", "hf_config", "formats", "split", "spelling", "quantization_config", "weights", "cache", "quantised",
    "checkpoint", "checkpoint_writer", "tokenizer", "errors", "safetensors_file",
)  # fmt: skip
RUNTIME_WITH_JAX = (
    "runtime.pricing.trace",
    "runtime.execution.",
    "runtime.training.",
    "runtime.porting.calibrate",
    "runtime.api.pace",
    "runtime.porting.export.",
)
# Only these may import Flax and optax, which come with the `train` extra, and what imports those.
TRAIN_EXTRA = (
    "model.module",
    "runtime.training.export",
    "runtime.training.forward",
    "runtime.training.optimizer",
    "runtime.training.params",
    "runtime.training.state",
    "runtime.training.steps",
    "runtime.training.trainer",
    "runtime.training.rl.generators",
    "runtime.training.rl.learner",
    "runtime.training.rl.process",
    "runtime.training.rl.trainer",
)
TRAIN_VERBS = ("runtime.cli.train", "runtime.cli.rl")  # import them when they are called


def modules(root: Path) -> dict[str, Path]:
    """Every module of our packages, by dotted name."""
    found = {}
    for package in MAY_IMPORT:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file: nested ones too, and `import_module("..")`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                # `from package import module` imports the module: name it, so that rules can see it
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            case ast.ImportFrom():
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                base += [node.module] if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield node.lineno, target


def without_jax(name: str) -> bool:
    """Whether a module must be importable where there is no JAX."""
    package, _, rest = name.partition(".")
    if package == "model":
        return rest in ("", *MODEL_WITHOUT_JAX)
    return package in ("runtime", "hw_profiles") and not f"{name}.".startswith(RUNTIME_WITH_JAX)


def floor(module: str) -> int:
    """The floor of a module of `runtime`; -1 for any other."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if parts[0] == "runtime" and len(parts) > 1 and parts[1] in FLOORS else -1


def without_extra(name: str, target: str) -> bool:
    """Whether a module that the core must be able to import asks for something of the `train` extra."""
    if name in (*TRAIN_EXTRA, *TRAIN_VERBS):
        return False
    extra = any(f"{target}.".startswith(f"{module}.") for module in TRAIN_EXTRA)
    return extra or target.partition(".")[0] in ("flax", "optax", "orbax")


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import one another, wherever the imports stand (Tarjan's strongly connected parts)."""
    known = modules(root)
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for _, target in imports(name, path):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                edges[name].add(target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            part = []
            while not part or part[-1] != name:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return found


def type_names(root: Path) -> dict[str, list[str]]:
    """Public classes and aliases of types that several modules define, with those modules."""
    found: dict[str, list[str]] = {}
    for name, path in modules(root).items():
        for node in ast.parse(path.read_text()).body:
            made = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                made = [each.id for each in node.targets if isinstance(each, ast.Name)]
            for each in made:
                if not each.startswith("_") and each[0].isupper() and not each.isupper():
                    found.setdefault(each, []).append(name)
    return {name: places for name, places in found.items() if len(places) > 1}


def violations(root: Path) -> list[str]:
    """Imports that break the layering, as `file:line: what`."""
    found = []
    for name, path in modules(root).items():
        package = name.partition(".")[0]
        for line, target in imports(name, path):
            top = target.partition(".")[0]
            where = f"{path.relative_to(root)}:{line}: {package} imports {target}"
            if top in OURS and top not in MAY_IMPORT[package]:
                found.append(f"{where}: imports point down only")
            elif name not in IN_A_CHILD and any(
                f"{target}.".startswith(f"{each}.") for each in IN_A_CHILD - NEEDS_NO_CHILD.get(name, set())
            ):
                found.append(f"{where}: that runs in a process of its own")
            elif name in IN_A_CHILD:
                continue
            elif package in STANDARD_LIBRARY_ONLY and top not in OURS and top not in sys.stdlib_module_names:
                found.append(f"{where}: {package} is standard library only")
            elif floor(target) > floor(name):
                found.append(f"{where}: {FLOORS[floor(name)]} is below {FLOORS[floor(target)]}")
            elif top in JAX and without_jax(name):
                found.append(f"{where}: this module must stay free of JAX")
            elif without_extra(name, target):
                found.append(f"{where}: this module must do without the `train` extra")
    return found


BLOCKED_IMPORT = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {jax!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
"""


def failed_imports(root: Path) -> list[str]:
    """Modules that must be free of JAX but cannot be imported where it is blocked."""
    names = [name for name in modules(root) if without_jax(name) and not name.endswith("__main__")]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED_IMPORT.format(jax=JAX), *names],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_imports_point_down() -> None:
    assert violations(ROOT) == []


def test_imports_go_in_no_circle() -> None:
    print("from the ground up:", *FLOORS)
    assert circles(ROOT) == []


def test_every_folder_of_runtime_has_a_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert folders == set(FLOORS)
    assert [path.name for path in (ROOT / "runtime").glob("*.py")] == ["__init__.py"]


def test_a_type_name_means_one_thing() -> None:
    assert type_names(ROOT) == {}


def test_planning_and_simulation_need_no_jax() -> None:
    assert failed_imports(ROOT) == []


def test_the_rules_cover_what_is_there() -> None:
    names = modules(ROOT)
    assert {f"model.{name}" for name in MODEL_WITHOUT_JAX} | set(TRAIN_EXTRA) <= set(names)
    assert "model.graph" in names and not without_jax("model.graph")
    assert without_jax("runtime.planning.search") and without_jax("runtime.cli") and without_jax("runtime.deployment")
    assert not any(map(without_jax, ("runtime.pricing.trace", "runtime.execution.local", "runtime.training.loss")))


# --- the checkers can fail -----------------------------------------------------------------------


def tree(root: Path, path: str, source: str) -> Path:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(source)
    return root


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/bad.py", "import backends"),
        ("model/bad.py", "from runtime.cli import main"),
        ("model/bad.py", "def f():\n    import hw_profiles.loader"),
        ("model/bad.py", "import importlib\nimportlib.import_module('backends.cpu')"),
        ("model/bad.py", "from .. import runtime"),
        ("model/deep/bad.py", "from ...backends import cpu"),
        ("backends/bad.py", "from runtime import planning"),
        ("backends/bad.py", "import tests.conftest"),
        ("runtime/bad.py", "from bench import step"),
        ("runtime/deployment/bad.py", "from runtime.serving import kv_pool"),
        ("runtime/pricing/bad.py", "def f():\n    from runtime.planning.search import search"),
        ("foundation/bad.py", "from model import errors"),
        ("foundation/bad.py", "import numpy"),
        ("foundation/bad.py", "import jinja2"),
        ("foundation/text_worker.py", "from model import errors"),
        ("model/bad.py", "from foundation.template_sandbox import Sandbox"),
        ("model/bad.py", "def f():\n    from foundation import text_worker"),
        ("foundation/foreign_text.py", "def f():\n    from foundation import text_worker"),
        ("foundation/known_text.py", "from foundation.template_sandbox import Sandbox"),
        ("hw_profiles/bad.py", "from model import config"),
        ("hw_profiles/bad.py", "import numpy"),
        ("runtime/planning/bad.py", "import jax.numpy as jnp"),
        ("runtime/planning/bad.py", "def f():\n    from jax import lax"),
        ("runtime/pricing.py", "try:\n    import flax\nexcept ImportError:\n    pass"),
        ("model/config.py", "import jax"),
        ("model/graph.py", "from flax import nnx"),
        ("backends/bad.py", "from model.module import Model"),
        ("runtime/training/evaluate.py", "from runtime.training import steps"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, path: str, source: str) -> None:
    (found,) = violations(tree(tmp_path, path, source))
    assert found.startswith(f"{path}:{1 + source.count(chr(10)) if 'try' not in source else 2}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/cli.py", "import backends.cpu, model.config, hw_profiles\nfrom . import cost\nimport numpy"),
        ("runtime/pricing/trace.py", "import jax"),
        ("runtime/execution/loop.py", "import jax\nfrom ..serving import kv_pool"),
        ("runtime/training/steps.py", "import jax, optax\nfrom flax import nnx\nfrom model.module import Model"),
        ("backends/cpu.py", "import jax\nfrom model import graph\nfrom hw_profiles import loader"),
        ("model/graph.py", "import jax\nfrom model.config import ModelConfig\nfrom . import ops"),
        ("foundation/text_worker.py", "import jinja2\nfrom foundation.template_sandbox import Sandbox"),
        ("hw_profiles/loader.py", "import tomllib, json\nfrom hw_profiles.errors import ProfileError"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    assert violations(tree(tmp_path, path, source)) == []


def test_jax_behind_another_module_is_caught(tmp_path: Path) -> None:
    """No import of JAX in the planner's own text, but one below it: only importing shows that."""
    tree(tmp_path, "runtime/planning/search.py", "from model import ops\nfrom model import config")
    tree(tmp_path, "model/ops.py", "import jax")
    (tmp_path / "model" / "config.py").write_text("")
    assert violations(tmp_path) == []
    (found,) = failed_imports(tmp_path)
    assert found.startswith("runtime.planning.search: ModuleNotFoundError") and "jax" in found


def test_a_circle_is_caught(tmp_path: Path) -> None:
    tree(tmp_path, "model/a.py", "from model.b import f")
    (tmp_path / "model" / "b.py").write_text("def f():\n    from model import a")
    (tmp_path / "model" / "c.py").write_text("from model import a, b")
    assert circles(tmp_path) == [["model.a", "model.b"]]


def test_a_name_for_two_things_is_caught(tmp_path: Path) -> None:
    tree(tmp_path, "model/a.py", "class Thing: ...\nclass _Own: ...")
    tree(tmp_path, "backends/b.py", "Thing = tuple[int, int]\nclass _Own: ...")
    assert type_names(tmp_path) == {"Thing": ["backends.b", "model.a"]}
