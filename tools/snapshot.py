"""What the product answers today, over a sample of questions, as one JSON file; and what has changed since another.

    python -m tools.snapshot record FILE
    python -m tools.snapshot compare BEFORE AFTER

Recorded before and after a redesign that is to change no answers: tokens, hashes of exported graphs, plans, simulated
figures, bytes of memory. Every answer comes from the command line, a process each, so that the tool outlives moves of
code. Seconds that were measured are left out. `compare` prints a line for each figure that differs, and exits with 1
where any does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GLM5 = [sys.executable, "-W", "ignore", "-m", "runtime.cli.main"]
PROMPT = "The quick fox runs past the road. It"
_MEASURED = {"timings_s", "run_s", "path", "source", "made_at", "hash", "plan", "toolchain"}

RUNS = {
    "cpu": "--backend cpu",
    "cpu bfloat16": "--backend cpu --dtype bfloat16",
    "cpu mtp": "--backend cpu --mtp 3",
    "cpu sampled": "--backend cpu --temperature 0.8 --top-k 20 --seed 3",
    "sim 910c x4": "--backend sim --profile ascend-910c-die --devices 4",
    "sim 910c w4a8 x2": "--backend sim --profile ascend-910c-die --devices 2 --formats w4a8",
    "sim h200 x4 dp2": "--backend sim --profile h200-sxm --devices 4 --dp 2",
    "sim h200 f32 pp2": "--backend sim --profile h200-sxm --devices 2 --pp 2 --formats f32",
    "sim h200 w4a16": "--backend sim --profile h200-sxm --formats w4a16",
}
MODELS = ("glm-5", "glm-5-fp8", "glm-5.2", "glm-4.5", "glm-4.7-flash", "deepseek-v3", "deepseek-v3.2", "kimi-k2")
SIMULATIONS = {
    "glm-5-fp8 h200 tp8": "--model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --concurrency 16",
    "glm-5-fp8 h200 tp4 dp2 ep8": "--model glm-5-fp8 --profile h200-sxm --devices 8 --dp 2 --ep 8 --concurrency 32",
    "glm-5-fp8 h200 mtp": "--model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --concurrency 8 --mtp 3",
    "glm-5-fp8 vllm": "--model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --concurrency 16 --engine vllm",
    "glm-5-fp8 b200": "--model glm-5-fp8 --profile b200-sxm --devices 8 --tp 8 --concurrency 16",
    "glm-5.2 b200 fp8 kv": "--model glm-5.2-fp8 --profile b200-sxm --devices 8 --tp 8 --concurrency 16 --kv fp8",
    "glm-5 w8a8 910c": "--model glm-5 --profile ascend-910c-die --devices 32 --tp 16 --dp 2 --ep 32 --formats w8a8"
    " --engine vllm-ascend --concurrency 16",
    "glm-5 w4a8 910c": "--model glm-5 --profile ascend-910c-die --devices 16 --tp 16 --formats w4a8"
    " --engine vllm-ascend --concurrency 8",
    "glm-5 w4a16 910b": "--model glm-5 --profile ascend-910b3 --devices 16 --tp 16 --formats w4a16 --concurrency 4",
    "glm-5 bf16 pp2": "--model glm-5 --profile h200-sxm --devices 16 --tp 8 --pp 2 --concurrency 8",
    "deepseek-v3 sglang": "--model deepseek-v3 --profile h200-sxm --devices 8 --tp 8 --concurrency 16",
    "deepseek-v3 trtllm": "--model deepseek-v3 --profile h200-sxm --devices 8 --tp 8 --concurrency 16 --engine trtllm",
    "deepseek-v3 fp8 kv": "--model deepseek-v3 --profile h200-sxm --devices 8 --tp 8 --concurrency 16 --kv fp8",
    "glm-4.5 h200": "--model glm-4.5 --profile h200-sxm --devices 8 --tp 8 --concurrency 16",
    "glm-4.5 fp8 kv": "--model glm-4.5 --profile h100-sxm --devices 16 --tp 8 --dp 2 --concurrency 8 --kv fp8",
    "glm-4.7-flash": "--model glm-4.7-flash --profile h200-sxm --devices 1 --tp 1 --concurrency 8",
    "kimi-k2 w4a16": "--model kimi-k2 --profile h200-sxm --devices 16 --tp 16 --formats w4a16 --concurrency 8",
    "glm-5-fp8 disaggregated": "--model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --prefill-devices 8"
    " --concurrency 16",
    "glm-5-fp8 rate": "--model glm-5-fp8 --profile h200-sxm --devices 8 --tp 8 --rate 0.3 --requests 60",
}
PLANS = {
    "glm-5-fp8 h200": "--model glm-5-fp8 --profile h200-sxm --devices 8 --concurrency 64",
    "glm-5 910c w8a8": "--model glm-5 --profile ascend-910c-die --devices 32 --formats w8a8 --engine vllm-ascend"
    " --concurrency 32",
    "glm-5 910c w4a8": "--model glm-5 --profile ascend-910c-die --devices 16 --formats w4a8 --concurrency 16",
    "deepseek-v3 two chips": "--model deepseek-v3 --profile h200-sxm:8 --profile h20-96gb:8 --concurrency 32",
    "glm-4.5 h100": "--model glm-4.5 --profile h100-sxm --devices 16 --concurrency 32",
    "glm-4.7-flash": "--model glm-4.7-flash --profile h200-sxm --devices 2 --tpot-ms 20",
}
LAUNCHED = {"glm-5-fp8 h200": ("sglang", "vllm"), "glm-5 910c w8a8": ("vllm-ascend",)}
EXPORTS = {
    "onnx tiny": "--format onnx --phase both --context 256",
    "onnx tiny tp2 dp2 ep4": "--format onnx --phase decode --context 256 --tp 2 --dp 2 --ep 4 --weights none",
    "stablehlo tiny pp2": "--format stablehlo --phase decode --context 256 --pp 2 --weights none",
    "onnx glm-5 tp8": "--model glm-5 --format onnx --phase decode --tp 8",
    "onnx glm-5.2 bf16 tp8 ep8": "--model glm-5.2 --format onnx --phase prefill --tp 8 --ep 8 --context 4096",
    "ascend tiny": "--format ascend --profile ascend-910b3 --phase decode --context 256 --weights none",
}
QUANTIZED = ("fp8", "fp8-tensor", "w8a8", "w4a8", "w4a16", "mxfp8", "mxfp4", "nvfp4")


def glm5(*words: str) -> str:
    """What a command prints; what it refuses with, where it does."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    done = subprocess.run([*GLM5, *words], capture_output=True, text=True, env=env, check=False)
    if done.returncode not in (0, 2):
        raise SystemExit(f"glm5 {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout if done.returncode == 0 else json.dumps({"refused": done.stderr.splitlines()[:1]})


def kept(value: Any) -> Any:
    """A document without what was measured, or names a place."""
    if isinstance(value, dict):
        return {key: kept(item) for key, item in value.items() if key not in _MEASURED}
    return [kept(item) for item in value] if isinstance(value, list) else value


def answer(*words: str) -> Any:
    return kept(json.loads(glm5(*words)))


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def onnx_form(path: Path) -> str:
    """A hash of a model's nodes, attributes and types, with names replaced by the order they come in."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    seen: dict[str, int] = {}

    def names(found: Any) -> list[int]:
        return [seen.setdefault(name, len(seen)) for name in found]

    def nodes(graph: Any) -> list[Any]:
        return [
            (node.domain, node.op_type, names(node.input), names(node.output),
             sorted((a.name, a.SerializeToString()) for a in node.attribute if a.type != onnx.AttributeProto.GRAPH))
            for node in graph.node
        ]  # fmt: skip

    functions = [(f.domain, f.name, list(f.attribute), nodes(f)) for f in model.functions]
    ports = [p.type.SerializeToString() for p in (*model.graph.input, *model.graph.output)]
    tensors = [(t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer]
    return digest(functions, nodes(model.graph), ports, tensors)


def graphs(folder: Path) -> dict[str, str]:
    """A hash of each file of a package but its manifest."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".onnx":
            found[name] = onnx_form(path)
        elif path.suffix in (".safetensors", ".mlirbc", ".json", ".jax_export") and path.name != "manifest.json":
            size = path.stat().st_size
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.suffix == ".safetensors" else size
    return found


def record() -> dict[str, Any]:
    """Every answer, by question."""
    out: dict[str, Any] = {}

    def say(group: str, name: str, value: Any) -> None:
        print(f"{group}: {name}", file=sys.stderr)
        out.setdefault(group, {})[name] = value

    for name, words in RUNS.items():
        say("run", name, answer("run", *words.split(), "--prompt", PROMPT, "--max-tokens", "24", "--json"))
    for model in MODELS:
        say("model", model, answer("model", model, "--json"))
    for name, words in SIMULATIONS.items():
        say("simulate", name, answer("simulate", *words.split(), "--json"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, words in PLANS.items():
            path = folder / "plan.json"
            say("plan", name, answer("plan", *words.split(), "--json", "--out", str(path)))
            for engine in LAUNCHED.get(name, ()):
                say("launch", f"{name}, {engine}", glm5("plan", "launch", str(path), "--engine", engine).splitlines())
            say("simulate", f"plan {name}", answer("simulate", "--plan", str(path), "--json", "--requests", "40"))
        for number, (name, words) in enumerate(EXPORTS.items()):
            out_folder = folder / f"export{number}"
            glm5("export", *words.split(), "--out", str(out_folder))
            manifest = kept(json.loads((out_folder / "manifest.json").read_text()))
            manifest["files"] = graphs(out_folder)
            say("export", name, manifest)
        for formats in QUANTIZED:
            target = folder / formats
            written = answer("quantize", "--formats", formats, "--out", str(target), "--json")
            hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(target.iterdir())}
            say("quantize", formats, {**written, "out": "", "files": hashes})
            words = ("--checkpoint", str(target), "--prompt", PROMPT, "--max-tokens", "16", "--json")
            say("run", f"checkpoint {formats}", answer("run", *words))
    say("validate", "silicon", answer("validate", "tests/data/silicon_dev.csv", "--json"))
    say("validate", "ascend", answer("validate", "tests/data/ascend_step_dev.csv", "--json"))
    return out


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a document with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value):
            yield from flat(item, f"{where}[{number}]")
    else:
        yield where, value


def differences(before: Any, after: Any) -> Iterator[str]:
    old, new = dict(flat(before)), dict(flat(after))
    for place in [*old, *(p for p in new if p not in old)]:
        if place not in new:
            yield f"{place}: {old[place]!r} is gone"
        elif place not in old:
            yield f"{place}: {new[place]!r} is new"
        elif old[place] != new[place]:
            a, b = old[place], new[place]
            share = ""
            if isinstance(a, int | float) and isinstance(b, int | float) and a:
                if abs(b / a - 1) < 1e-9:
                    continue
                share = f" ({b / a - 1:+.2%})"
            yield f"{place}: {a!r} -> {b!r}{share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record").add_argument("file", type=Path)
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.verb == "record":
        given.file.write_text(json.dumps(record(), indent=1))
        return
    found = list(differences(*(json.loads(path.read_text()) for path in (given.before, given.after))))
    print("\n".join(found) or "no difference")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
