"""A checkpoint's text: tokenizer and template, which tokens are markup, and what each stands for in bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundation.reading import Unreadable, read_json
from model.hf_config import GENERATION_FILE
from model.tokenizer import ChatTemplate, Tokenizer


@dataclasses.dataclass(frozen=True)
class Markup:
    """Ids of the tokens that give an answer its form; None where the checkpoint has no such token. A token is markup,
    its spelling in ordinary tokens is text."""

    think: int | None
    think_end: int | None
    call: int | None
    call_end: int | None
    key: int | None
    key_end: int | None
    value: int | None
    value_end: int | None

    @property
    def thinks(self) -> bool:
        return self.think_end is not None

    @property
    def calls(self) -> bool:
        """Whether calls can be told from text."""
        form = (self.call, self.call_end, self.key, self.key_end, self.value, self.value_end)
        return None not in form


_SPELT = {
    "think": "<think>", "think_end": "</think>", "call": "<tool_call>", "call_end": "</tool_call>",
    "key": "<arg_key>", "key_end": "</arg_key>", "value": "<arg_value>", "value_end": "</arg_value>",
}  # fmt: skip


class Vocabulary:
    """Text of one checkpoint.

    size: entries of the model's logits, which may be padded beyond the tokenizer's. stop_ids: tokens that end a turn.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, size: int, stop_ids: Sequence[int] = ()):
        self.tokenizer, self.template, self.size = tokenizer, template, size
        self.markup = Markup(**{name: tokenizer.find(text) for name, text in _SPELT.items()})
        self.stop_ids = frozenset(i for i in {*tokenizer.stop_token_ids, *stop_ids} if 0 <= i < size)
        apart = tokenizer.apart()
        self.apart = frozenset(apart)
        self.special = frozenset(token for token, special in apart.items() if special)

    @classmethod
    def load(cls, path: Path, size: int, stop_ids: Sequence[int] = ()) -> Vocabulary:
        """That of a checkpoint directory. Raises `TokenizerError`; a directory without a template has none."""
        return cls(Tokenizer.load(path), ChatTemplate.find(path), size, stop_ids)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id up to `size`."""
        found = self.tokenizer.pieces()[: self.size]
        return found + [b""] * (self.size - len(found))

    @functools.cached_property
    def lines(self) -> frozenset[int]:
        """The token that ends a line: some models put it between calls."""
        return frozenset({self.pieces.index(b"\n")} if b"\n" in self.pieces else ())

    def thinking_after(self, prompt_ids: Sequence[int]) -> bool:
        """Whether what follows a prompt is thinking: the last mark of it stands behind the last speaker's."""
        for token in reversed(prompt_ids):
            if token in (self.markup.think, self.markup.think_end):
                return token == self.markup.think
            if token in self.special:
                return False
        return False

    def mask(self, allowed: Sequence[int] | frozenset[int], others: bool = False) -> np.ndarray:
        """bool `[size]`: True for some ids, and `others` for the rest."""
        made = np.full(self.size, others)
        made[[token for token in allowed if token < self.size]] = not others
        made.setflags(write=False)
        return made


def sampling_defaults(path: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json recommends: temperature, top_p and top_k, where it does."""
    try:
        raw = read_json(path / GENERATION_FILE)
    except Unreadable:
        return {}
    found = {}
    for name, kinds in (("temperature", (int, float)), ("top_p", (int, float)), ("top_k", (int,))):
        value = raw.get(name) if isinstance(raw, dict) else None
        if value is not None and type(value) in kinds and value >= 0:
            found[name] = value
    return found
