"""What is damaged, and who reads it: a kind for each sort of file that people are sent, and for command lines.

A kind makes the content of one file from a seed, and reads it as the product does. Free of JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np

import hw_profiles
import runtime
from foundation.errors import Failure
from hw_profiles.loader import PROFILES
from model.checkpoint import Checkpoint
from model.checkpoint_writer import write_shards
from model.hf_config import load_config
from model.split import Layout
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.cli.main import main
from runtime.deployment import engines
from runtime.deployment.manifest import FILE as MANIFEST_FILE
from runtime.deployment.manifest import Manifest
from runtime.deployment.plan import Plan, _digest
from runtime.deployment.tensors import TensorReader, TensorWriter, numpy_dtype
from runtime.execution.prompts import read_prompts
from runtime.planning.check import check
from runtime.planning.experts import read_load, read_placement
from runtime.planning.launch import launch
from runtime.pricing import load as expert_load
from runtime.pricing.book import PRICES_FOLDER, read_prices
from runtime.serving.workload import mooncake_trace
from runtime.simulation.validation import read_rows
from runtime.training import config as training
from tests.export.test_manifest import MANIFEST
from tests.fuzz import graphs
from tests.fuzz.mutations import (
    WORDS,
    encoded,
    mutated_bytes,
    mutated_csv,
    mutated_json,
    mutated_toml,
    mutated_words,
    text_of,
)  # fmt: skip
from tests.plans import formats, plan_for

CHECKPOINT = Path(runtime.__file__).parent / "data" / "tiny-glm5"
CHAT = [
    {"role": "user", "content": "hello <|user|>"},
    {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "user", "content": "again"},
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """file: what is damaged. make: its content. read: opens `file` in a folder; what it raises is judged. beside: files
    that stand in the folder too. named: whether a refusal must name the file, or the folder it is in."""

    file: str
    make: Callable[[Random], bytes]
    read: Callable[[Path], object]
    beside: Callable[[], Mapping[str, Path]] = dict
    named: bool = True


@functools.cache
def sharded() -> Path:
    """The checkpoint in several shards, in the current folder."""
    made, opened = Path("sharded").absolute(), Checkpoint(CHECKPOINT)
    shutil.copytree(CHECKPOINT, made, ignore=shutil.ignore_patterns("*.safetensors"))
    write_shards(made, ((name, opened.array(name)) for name in opened.tensor_names), 800_000)
    return made


@functools.cache
def _bytes(path: Path) -> bytes:
    return path.read_bytes()


@functools.cache
def _document(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _of_json(document: Callable[[], Any]) -> Callable[[Random], bytes]:
    """Every fourth as bytes, the rest as a document."""

    def make(rng: Random) -> bytes:
        held = document()
        plain = encoded(text_of(held))
        return mutated_bytes(rng, plain) if rng.random() < 0.25 else encoded(text_of(mutated_json(rng, held)))

    return make


def _of_toml(*paths: Path) -> Callable[[Random], bytes]:
    def make(rng: Random) -> bytes:
        text = _bytes(rng.choice(paths))
        return mutated_bytes(rng, text) if rng.random() < 0.25 else encoded(mutated_toml(rng, text.decode()))

    return make


def _others(*but: str) -> Callable[[], Mapping[str, Path]]:
    return lambda: {path.name: path for path in CHECKPOINT.iterdir() if path.name not in but}


# --- checkpoints


def _config() -> Any:
    return _document(CHECKPOINT / "config.json")


def _quantised_config() -> Any:
    groups = {"g": {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int"}, "targets": ["Linear"]}}
    of = {"quant_method": "fp8", "weight_block_size": [128, 128], "config_groups": groups, "format": "mixed-precision"}
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "mscale": 1.0}
    plain = {key: value for key, value in _config().items() if key != "rope_parameters"}
    return {**plain, "rope_theta": 1e4, "rope_scaling": rope, "quantization_config": of}


def _index(rng: Random) -> bytes:
    held = _document(sharded() / "model.safetensors.index.json")
    if rng.random() < 0.3:
        held = json.loads(json.dumps(held))
        elsewhere = (
            str(CHECKPOINT / "model.safetensors"),
            "/dev/zero",
            "/proc/self/mem",
            "..",
            "config.json",
            "a\0b",
            "",
            5,
        )
        held["weight_map"][rng.choice(list(held["weight_map"]))] = rng.choice(elsewhere)
        return encoded(text_of(held))
    return _of_json(lambda: held)(rng)


def _safetensors(raw: bytes) -> Callable[[Random], bytes]:
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = [name for name in header if name != "__metadata__"]

    def headed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    def make(rng: Random) -> bytes:
        match rng.randrange(4):
            case 0:
                return mutated_bytes(rng, raw[: 8 + size]) + body
            case 1:
                return headed(encoded(text_of(mutated_json(rng, header))))
            case 2:
                length = rng.choice((2**60, 2**63, 2**64 - 1, 10**8 + 1, len(raw), 0, 1, size - 1, size + 1))
                cut = rng.choice((0, 1, 7, 8, 9, 7 + size, 8 + size, 9 + size, len(raw) - 1))
                return rng.choice((length.to_bytes(8, "little") + raw[8:], raw[:cut], raw + b"x" * 8))
            case _:
                return headed(encoded(text_of(moved(rng))))

    def moved(rng: Random) -> Any:
        made = json.loads(json.dumps(header))
        entry, other = made[rng.choice(names)], made[rng.choice(names)]
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [-begin - 1, end],
                [end, begin],
                other["data_offsets"],
                [begin, 2**63],
                [2**64 - 8, 2**64],
                [begin],
                "ab",
                None,
            )
        )
        if rng.random() < 0.5:
            entry["data_offsets"] = [begin, end]
            shapes = ([2**32, 2**32], [*entry["shape"], 0], [-1], [1.5], "x", None, [True], entry["shape"][::-1])
            key = rng.choice(("shape", "dtype"))
            entry[key] = rng.choice(shapes if key == "shape" else ("F64", "I64", "F4", "", 5, None, [], "F8_E4M3"))
        return made

    return make


def _tokenizer_reads(folder: Path) -> None:
    found = Tokenizer.load(folder)
    ids = found.encode("Hello w\u00f6rld, 12345\n\n  a b<|user|> \ud7ff \U0001f600" * 3, add_special_tokens=True)
    found.decode(ids)
    stream = found.stream()
    for token in ids:
        stream.put(token)
    stream.flush()
    found.decode([0, 5, 10**6])


def _tokenizer(rng: Random) -> bytes:
    """The vocabulary is most of it, and the least of what can go wrong."""
    held = _document(CHECKPOINT / "tokenizer.json")
    if rng.random() < 0.3:
        return mutated_bytes(rng, _bytes(CHECKPOINT / "tokenizer.json"))
    outer = {**held, "model": {**held["model"], "vocab": {}, "merges": []}, "added_tokens": held["added_tokens"][:4]}
    made = mutated_json(rng, outer)
    if isinstance(made, dict) and isinstance(made.get("model"), dict):
        for key in ("vocab", "merges"):
            if not made["model"].get(key, 1):
                made["model"][key] = held["model"][key]
    return encoded(text_of(made))


def _chat(folder: Path) -> None:
    Tokenizer.load(folder)
    ChatTemplate.load(folder).render(CHAT)


_PIECES = (
    "range(99999)", "messages*1000000", "'a'*10**8", "|list", "|join(messages)", "__class__",
    "{% for i in range(9999) %}",
    "{% endfor %}", "namespace()", "|tojson(indent=4)", "loop.index", "9**9**9", "|sort", "{{ messages }}",
    "|map('attr','x')",
    "{% set x = x ~ x %}", "{% macro m() %}", "{% endmacro %}", "(" * 3000, "|indent(10**9)", "'%999999999d'|format(1)",
)  # fmt: skip


def _template(rng: Random) -> bytes:
    text = _bytes(CHECKPOINT / "chat_template.jinja")
    if rng.random() < 0.5:
        return mutated_bytes(rng, text)
    pieces = text.decode().split(" ")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(pieces))
        match rng.randrange(4):
            case 0:
                pieces[at] = rng.choice(_PIECES)
            case 1:
                pieces.insert(at, rng.choice(_PIECES))
            case 2:
                del pieces[at]
            case _:
                other = rng.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
    return encoded(" ".join(pieces))


# --- plans and packages


@functools.cache
def _plan() -> Plan:
    cfg = load_config(CHECKPOINT)
    return plan_for(cfg, Layout(2, 1, 2), hw_profiles.load("h200-sxm"), formats("bf16"))


def _rehashed_plan(rng: Random) -> bytes:
    """A plan whose sender has hashed it anew."""
    held = json.loads(_plan().text)
    made = mutated_json(rng, held)
    if not isinstance(made, dict) or made.get("hash") != held["hash"] or rng.random() < 0.1:
        return mutated_bytes(rng, encoded(_plan().text))
    text = _plan_text({**made, "hash": "0" * 64})
    return encoded(text.replace("0" * 64, _digest(text), 1))


def _plan_text(document: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(k.split(chr(0))[0])}: {text_of(v)}" for k, v in document.items()) + "\n}\n"


def _plan_reads(folder: Path) -> None:
    found = Plan.read(folder / "plan.json")
    cfg = load_config(CHECKPOINT)
    found.require_model(cfg, "plan.json")
    check(found, cfg)
    launch(found, cfg, "sglang").text()


def _weights() -> bytes:
    path = Path("weights.safetensors").absolute()
    shapes = {"a": ((20, 30), "float32"), "b": ((3,), "int32"), "c": ((4, 4), "int4"), "d": ((), "float32")}
    with TensorWriter(path, shapes) as writer:
        for name, (shape, dtype) in shapes.items():
            writer.put(name, np.zeros(shape, numpy_dtype(dtype)))
    return path.read_bytes()


def _weights_read(folder: Path) -> None:
    reader = TensorReader(folder / "w.safetensors")
    for name in reader.names:
        np.asarray(reader.array(name), copy=True)


# --- what is planned and simulated with


def _saved(array: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def _npy(rng: Random) -> bytes:
    plain = _saved(np.random.default_rng(0).random((4, 16)))
    match rng.randrange(4):
        case 0:
            return mutated_bytes(rng, plain)
        case 1:
            return mutated_bytes(rng, plain[:128]) + plain[128:]
        case 2:
            shape = rng.choice(
                ("(1000000000000, 1000)", "(100000, 100000)", "(-1, 16)", "(0, 16)", "(2**40, 8)", "()", "(64,)",
                 "(2,2,2)",
                 "(4294967296, 4294967296)", "x", "(" * 200, "-" * 9000 + "1", "__import__('os').getpid()", "9" * 5000)
            )  # fmt: skip
            dtype = rng.choice(("<f8", "<f8", "|O", "<c16", "|b1", "<M8[s]", "<U9", "|V0", "<f2", "5", "[('a','<f4')]"))
            text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
            text += " " * (-(len(text) + 11) % 64) + "\n"
            return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(512)
        case _:
            value = rng.choice((np.nan, np.inf, -1.0, 1e308, 5e-324, 0.0))
            return _saved(np.full(rng.choice(((4, 16), (1, 1), (1, 50_000), (300, 8))), value))


def _load_file() -> Path:
    path = Path("load.npy").absolute()
    if not path.exists():
        path.write_bytes(_saved(np.random.default_rng(0).random((4, 16))))
    return path


def _placement() -> Any:
    return {"placement": [[list(range(d * 4, d * 4 + 4)) for d in range(4)] for _ in range(4)], "gap": {"mean": 0.0}}


def _trace(rng: Random) -> bytes:
    rows = [
        {"timestamp": i * 500, "input_length": 600 + i * 100, "output_length": 5 + i, "hash_ids": [0, i]}
        for i in range(6)
    ]
    if rng.random() < 0.25:
        return mutated_bytes(rng, encoded("\n".join(map(text_of, rows))))
    made = mutated_json(rng, rows)
    return encoded("\n".join(map(text_of, made)) if isinstance(made, list) else text_of(made))


_ROWS = (
    "model,system,devices,precision,engine,engine_version,isl,osl,concurrency,tp,dp,moe_tp,ep,ttft_ms,tpot_ms,measured\n"
    "glm-5,h200-sxm,8,fp8,sglang,0.5.9,128,16,2,8,1,8,1,300,20,2026-03-25\n" * 1,
    "device,model,num_queries,query_len,context,world,tp,dp,ep,mtp,q_linear,q_attn,measured_s,name\n"
    "ascend-910c-die,glm-5,4,1,1000,16,1,16,16,0,W8A8_DYNAMIC,DISABLED,0.02,x\n",
)


def _csv(rng: Random) -> bytes:
    text = rng.choice(_ROWS)
    return mutated_bytes(rng, text.encode()) if rng.random() < 0.3 else encoded(mutated_csv(rng, text))


def _prices() -> Any:
    """One kernel's, of the file that every chip's prices are read beside."""
    held = _document(PRICES_FOLDER / "transfer.json")
    return {**held, "kernels": dict(list(held["kernels"].items())[:1])}


def _profile_reads(folder: Path) -> None:
    found = hw_profiles.load(folder / "p.toml")
    hw_profiles.check(found)
    hw_profiles.dumps(found)


def _training_reads(folder: Path) -> None:
    found = training.read(folder / "c.toml")
    assert found.hash and found.at(0) and found.model


# --- prompts and command lines


def _prompts(rng: Random) -> bytes:
    text = "\n".join(rng.choice(WORDS) for _ in range(rng.randint(0, 9)))
    return mutated_bytes(rng, encoded(text) or b"a") if rng.random() < 0.6 else encoded(text * rng.choice((1, 1, 1000)))


def _prompts_read(folder: Path) -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    for text in read_prompts(folder / "prompts.txt")[:20]:
        tokenizer.encode(text[:1000])


class Served(BaseException):
    """Where the work of a command would begin."""


_OPTIONS: dict[str, list[str]] = {
    "run": ["--backend", "--checkpoint", "--prompt", "--prompt-ids", "--prompts", "--chat", "--no-thinking",
            "--max-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--mtp", "--ignore-eos", "--dtype",
            "--keep-fp8", "--pool-tokens", "--prefill-chunk", "--dump-logits", "--json", "--artifact",
            "--trust-package", "--plan", "--profile", "--devices", "--tp", "--dp", "--ep", "--pp", "--formats", "--kv",
            "--engine", "--scale-memory", "--trace", "--coordinator", "--process"],
    "simulate": ["--devices", "--tp", "--dp", "--ep", "--pp", "--isl", "--osl", "--concurrency", "--rate", "--requests",
                 "--mtp", "--accept", "--expert-load", "--set", "--seed", "--kv", "--formats", "--engine", "--profile",
                 "--model", "--length-ratio", "--burstiness", "--prefill-devices", "--trace-file", "--plan", "--html"],
    "plan": ["--devices", "--isl", "--osl", "--concurrency", "--rate", "--ttft-ms", "--tpot-ms", "--objective",
             "--formats",
             "--kv", "--mtp", "--expert-load", "--engine", "--set", "--out", "--profile", "--model", "--length-ratio"],
    "plan experts": ["--load", "--devices", "--slots", "--nodes", "--groups", "--previous", "--max-moves", "--sglang",
                     "--dense-layers", "--json"],
    "model": ["--json", "--formats", "--help"],
    "profiles show": ["--set", "--json"],
    "profiles diff": ["--json"],
    "profiles new": ["--bf16", "--memory", "--bandwidth", "--set", "--formats", "--kv", "--name", "--grade"],
    "validate": ["--json"],
    "export": ["--format", "--phase", "--batch", "--chunk", "--context", "--page-size", "--tp", "--dp", "--ep", "--pp",
               "--formats", "--dtype", "--device", "--plan", "--out", "--model", "--weights"],
    "quantize": ["--formats", "--profile", "--layout", "--out"],
    "compare": ["--profile", "--formats", "--window", "--max-tokens", "--tasks", "--html", "--text", "--prompts"],
}  # fmt: skip
# What decides the mode of a run, and that which follows is what another one reads.
_RUNS: list[list[str]] = [
    [], [], ["--backend", "sim", "--profile", "h200-sxm"], ["--artifact", "none"],
    ["--backend", "sim", "--plan", "none"],
    ["--coordinator", "localhost:1", "--process", "0/2"],
]  # fmt: skip
_BASES: dict[str, list[str]] = {
    "run": ["--prompt", "hello", "--max-tokens", "4"],
    "simulate": ["--devices", "8", "--concurrency", "4", "--isl", "64", "--osl", "8"],
    "plan": ["--devices", "8", "--concurrency", "4", "--isl", "64", "--osl", "8"],
    "plan experts": ["--load", "../load.npy", "--devices", "4", "--slots", "24"],
    "model": ["glm-5"],
    "profiles show": ["h200-sxm"],
    "profiles diff": ["h200-sxm", "h100-sxm"],
    "profiles new": ["my.toml", "--bf16", "1e14", "--memory", "8e10", "--bandwidth", "2e12"],
    "validate": ["rows.csv"],
    "export": ["--format", "onnx", "--out", "p", "--model", "glm-5"],
    "quantize": ["--formats", "fp8", "--out", "q"],
    "compare": ["--profile", "h200-sxm"],
}


def _words(rng: Random) -> bytes:
    verb = rng.choice(list(_BASES))
    words = [*verb.split(), *mutated_words(rng, _BASES[verb], _OPTIONS[verb])]
    if verb == "run":
        words[1:1] = rng.choice(_RUNS)
    return json.dumps([word.replace("\0", "") for word in words]).encode()


def _command(folder: Path) -> None:
    """Runs the words in the folder, up to where the work would begin."""
    _load_file()
    words, said = json.loads((folder / "words.json").read_bytes()), io.StringIO()
    work = (
        "runtime.simulation.build.build", "runtime.planning.search.search", "runtime.planning.smallest.smallest",
        "runtime.cli.opening.opened_checkpoint", "runtime.porting.export.options.check",
        "runtime.simulation.validation.score",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(said))
        for name in work:
            with contextlib.suppress(AttributeError, ImportError):
                stack.enter_context(mock.patch(name, side_effect=Served))
        try:
            main(words)
        except Served:
            return
        except SystemExit as end:
            if end.code == 2:
                raise Failure(said.getvalue().removesuffix("\n")) from None
            if end.code not in (None, 0, 1):
                raise AssertionError(f"exit code {end.code}") from None


def _judged(folder: Path) -> None:
    """What a reader may do wrong, one thing after the other."""
    match int(folder.name.rpartition("-")[2]):
        case 1:
            raise ZeroDivisionError
        case 2:
            bytearray(8 << 30)
        case 3:
            while True:
                pass
        case 4:
            signal.raise_signal(signal.SIGSEGV)
        case 5:
            raise Failure("judge.txt: is\nno line")
        case 6:
            raise Failure("is wrong")
        case 7:
            (folder / "more").touch()
            raise Failure("judge.txt: is wrong")


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    data = Path(engines.__file__).parent
    return {
        "config": Kind("config.json", _of_json(_config), Checkpoint, _others("config.json")),
        "quantised config": Kind("config.json", _of_json(_quantised_config), lambda f: load_config(f)),
        "index": Kind(
            "model.safetensors.index.json", _index, Checkpoint,
            lambda: {p.name: p for p in sharded().iterdir() if not p.name.endswith("index.json")},
        ),
        "safetensors": Kind(
            "model.safetensors", _safetensors(_bytes(CHECKPOINT / "model.safetensors")), Checkpoint,
            _others("model.safetensors"),
        ),
        "tokenizer": Kind("tokenizer.json", _tokenizer, _tokenizer_reads, _others("tokenizer.json")),
        "tokenizer config": Kind(
            "tokenizer_config.json",
            _of_json(
                lambda: {**_document(CHECKPOINT / "tokenizer_config.json"),
                         "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
                         "eos_token": {"content": "<|user|>"}, "bos_token": "a"}
            ),
            _chat, _others("tokenizer_config.json", "chat_template.jinja"), named=False,
        ),
        "generation config": Kind(
            "generation_config.json", _of_json(lambda: _document(CHECKPOINT / "generation_config.json")), _chat,
            _others("generation_config.json"),
        ),
        "template": Kind("chat_template.jinja", _template, _chat, _others("chat_template.jinja")),
        "plan": Kind("plan.json", _rehashed_plan, _plan_reads, named=False),
        "manifest": Kind(
            MANIFEST_FILE, _of_json(lambda: json.loads(MANIFEST.to_json())), lambda f: Manifest.read(f), named=False
        ),
        "package weights": Kind("w.safetensors", _safetensors(_weights()), _weights_read),
        "training config": Kind("c.toml", _of_toml(training.DEFAULT), _training_reads),
        "engine": Kind("e.toml", _of_toml(*sorted(data.glob("*.toml"))), lambda f: engines.load(str(f / "e.toml"))),
        "profile": Kind(
            "p.toml", _of_toml(*(PROFILES / f"{name}.toml" for name in ("h200-sxm", "ascend-910c", "cpu-host"))),
            _profile_reads,
        ),
        "prices": Kind(
            "prices.json", _of_json(_prices),
            lambda f: read_prices(f / "prices.json"),
        ),
        "trace": Kind("t.jsonl", _trace, lambda f: mooncake_trace(f / "t.jsonl")),
        "expert load": Kind(
            "counts.json", _of_json(lambda: [3, 1, 4, 1, 5, 9, 2, 6]),
            lambda f: expert_load.parse(str(f / "counts.json"), 8),
        ),
        "load": Kind("l.npy", _npy, lambda f: read_load(f / "l.npy")),
        "placement": Kind(
            "place.json", _of_json(_placement), lambda f: read_placement(f / "place.json", read_load(_load_file()))
        ),
        "measured rows": Kind("rows.csv", _csv, lambda f: read_rows(f / "rows.csv")),
        "onnx graph": Kind("graph.onnx", graphs.onnx_graph, graphs.onnx_opens),
        "torch graph": Kind("graph.pt2", graphs.pt2_graph, graphs.pt2_opens),
        "stablehlo graphs": Kind("graph.jax_export", graphs.stablehlo_graph, graphs.stablehlo_opens),
        "prompts": Kind("prompts.txt", _prompts, _prompts_read, named=False),
        "command": Kind("words.json", _words, _command, named=False),
        "the judge": Kind("judge.txt", lambda rng: b"", _judged),
    }  # fmt: skip
