"""`glm5 export` and `glm5 run --artifact`: packages that compute what the graph computes, and refusals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from runtime.deployment.manifest import FILE, Manifest
from runtime.execution.local.request import Prompt
from runtime.porting.export.package import model_ref
from runtime.serving.clock import Virtual
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.serving.live import Client, assert_nothing_is_held

ROOT = Path(__file__).parents[2]
SIZES = ("--phase", "both", "--batch", 2, "--chunk", 16, "--context", 64, "--page-size", 16)
RUNTIME = {"onnx": "ort", "torch": "torch", "stablehlo": "xla"}
PROMPT = ",".join(str(3 * i % 1000 + 7) for i in range(30))  # longer than the selection of 16


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers that selects 16 of its context; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "small"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def package(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX package of it; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "package"
    code, out, err = glm5("export", "--checkpoint", small, "--format", "onnx", *SIZES, "--out", folder)
    assert (code, err) == (0, ""), err
    assert f"{folder}: onnx of small" in out
    return folder


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """The package, to be damaged."""
    shutil.copytree(package, tmp_path / "copy")
    return tmp_path / "copy"


def verified(*words: object) -> list[float]:
    """Exports and verifies; the differences that were printed."""
    code, out, err = glm5("export", *words, "--verify")
    assert (code, err) == (0, ""), err
    lines = [line for line in out.splitlines() if line.startswith("verified:")]
    return [float(line.split("off by ")[1].split(" in logits, ")[i].split()[0]) for line in lines for i in (0, 1)]


@pytest.mark.parametrize(
    ("format", "layout"),
    [
        ("onnx", ("--tp", 2, "--dp", 2, "--ep", 4)),
        pytest.param("onnx", ("--tp", 2, "--pp", 2), marks=pytest.mark.slow),
        pytest.param("stablehlo", ("--tp", 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_package_computes_what_the_graph_does(
    small: Path, tmp_path: Path, format: str, layout: tuple[object, ...]
) -> None:
    """Both phases, caches carried over, past `index_topk`, the MTP layer too; all devices of the layout."""
    off = verified("--checkpoint", small, "--format", format, *SIZES, *layout, "--out", tmp_path / "p")
    assert len(off) == 4 and max(off) <= 1e-4


def chunk(phase: str) -> tuple[object, ...]:
    """A prefill step's chunk, where there is one."""
    return () if phase == "decode" else ("--chunk", 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "layout", "phase"),
    [
        ("onnx", ("--tp", 2, "--dp", 2, "--ep", 4), "decode"),
        ("torch", ("--tp", 2, "--dp", 2, "--ep", 4), "prefill"),
        ("stablehlo", ("--tp", 4, "--ep", 4), "prefill"),
    ],
    ids=str,
)
def test_the_embedded_checkpoint(tmp_path: Path, format: str, layout: tuple[object, ...], phase: str) -> None:
    sizes = ("--phase", phase, *chunk(phase), "--batch", 2, "--context", 256, "--page-size", 16)
    off = verified("--format", format, *sizes, *layout, "--out", tmp_path / "p")
    assert len(off) == 2 and max(off) <= 1e-4


def test_a_wrong_package_is_not_exported(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a graph whose norm is a little off leaves no folder."""
    from backends.toolchains import onnx_ops

    honest = onnx_ops.BODIES["glm.rms_norm"]

    def wrong(target: object, call: object, given: object) -> object:
        (result,) = honest(target, call, given)  # type: ignore[arg-type,misc]
        return [target.elementwise("Mul", result, target.constant(np.asarray(1.001, np.float32)))]  # type: ignore[attr-defined]

    monkeypatch.setattr(onnx_ops, "BODIES", {**onnx_ops.BODIES, "glm.rms_norm": wrong})
    message = refused("export", "--checkpoint", small, "--format", "onnx", *SIZES, "--verify", "--out", tmp_path / "p")
    assert "differs from the graph by" in message and "not exported" in message
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_those_of_the_cpu_backend(small: Path, package: Path) -> None:
    words = ("--prompt-ids", PROMPT, "--max-tokens", 20, "--ignore-eos", "--json")
    expected = glm5("run", "--checkpoint", small, *words).json
    found = glm5("run", "--artifact", package, "--backend", "ort", *words).json
    assert found["token_ids"] == expected["token_ids"] and found["text"] == expected["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "phase"),
    [("onnx", "prefill"), ("onnx", "decode"), ("torch", "both"), ("stablehlo", "both")],
)
def test_tokens_of_every_format_and_phase(tmp_path: Path, format: str, phase: str) -> None:
    sizes = ("--phase", phase, *chunk(phase), "--context", 256, "--page-size", 16)
    assert glm5("export", "--format", format, *sizes, "--out", tmp_path / "p").code == 0
    words = ("--prompt", "A mixture of experts", "--max-tokens", 90, "--json")
    expected = glm5("run", *words).json
    found = glm5("run", "--artifact", tmp_path / "p", "--backend", RUNTIME[format], *words).json
    assert found["token_ids"] == expected["token_ids"] and found["finish_reason"] == expected["finish_reason"]


@pytest.mark.slow
def test_a_package_has_the_words_of_the_checkpoint(small: Path, tmp_path: Path) -> None:
    """What is put around a prompt, special tokens of any file, and stop tokens that only the generation settings
    name; the last without a tokenizer too."""
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"] = {"type": "BertProcessing", "cls": ["<sop>", 997], "sep": ["<eop>", 998]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "special_tokens_map.json").write_text('{"cls_token": "ing"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    words = ("--checkpoint", folder, "--format", "onnx", "--context", 64)
    assert glm5("export", *words, "--out", tmp_path / "p").code == 0
    assert {5, 6} < set(Manifest.read(tmp_path / "p").model.stop_token_ids)
    run = ("--prompt", "A ing", "--max-tokens", 8, "--json")
    expected = glm5("run", "--checkpoint", folder, *run).json
    found = glm5("run", "--artifact", tmp_path / "p", "--backend", "ort", *run).json
    for key in ("prompt_ids", "token_ids", "text", "finish_reason"):
        assert found[key] == expected[key]
    inner = Tokenizer.load(small)
    assert found["prompt_ids"] == [997, *inner.encode("A "), inner.token_id("ing"), 998]
    (folder / "tokenizer.json").unlink()
    opened = Checkpoint(folder)
    assert model_ref(opened.config, opened).stop_token_ids == (5, 6, 993, 1000, 1002)


def test_text_streams_and_prompts_are_served_in_turn(package: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("A mixture\nHello\n")
    words = ("--artifact", package, "--backend", "ort", "--max-tokens", 6)
    code, out, err = glm5("run", *words, "--prompts", tmp_path / "prompts")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    code, streamed, err = glm5("run", *words, "--prompt", "A mixture")
    assert streamed == lines[0]["text"] + "\n" and "[ort: " in err
    sampled = ("--temperature", 1, "--seed", 5, "--json", "--prompt", "Hello")
    assert glm5("run", *words, *sampled).json["token_ids"] == glm5("run", *words, *sampled).json["token_ids"]


def test_running_a_package_imports_nothing_of_the_model(package: Path) -> None:
    program = f"""
import sys
import runtime.cli.app
from runtime.cli.main import main
before = set(sys.modules)
try:
    main(["run", "--artifact", {str(package)!r}, "--backend", "ort", "--prompt", "Hello", "--max-tokens", "2"])
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in set(sys.modules) - before if name.partition(".")[0] in ("model", "jax")]
assert not loaded, loaded
assert "jax" not in sys.modules and "model.graph" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_a_package_holds(package: Path, small: Path) -> None:
    manifest = Manifest.read(package)
    assert [layer.unit for layer in manifest.layers] == ["mla-full-indexer-dense", "mla-shared-indexer-moe"]
    assert manifest.mtp == "mtp-mla-full-indexer-moe" and manifest.tokenizer == "tokenizer.json"
    assert {"onnx", "jax", "jaxlib"} <= set(manifest.toolchain)
    assert set(manifest.files) == {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()} - {FILE}
    for program in manifest.programs:
        for chain in program.units.values():
            (step,) = chain
            model = onnx.load(package / step.files["any"])
            assert [(v.name, v.shape) for v in step.inputs] == [
                (i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in model.graph.input
            ]
            assert [v.name for v in step.outputs] == [o.name for o in model.graph.output]
            assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", 18)]
            assert {use.form for use in step.ops} <= {"function"}
            assert all(source in {v.name for v in step.inputs} for source in step.aliases.values())
    for path in package.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), f"{path} names a path of this machine"


def test_stablehlo_names_no_path_of_this_machine(small: Path, tmp_path: Path, located: None) -> None:
    words = ("--format", "stablehlo", "--context", 64, "--page-size", 16, "--weights", "none", "--out", tmp_path / "p")
    assert glm5("export", "--checkpoint", small, *words).code == 0
    files = [path for path in (tmp_path / "p").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".mlirbc", ".jax_export", ".md"}
    kinds = {path.name.partition(".")[2] for path in files if path.parent != tmp_path / "p"}
    assert kinds == {"mlirbc", "cpu.jax_export", "cuda.jax_export"}  # one file for any compiler
    manifest, text = Manifest.read(tmp_path / "p"), (tmp_path / "p" / "README.md").read_text()
    version = manifest.extra["stablehlo"]["version"]
    assert f"| `GEAR/UNIT.mlirbc` | any compiler of StableHLO: portable bytecode of version {version}" in text
    assert all(step.files["any"].endswith(".mlirbc") for chain in manifest.programs[0].units.values() for step in chain)
    assert not [path for path in files if str(ROOT).encode() in path.read_bytes()]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--out", "OUT"), "export needs --format"),
        (("--format", "onnx"), "export needs --format (stablehlo, onnx, torch, ascend) and --out DIR"),
        (("--format", "caffe", "--out", "OUT"), "--format caffe: unknown"),
        (("--format", "onnx", "--phase", "both!", "--out", "OUT"), "--phase both!"),
        (
            ("--format", "onnx", "--formats", "fp8", "--out", "OUT"),
            "the graphs of onnx have no 8-bit floats; choose f32, bf16, w8a8",
        ),
        (("--format", "stablehlo", "--formats", "fp8", "--out", "OUT"), "needs a checkpoint in FP8"),
        (("--format", "onnx", "--context", "100", "--out", "OUT"), "not a multiple of the page size, 64"),
        (("--format", "onnx", "--context", "9600", "--page-size", "16", "--out", "OUT"), "has 256 positions"),
        (("--format", "onnx", "--batch", "0", "--out", "OUT"), "--batch 0: give whole numbers"),
        (("--format", "onnx", "--batch", "1,x", "--out", "OUT"), "--batch 1,x: give whole numbers"),
        (
            ("--format", "onnx", "--phase", "prefill", "--chunk", "256", "--context", "64", "--out", "OUT"),
            "exceeds --context",
        ),
        (("--format", "onnx", "--tp", "3", "--out", "OUT"), "attention heads / tp = 4 / 3"),
        (("--format", "onnx", "--tp", "2", "--device", "2", "--out", "OUT"), "devices 0 to 1"),
        (("--format", "onnx", "--tp", "2", "--device", "0", "--verify", "--out", "OUT"), "leave out --device"),
        (("--format", "onnx", "--formats", "bf16", "--verify", "--out", "OUT"), "use --formats f32"),
        (("--format", "onnx", "--weights", "maybe", "--out", "OUT"), "none or external"),
        (("--format", "onnx", "--plan", "nowhere.json", "--out", "OUT"), "nowhere.json: cannot be read"),
        (("--format", "onnx", "--plan", "p.json", "--tp", "2", "--out", "OUT"), "--plan decides the layout"),
        (("--format", "onnx", "--plan", "p.json", "--tp", "1", "--out", "OUT"), "--plan decides the layout"),
        (("--format", "onnx", "--npu-ops", "all", "--out", "OUT"), "are for --format ascend"),
        (("--format", "ascend", "--npu-ops", "some", "--out", "OUT"), "--npu-ops some: all, local or none"),
        (("--format", "ascend", "--formats", "fp8", "--weights", "none", "--out", "OUT"), "have no 8-bit floats"),
        (("--format", "ascend", "--profile", "h200-sxm", "--out", "OUT"), "is no Ascend chip"),
        (("--format", "ascend", "--verify", "--out", "OUT"), "add --npu-ops none"),
        (("--format", "onnx", "--kv", "int8", "--out", "OUT"), "are for --format ascend"),
        (("--format", "ascend", "--kv", "fp8", "--out", "OUT"), "--kv fp8: int8, or leave it out"),
        (("--format", "onnx", "--chunk", "128", "--out", "OUT"), "add --phase prefill or both"),
        (("check", "OUT"), "--checkpoint stands before `check`, which does not read it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_make_no_package(small: Path, tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    given = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert complaint in refused("export", "--checkpoint", small, *given)
    assert list(tmp_path.iterdir()) == []


def test_weights_need_a_checkpoint(tmp_path: Path) -> None:
    words = ("export", "--model", "glm-5", "--format", "onnx", "--tp", 8, "--out", tmp_path / "p")
    assert "give --checkpoint" in refused(*words, "--weights", "external")
    assert "give --checkpoint" in refused(*words, "--verify")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    words = ("export", "--checkpoint", small, "--format", "onnx", "--context", 64)
    assert "is not an empty folder" in refused(*words, "--out", tmp_path)
    assert "is not an empty folder" in refused(*words, "--out", tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert glm5(*words, "--out", tmp_path / "empty").code == 0 and (tmp_path / "empty" / FILE).exists()


INTERRUPTED = """
import signal, sys
from runtime.cli.main import main
from runtime.porting.export import writers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs behind
write = writers.OnnxWriter.write
def interrupted(*arguments):
    write(*arguments)
    signal.raise_signal(int(sys.argv[1]))
writers.OnnxWriter.write = interrupted
main(["export", "--format", "onnx", "--out", sys.argv[2], "--checkpoint", sys.argv[3]])
"""


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_export_leaves_nothing_that_looks_whole(
    small: Path, tmp_path: Path, end: signal.Signals
) -> None:
    """By a signal that arrives when the first graph is written."""
    command = [sys.executable, "-c", INTERRUPTED, str(int(end)), str(tmp_path / "p"), str(small)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == (130 if end == signal.SIGINT else -end), ended.stderr
    assert not (tmp_path / "p").exists()
    assert not list(tmp_path.rglob(FILE)), "a manifest is written last"
    if end == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    else:
        assert len(list(tmp_path.glob(".p.*/*/*"))) == 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda p: (p / FILE).unlink(), "no exported package"),
        (lambda p: (p / FILE).write_text((p / FILE).read_text()[:900]), "it is truncated"),
        (
            lambda p: (p / FILE).write_text(
                (p / FILE).read_text().replace('"schema_version": 2', '"schema_version": 7')
            ),
            "manifest version 7",
        ),
        (lambda p: next(p.rglob("head.onnx")).unlink(), "head.onnx: missing"),
        (lambda p: os.truncate(next(p.rglob("*.safetensors")), 1000), "1000 bytes where the manifest says"),
        (lambda p: flip(next(p.rglob("*.safetensors"))), "altered"),
        (lambda p: flip(next(p.rglob("head.onnx"))), "altered"),
    ],
)
def test_a_damaged_package_is_not_run(copy: Path, damage: object, complaint: str) -> None:
    damage(copy)  # type: ignore[operator]
    assert complaint in refused("run", "--artifact", copy, "--backend", "ort", "--prompt-ids", "1,2")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ("--backend", "torch", "--prompt-ids", "1"),
            "--backend torch runs torch, ascend, and this package is onnx; use --backend ort",
        ),
        (("--backend", "cpu", "--prompt-ids", "1"), "--backend cpu does not run exported packages"),
        (("--backend", "ort", "--prompt-ids", "1,2", "--max-tokens", "63"), "largest gear, a context of 64"),
        (("--backend", "ort", "--prompt-ids", "1024"), "token id 1024 is out of range"),
        (("--backend", "ort", "--prompt-ids", "1", "--max-tokens", "0"), "max-tokens must be at least 1"),
        (("--backend", "ort", "--prompt-ids", "1", "--mtp", "1"), "--mtp does not go with --artifact"),
        (("--backend", "ort", "--prompt", "x", "--chat"), "--chat does not go with --artifact"),
        (("--backend", "ort", "--prompt", "x", "--tp", "2"), "--tp does not go with --artifact"),
    ],
)
def test_requests_that_a_package_cannot_serve(package: Path, words: tuple[str, ...], complaint: str) -> None:
    assert complaint in refused("run", "--artifact", package, *words)


def test_a_package_without_weights_or_devices(small: Path, tmp_path: Path) -> None:
    words = ("export", "--checkpoint", small, "--format", "onnx", "--context", 64, "--page-size", 16)
    run = ("run", "--backend", "ort", "--prompt-ids", "1")
    assert glm5(*words, "--weights", "none", "--out", tmp_path / "bare").code == 0
    assert "holds no weights" in refused(*run, "--artifact", tmp_path / "bare")
    assert glm5(*words, "--tp", 2, "--device", 1, "--out", tmp_path / "one").code == 0
    assert [p.name for p in (tmp_path / "one" / "weights").iterdir()] == ["device-1.safetensors"]
    assert "holds 1 of the devices" in refused(*run, "--artifact", tmp_path / "one")


# --- the whole model -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["onnx", pytest.param("stablehlo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [pytest.param("glm-5", marks=pytest.mark.slow), "glm-5.2"])
def test_full_size_in_little_memory(tmp_path: Path, format: str, model: str) -> None:
    """At most 4 GB, with shared-indexer layers as a type of their own."""
    words = ["export", "--model", model, "--format", format, "--phase", "decode", "--tp", "8", "--weights", "none"]
    program = f"import sys; from runtime.cli.main import main; main({[*words, '--out', str(tmp_path / 'p')]!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= 4_000_000  # kB, the largest child so far
    manifest = Manifest.read(tmp_path / "p")
    types = {"view", "embed", "mla-full-indexer-dense", "mla-full-indexer-moe", "mtp-mla-full-indexer-moe", "head"}
    shared = {"mla-shared-indexer-moe"} if model == "glm-5.2" else set()
    assert set(manifest.programs[0].units) == types | shared
    assert len(manifest.layers) == 78 and {layer.unit for layer in manifest.layers} <= types | shared
    assert manifest.axes == {"tp": 8} and len(manifest.devices) == 8


def test_a_package_is_served(package: Path, small: Path) -> None:
    """Requests side by side get what each gets alone; one that no gear holds, or that the scheduler could not place, is
    refused; the text is the checkpoint's, its chats too."""
    from runtime.api.backing import Backing, opened
    from runtime.execution.package.generate import Package
    from runtime.execution.services import package_service

    found, theirs = opened(Backing("ort", artifact=package)), opened(Backing("cpu", checkpoint=small))
    chat = [{"role": "user", "content": "Hi"}]
    template, their_template = found.vocabulary.template, theirs.vocabulary.template
    assert template is not None and their_template is not None
    assert template.render(chat) == their_template.render(chat)
    assert found.vocabulary.stop_ids == theirs.vocabulary.stop_ids and found.recommended == theirs.recommended
    assert (found.name, found.limits.vocab, found.limits.positions) == ("small", theirs.limits.vocab, 64)
    sizes = ((7, 30), (9, 3), (5, 20))
    prompts = [Prompt(tuple(3 * i % 1000 + first for i in range(count)), 6) for first, count in sizes]
    loaded = Package(package, "ort")
    expected = [list(loaded.generate([prompt])[0].token_ids) for prompt in prompts]
    served = package_service(loaded, clock=Virtual())
    clients = [Client() for _ in prompts]
    served.submit([Job(each.prompt_ids, each.max_tokens, Sampling()) for each in prompts], clients)
    assert [client.wait().tokens for client in clients] == expected
    with pytest.raises(UsageError, match="exceeds the model's 64 positions"):
        served.check(60, 5)
    assert_nothing_is_held(served)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--mtp", 2), "--mtp does not go with --artifact"),
        (("--checkpoint", "x"), "--checkpoint does not go with --artifact"),
        (("--time-scale", 2), "--time-scale does not go with --artifact"),
        (("--backend", "cpu"), "--backend cpu does not run exported packages"),
    ],
)
def test_what_a_packages_server_does_not_do_is_a_line(package: Path, words: tuple[object, ...], says: str) -> None:
    backend = () if "--backend" in words else ("--backend", "ort")
    assert refused("serve", "--artifact", package, *backend, *words, "--port", 0).startswith(says)
