"""What is damaged of a checkpoint, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from model.checkpoint import Checkpoint
from model.hf_config import load_config
from model.tokenizer import ChatTemplate, Tokenizer
from tests.fuzz.kind import CHAT, CHECKPOINT, Kind, bytes_of, document_of, of_json, others, sharded
from tests.fuzz.mutations import (
    encoded,
    mutated_bytes,
    mutated_json,
    text_of,
)  # fmt: skip


def _config() -> Any:
    return document_of(CHECKPOINT / "config.json")


def _quantised_config() -> Any:
    groups = {"g": {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int"}, "targets": ["Linear"]}}
    of = {"quant_method": "fp8", "weight_block_size": [128, 128], "config_groups": groups, "format": "mixed-precision"}
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "mscale": 1.0}
    plain = {key: value for key, value in _config().items() if key != "rope_parameters"}
    return {**plain, "rope_theta": 1e4, "rope_scaling": rope, "quantization_config": of}


def _index(rng: Random) -> bytes:
    held = document_of(sharded() / "model.safetensors.index.json")
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
    return of_json(lambda: held)(rng)


def damaged_safetensors(raw: bytes) -> Callable[[Random], bytes]:
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
    held = document_of(CHECKPOINT / "tokenizer.json")
    if rng.random() < 0.3:
        return mutated_bytes(rng, bytes_of(CHECKPOINT / "tokenizer.json"))
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
    text = bytes_of(CHECKPOINT / "chat_template.jinja")
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


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    return {
        "config": Kind("config.json", of_json(_config), Checkpoint, others("config.json")),
        "quantised config": Kind("config.json", of_json(_quantised_config), lambda f: load_config(f)),
        "index": Kind(
            "model.safetensors.index.json", _index, Checkpoint,
            lambda: {p.name: p for p in sharded().iterdir() if not p.name.endswith("index.json")},
        ),
        "safetensors": Kind(
            "model.safetensors", damaged_safetensors(bytes_of(CHECKPOINT / "model.safetensors")), Checkpoint,
            others("model.safetensors"),
        ),
        "tokenizer": Kind("tokenizer.json", _tokenizer, _tokenizer_reads, others("tokenizer.json")),
        "tokenizer config": Kind(
            "tokenizer_config.json",
            of_json(
                lambda: {**document_of(CHECKPOINT / "tokenizer_config.json"),
                         "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
                         "eos_token": {"content": "<|user|>"}, "bos_token": "a"}
            ),
            _chat, others("tokenizer_config.json", "chat_template.jinja"), named=False,
        ),
        "generation config": Kind(
            "generation_config.json", of_json(lambda: document_of(CHECKPOINT / "generation_config.json")), _chat,
            others("generation_config.json"),
        ),
        "template": Kind("chat_template.jinja", _template, _chat, others("chat_template.jinja")),
    }  # fmt: skip
