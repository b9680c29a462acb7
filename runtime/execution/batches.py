"""Rows of tokens as the batches that programs take: in parts of a bounded size, padded to a static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from model.choosing import Draws
from model.graph import Batch
from runtime.serving.executor import GREEDY, ByRank, TokenChoice
from runtime.serving.service import MOST_LOGPROBS, TokenLogprob

Kind = Literal["prompts", "answers"]
Following = list[list[list[int]]]
"""By rank and row, the tokens known to follow a row's own."""
DRAWN_BY = tuple(name for name in Draws._fields if name != "top_k")
"""What a draw takes that is float32 on a device."""


def gear(n: int, least: int = 1) -> int:
    """The smallest power of two, times `least`, that is at least `n`."""
    size = least
    while size < n:
        size *= 2
    return size


def widest(rows: ByRank) -> int:
    """Tokens of the longest row."""
    return max((len(row.tokens) for rank in rows for row in rank), default=0)


def context(rows: ByRank) -> int:
    """Tokens that the longest context has with its row."""
    return max((row.start + len(row.tokens) for rank in rows for row in rank), default=0)


def parts(rows: ByRank, most_tokens: int) -> Iterator[ByRank]:
    """The rows in their order, cut so that a rank's rows, all as long as the longest, are at most so many tokens."""
    count = max(map(len, rows), default=0)
    first, wide = 0, 0
    for place in range(count):
        each = max(len(rank[place].tokens) for rank in rows if place < len(rank))
        if place > first and max(wide, each) * (place + 1 - first) > most_tokens:
            yield [rank[first:place] for rank in rows]
            first, wide = place, 0
        wide = max(wide, each)
    if count:
        yield [rank[first:] for rank in rows]


def padded(rows: ByRank, size: int, width: int, pages: int) -> Batch:
    """A step's inputs, [ranks x size, ..]: rows of padding have length 0 and hold no pages."""
    tokens = np.zeros((len(rows), size, width), np.int32)
    table = np.zeros((len(rows), size, pages), np.int32)
    start, length = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), np.int32)
    for number, rank in enumerate(rows):
        for place, row in enumerate(rank):
            tokens[number, place, : len(row.tokens)] = row.tokens
            start[number, place], length[number, place] = row.start, len(row.tokens)
            held = row.pages[:pages]
            table[number, place, : len(held)] = held
    return Batch(*(part.reshape(-1, *part.shape[2:]) for part in (tokens, start, length, table)))


def draws_of(choices: Sequence[Sequence[TokenChoice | None]], size: int) -> Draws:
    """How each row's token is drawn, on the host, [ranks x size]; padding's and those that nobody asks for greedily."""
    given = [each for rank in choices for each in (*rank, *[None] * (size - len(rank)))]

    def column(name: str, dtype: Any) -> Any:
        return np.array([getattr(each or GREEDY, name) for each in given], dtype)

    return Draws(**{name: column(name, np.int32 if name == "top_k" else np.float32) for name in Draws._fields})


def asks(choices: Sequence[TokenChoice | None]) -> tuple[bool, int | None]:
    """Of a launch's rows: whether any token is drawn, and how many log-probabilities to name, if any asks for some:
    none beside the chosen's or as many as can be, so that programs are few."""
    asked = {each.logprobs for each in choices if each and each.logprobs is not None}
    logprobs = (MOST_LOGPROBS if any(asked) else 0) if asked else None
    return any(each and not each.greedy for each in choices), logprobs


def named(rows: np.ndarray, best: int) -> list[TokenLogprob]:
    """What `model.choosing.with_logprobs` says of ids [n, ..], with so many of the likeliest."""
    count = rows.shape[-1] // 2 - 1
    logs = np.ascontiguousarray(rows).view(np.float32)
    pairs = zip(rows[:, 2 : 2 + count].tolist(), logs[:, 2 + count :].tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True))[:best] for ids, values in pairs]
    return [TokenLogprob(own, top) for own, top in zip(logs[:, 1].tolist(), tops, strict=True)]


def following(batch: Batch, tokens: list[list[list[int]]]) -> Batch:
    """The batch with other tokens, [ranks][rows][..], in the place of its own."""
    ids, lengths = np.zeros_like(batch.tokens), np.zeros_like(batch.length)
    size = len(lengths) // len(tokens)
    for number, rank in enumerate(tokens):
        for place, row in enumerate(rank):
            ids[number * size + place, : len(row)] = row
            lengths[number * size + place] = len(row)
    return batch._replace(tokens=ids, length=lengths)


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch of a step that has been computed: what of it, and what drafts are made from."""

    kind: Kind
    rows: ByRank
    batch: Batch
    hidden: Any


def drafted(
    launches: Sequence[Launched], prompts: Following, answers: Following, draft: Callable[[Batch, Any], np.ndarray]
) -> tuple[Any, Any]:
    """The drafts of a step's rows, [ranks][rows][drafts] of prompts and of answers, launch by launch. draft: takes a
    batch of following tokens and hidden states to ids [ranks x rows, drafts]."""
    given: dict[Kind, Following] = {"prompts": prompts, "answers": answers}
    found: dict[Kind, list[list[Any]]] = {kind: [[] for _ in ranks] for kind, ranks in given.items()}
    for each in launches:
        done = found[each.kind]
        mine = [
            rank[len(so_far) : len(so_far) + len(rows)]
            for rank, so_far, rows in zip(given[each.kind], done, each.rows, strict=True)
        ]
        ids = draft(following(each.batch, mine), each.hidden)
        size = len(ids) // len(mine)
        for number, rows in enumerate(each.rows):
            done[number] += list(ids[number * size : number * size + len(rows)])
    return found["prompts"], found["answers"]


def unpadded(rows: ByRank, logits: np.ndarray) -> list[list[np.ndarray]]:
    """Logits [ranks x size, (t,) vocab] by rank and row: [tokens, vocab], or [1, vocab] of the last."""
    size = logits.shape[0] // len(rows)
    if logits.ndim == 2:
        return [[logits[number * size + place][None] for place in range(len(rank))] for number, rank in enumerate(rows)]
    return [
        [logits[number * size + place, : len(row.tokens)] for place, row in enumerate(rank)]
        for number, rank in enumerate(rows)
    ]
