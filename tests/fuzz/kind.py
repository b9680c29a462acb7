"""A kind of file that is damaged: how one is made from a seed, and who reads it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import runtime
from model.checkpoint import Checkpoint
from model.checkpoint_writer import write_shards
from tests.fuzz.mutations import (
    encoded,
    mutated_bytes,
    mutated_json,
    mutated_toml,
    text_of,
)  # fmt: skip

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
def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@functools.cache
def document_of(path: Path) -> Any:
    return json.loads(path.read_bytes())


def of_json(document: Callable[[], Any]) -> Callable[[Random], bytes]:
    """Every fourth as bytes, the rest as a document."""

    def make(rng: Random) -> bytes:
        held = document()
        plain = encoded(text_of(held))
        return mutated_bytes(rng, plain) if rng.random() < 0.25 else encoded(text_of(mutated_json(rng, held)))

    return make


def of_toml(*paths: Path) -> Callable[[Random], bytes]:
    def make(rng: Random) -> bytes:
        text = bytes_of(rng.choice(paths))
        return mutated_bytes(rng, text) if rng.random() < 0.25 else encoded(mutated_toml(rng, text.decode()))

    return make


def others(*but: str) -> Callable[[], Mapping[str, Path]]:
    return lambda: {path.name: path for path in CHECKPOINT.iterdir() if path.name not in but}
