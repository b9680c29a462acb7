"""What a chat template and a prompt cost in a process of their own, beside the same work in this one.

    python -m bench.templates [--checkpoint DIR] [--rounds N] [--json]

Microseconds by the clock, because one process waits for the other: the best of the rounds. "start" is what the first of
a process's life costs, once; "messages" are turns of a chat.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers

from foundation.foreign_text import WORKER
from foundation.template_sandbox import Sandbox
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.load import embedded_checkpoint

TURN = [
    {"role": "user", "content": "What is a mixture of experts?"},
    {"role": "assistant", "content": "A layer of which each token uses a few parts.", "reasoning_content": "easy"},
]


def best(work: Callable[[], object], rounds: int, calls: int = 20) -> float:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - begin) / calls * 1e6)
    return min(found)


def measure(folder: Path, rounds: int) -> list[dict[str, float | str]]:
    begin = time.perf_counter()
    template = ChatTemplate.load(folder)
    rows: list[dict[str, float | str]] = [{"what": "start", "apart_us": (time.perf_counter() - begin) * 1e6}]
    tokenizer, inner = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = Sandbox().from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    for turns in (1, 4, 16, 64):
        chat = turns * TURN
        here = best(lambda chat=chat: plain.render(messages=json.loads(json.dumps(chat)), tools=None), rounds)
        apart = best(lambda chat=chat: template.render(chat), rounds)
        rows.append(
            {"what": f"render, {len(chat)} messages", "here_us": here, "apart_us": apart, "ratio": apart / here}
        )
        many = best(lambda chat=chat: template.render_each(50 * [chat]), rounds, 1) / 50
        rows.append({"what": "  and of 50 at once, each", "here_us": here, "apart_us": many, "ratio": many / here})
        text = template.render(chat)
        here = best(lambda text=text: inner.encode(text, add_special_tokens=False).ids, rounds)
        apart = best(lambda text=text: tokenizer.encode(text), rounds)
        rows.append({"what": f"encode, {len(text)} characters", "here_us": here, "apart_us": apart,
                     "ratio": apart / here})  # fmt: skip
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
