"""What a chat template and a prompt cost in a process of their own, beside the same work in this one.

    python -m bench.templates [--checkpoint DIR] [--rounds N] [--json]

Microseconds by the clock, because one process waits for the other: the median of the rounds, which take turns. In both
a chat is looked at and copied as JSON. "apart" is what a stranger's template and tokenizer cost, "loaded" those of the
checkpoint as it is: those that ship work in this process (`foundation/known_text.py`). "start" is what the first of a
process's life costs, once; "messages" are turns of a chat. On a machine that does other things the figures are of those
too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import tokenizers

from foundation.foreign_text import WORKER
from foundation.template_sandbox import Sandbox
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.load import embedded_checkpoint

TURN = [
    {"role": "user", "content": "What is a mixture of experts?"},
    {"role": "assistant", "content": "A layer of which each token uses a few parts.", "reasoning_content": "easy"},
]


class Here:
    """A template in this process."""

    def __init__(self, source: str):
        self._inner = Sandbox().from_string(source)

    def render(self, contexts: Sequence[dict[str, Any]]) -> list[str]:
        return [self._inner.render(context) for context in json.loads(json.dumps(contexts))]


def middle(rounds: int, *works: Callable[[], object], calls: int = 20) -> list[float]:
    """Of each, the median of the rounds."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, found, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            times.append((time.perf_counter() - begin) / calls * 1e6)
    return [median(times) for times in found]


def stranger(folder: Path, copy: Path) -> Path:
    """A copy of a checkpoint's texts with one byte more, which says nothing: no known ones."""
    copy.mkdir()
    for file in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
        shutil.copy(file, copy)
    for name in ("chat_template.jinja", "tokenizer.json"):
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write("\n")
    return copy


def measure(folder: Path, rounds: int) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    loaded, tokenizer = ChatTemplate.load(folder), Tokenizer.load(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = ChatTemplate.load(folder)
    plain._foreign["default"] = Here((folder / "chat_template.jinja").read_text(encoding="utf-8"))  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as place:
        copy = stranger(folder, Path(place) / "copy")
        WORKER.end()
        begin = time.perf_counter()
        template = ChatTemplate.load(copy)
        rows.append({"what": "start", "apart_us": (time.perf_counter() - begin) * 1e6})
        theirs = Tokenizer.load(copy)

    def row(what: str, here: Callable[[], object], apart: Callable[[], object], as_is: Callable[[], object]) -> float:
        found = middle(rounds, here, apart, as_is)
        names = ("here_us", "apart_us", "loaded_us")
        rows.append({"what": what, **dict(zip(names, found, strict=True)), "ratio": found[1] / found[0]})
        return found[0]

    for turns in (1, 4, 16, 64):
        chat = turns * TURN
        text = template.render(chat)
        here = row(
            f"render, {len(chat)} messages", lambda chat=chat: plain.render(chat),
            lambda chat=chat: template.render(chat), lambda chat=chat: loaded.render(chat),
        )  # fmt: skip
        (many,) = middle(rounds, lambda chat=chat: template.render_each(20 * [chat]))
        rows.append({"what": "  and of 20 at once, each", "here_us": here, "apart_us": many / 20,
                     "ratio": many / 20 / here})  # fmt: skip
        row(
            f"encode, {len(text)} characters", lambda text=text: inner.encode(text, add_special_tokens=False).ids,
            lambda text=text: theirs.encode(text), lambda text=text: tokenizer.encode(text),
        )  # fmt: skip
        row(
            "  a chat to ids, as served",
            lambda chat=chat: inner.encode(plain.render(chat), add_special_tokens=False).ids,
            lambda chat=chat: template.encode(theirs, chat), lambda chat=chat: loaded.encode(tokenizer, chat),
        )  # fmt: skip
    WORKER.end()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=embedded_checkpoint())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure(given.checkpoint, given.rounds)
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join([f"{row['what']:28s}", *(f"{k} {v:.3g}" for k, v in row.items() if not isinstance(v, str))]))


if __name__ == "__main__":
    main()
