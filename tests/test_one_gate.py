"""What comes from outside is read in `foundation` alone: no product module opens or decodes it another way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import ROOT, modules, tree

# Calls that open a file to read it, or make values of a text, by the name behind the last dot.
READS = {
    "open", "read_text", "read_bytes", "load", "loads", "reader", "DictReader", "fromfile", "loadtxt", "genfromtxt",
    "memmap", "safe_open", "from_file", "deserialize", "load_file",
}  # fmt: skip
# Of `load` and `loads` those of these modules; the project has functions of that name itself.
PARSERS = {"json", "tomllib", "np", "numpy", "pickle", "onnx", "torch", "yaml", "marshal"}

# module -> the calls it may make -> why
ALLOWED: dict[str, dict[str, str]] = {
    "model.module": {"json.loads": "its own config, as text"},
    "model.hf_config": {"json.loads": "presets, ours", "file.read_text": "presets, ours"},
    "model.safetensors_file": {
        "safetensors.safe_open": "behind the header's check, for what the format's own library refuses besides",
        "np.memmap": "the bytes of tensors whose header was read",
    },
    "runtime.deployment.tensors": {"np.memmap": "the bytes of tensors whose header was read"},
    "runtime.pricing.bands": {"_FILE.read_text": "residuals, ours", "json.loads": "of them"},
    "runtime.pricing.training.band": {"_FILE.read_text": "residuals, ours", "json.loads": "of them"},
    "runtime.deployment.manifest": {"path.open": "to hash a file that the manifest lists"},
    "runtime.training.state": {"safe_open": "a run's own state"},
    "runtime.training.export": {"TEMPLATE.read_text": "the template that is ours"},
    "runtime.training.vocabulary": {"<>.read_text": "the corpus that is ours"},
    "runtime.cli.version": {"tomllib.loads": "our pyproject.toml", "_PROJECT.read_text": "our pyproject.toml"},
    "runtime.cli.main": {"os.open": "nowhere, for what is printed into a closed pipe"},
    "runtime.cli.pipe": {"os.open": "nowhere"},
    "runtime.execution.cluster.processes": {"os.open": "nowhere"},
    "runtime.porting.export.check_npu": {"torch.export.load": "a graph that was read and made anew"},
    "runtime.porting.export.ascend": {"<>.read_text": "a script of ours"},
    "runtime.porting.export.ascend_run": dict.fromkeys(
        ("<>.read_text", "json.loads", "path.open", "torch.export.load", "tokenizers.Tokenizer.from_file"),
        "of its own package, on a host that has nothing of ours: who starts it trusts what it came with",
    ),
    "runtime.execution.cluster.joining": {"os.open": "to write the secret that it made"},
    "runtime.execution.package.onnx_graph": {"onnx.load": "a graph, hashed before"},
    "runtime.execution.package.stablehlo_check": {
        "path.read_bytes": "a graph, hashed before, in a child",
        "export.deserialize": "of it",
    },
    "runtime.execution.package.xla": {"path.read_bytes": "a graph, hashed before", "export.deserialize": "of it"},
    "backends.toolchains.torch_device": {"torch.export.load": "a graph, hashed before, or an artifact"},
    "runtime.api.pace_client": {"json.loads": "what the process that started it asks"},
    "backends.kernels.library": {"json.loads": "the index of PTX, ours", "<>.read_text": "PTX, ours"},
    "backends.cuda": {"export.deserialize": "an artifact that it has just made"},
    "backends.xla": {"export.deserialize": "an artifact, hashed before"},
    "backends.ascend.operators": {"tomllib.loads": "tables of ours", "<>.read_text": "tables of ours"},
    "backends.ascend.adapter": {"json.loads": "an artifact that it made itself"},
}


def spelt(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{spelt(value)}.{name}"
    return "<>"


def writes(call: ast.Call, name: str) -> bool:
    """Whether an `open` is for writing, by its mode."""
    mode = call.args[0 if "." in name else 1 :][:1] + [word.value for word in call.keywords if word.arg == "mode"]
    return bool(mode) and isinstance(mode[0], ast.Constant) and str(mode[0].value)[:1] in ("w", "a", "x")


def reads(path: Path) -> Iterator[tuple[int, str]]:
    """(line, call) of everything in a module that opens a file to read, or decodes a text."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if not isinstance(node, ast.Call):
            continue
        name = spelt(node.func)
        stem, _, last = name.rpartition(".")
        if last not in READS or (last.endswith("open") and writes(node, name)):
            continue
        if last in ("read_text", "read_bytes") and not stem:  # the gate's own
            continue
        if last in ("load", "loads") and stem.split(".")[0] not in PARSERS:
            continue
        yield node.lineno, name


def beside_the_gate(root: Path) -> list[str]:
    """Reads outside `foundation` that nobody gave a reason for, as `file:line: call`."""
    return [
        f"{path.relative_to(root)}:{line}: {call}"
        for name, path in modules(root).items()
        for line, call in ([] if name.startswith("foundation") else reads(path))
        if call not in ALLOWED.get(name, {})
    ]


def test_nothing_goes_beside_the_gate() -> None:
    assert beside_the_gate(ROOT) == []


def test_what_is_allowed_is_there() -> None:
    found = {name: {call for _, call in reads(path)} for name, path in modules(ROOT).items()}
    assert {name: set(calls) - found[name] for name, calls in ALLOWED.items()} == {name: set() for name in ALLOWED}
    assert {call for _, call in reads(ROOT / "foundation" / "reading.py")} == {"tomllib.loads", "os.open", "csv.reader"}


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open()",
        "path.open(mode='r')",
        "x = Path(name).read_text(encoding='utf-8')",
        "import json\njson.load(file)",
        "np.load(path, allow_pickle=False)",
        "def f():\n    return tomllib.loads(text)",
        "csv.DictReader(lines)",
        "torch.load(path)",
        "tokenizers.Tokenizer.from_file(path)",
        "pickle.loads(data)",
    ],
)
def test_another_way_is_caught(tmp_path: Path, source: str) -> None:
    (found,) = beside_the_gate(tree(tmp_path, "runtime/planning/bad.py", source))
    assert found.startswith(f"runtime/planning/bad.py:{1 + source.count(chr(10))}: ")


def test_writing_and_what_only_sounds_like_reading_pass(tmp_path: Path) -> None:
    source = "open(p, 'w')\np.open('ab')\np.open(mode='x')\nengines.load(name)\nread_json(p)\np.write_text('')"
    assert beside_the_gate(tree(tmp_path, "runtime/planning/good.py", source)) == []
    assert beside_the_gate(tree(tmp_path, "foundation/reading.py", "open(p)")) == []
