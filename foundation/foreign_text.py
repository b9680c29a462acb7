"""Tokenizers and chat templates that were read from files: used, but in a process of their own, under limits.

A `tokenizer.json` and a chat template are programs of whoever made the checkpoint, and the library behind the first is
not made for programs that mean harm. Both are held by `text_worker`, in one process for all of them; decoding is done
here where a decoder cannot do much (`is_tame`), because it is asked for each token.
"""

from __future__ import annotations

import itertools
import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from foundation import known_text
from foundation.child import Child, ChildFailure

MOST_BYTES = 1 << 26  # of a tokenizer.json; the largest vocabularies take half of it
MOST_TEXT_BYTES = 6 << 20
"""Of a text to encode, in UTF-8: what a model of 1,000,000 tokens reads at once, of most languages. A byte is a token
at most, and a token takes 180 bytes of memory: 1.1 of 1.6 GB. Of twenty kinds of text none took more than 1.7 s for
each million characters (Chinese and emoji, with a vocabulary of 100,000; long words no more than short ones)."""
WORKER = Child("foundation.text_worker")
_SECONDS_A_BYTE = 2e-6  # of a text, and of a chat: several times what the slowest that mean well take
_SECONDS_A_BYTE_READ = 5e-8  # of a tokenizer.json
_SOON_SECONDS = 10.0
_MOST_GROWTH = 16  # of a text, by what a decoder puts in the place of characters
_numbers = itertools.count()
_Answer = TypeVar("_Answer", dict[str, Any], dict[str, Any] | None)


class _Foreign:
    """Something that the worker holds, or is handed again after it was ended."""

    _kind: str

    def __init__(self, text: str, given: dict[str, Any]):
        self._given, self.number = given, next(_numbers)
        self.known = known_text.is_known(text, given.get("special", ()))
        self.loaded = self._load_here() if self.known else self._retried(self._load)

    def _use(self, what: str, **given: Any) -> dict[str, Any]:
        request = self._request(what, given)
        if self.known and (answer := self._held_by(known_text.ask, self._load_here, request)) is not None:
            return answer
        return self._retried(lambda: self._held_by(self._ask, self._load, request))

    def _held_by(self, ask: Callable[[Any], _Answer], load: Callable[[], Any], request: dict[str, Any]) -> _Answer:
        answer = ask(request)
        if answer is not None and answer.get("absent"):
            load()
            answer = ask(request)
        return answer

    def _load_here(self) -> dict[str, Any]:
        return known_text.load(self._request(self._kind, self._given))

    def _load(self) -> dict[str, Any]:
        return WORKER.ask(self._request(self._kind, self._given), _SECONDS_A_BYTE_READ)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return WORKER.ask(request, _SECONDS_A_BYTE)

    def _request(self, what: str, given: dict[str, Any]) -> dict[str, Any]:
        return {"number": self.number, "what": what, "given": given}

    def _retried(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Once more in a new process, where what others have left in the old one may be why it failed, and soon."""
        with WORKER.lock:
            others, until = WORKER.asked > 0, time.monotonic() + _SOON_SECONDS
            try:
                return work()
            except ChildFailure as error:
                if error.why in ("time", "refused") or not others or time.monotonic() > until:
                    raise
            return work()


class ForeignTokenizer(_Foreign):
    """A tokenizer.json, which has borne a short text. Raises `ChildFailure`, as its methods do.

    special: special tokens that other files name; `special` are those that the file does not know.
    """

    _kind = "tokenizer"

    def __init__(self, text: str, special: Sequence[str] = ()):
        super().__init__(text, {"text": text, "special": list(special)})
        self.special = [str(token) for token in self.loaded["special"]]

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; asks once for as many as may be long together."""
        found: list[list[int]] = []
        for some in list(_together(texts)):  # what is too long is refused before any is encoded
            found += map(_numbers_in, self._use("encode", texts=some, add_special_tokens=add_special_tokens)["ids"])
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids, where the decoder is not tame."""
        given = {"ids": list(ids), "skip_special_tokens": skip_special_tokens}
        return self._use("decode", **given)["text"]

    def to_json(self) -> str:
        """The tokenizer.json of it, `special` among its tokens."""
        return self._use("describe")["text"]


class ForeignTemplate(_Foreign):
    """A chat template. Raises `ChildFailure`, as `render` does."""

    _kind = "template"

    def __init__(self, source: str):
        super().__init__(source, {"source": source})

    def render(self, contexts: Sequence[dict[str, Any]]) -> list[str]:
        """The text of each context. What is no JSON data raises as `json` does."""
        return self._use("render", contexts=list(contexts))["texts"]

    def to_ids(self, context: dict[str, Any], tokenizer: ForeignTokenizer) -> list[int] | str:
        """The token ids of a context's text, which takes one request in place of two; the text itself where the
        tokenizer has to be asked on its own."""
        answer = self._use("to ids", context=context, tokenizer=tokenizer.number, most_bytes=MOST_TEXT_BYTES)
        return _numbers_in(answer["ids"]) if "ids" in answer else answer["text"]


def _numbers_in(ids: str) -> list[int]:
    return array("I", bytes.fromhex(ids)).tolist()


def _together(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in groups of at most `MOST_TEXT_BYTES`. Raises `ChildFailure` for one that has more."""
    some, size = [], 0
    for text in texts:
        if (more := _utf8_bytes(text)) > MOST_TEXT_BYTES:
            taken = f"the {MOST_TEXT_BYTES:,} that are taken"
            raise ChildFailure("refused", f"a text of {more:,} bytes in UTF-8 is longer than {taken}")
        if some and size + more > MOST_TEXT_BYTES:
            yield some
            some, size = [], 0
        some.append(text)
        size += more
    if some:
        yield some


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_tame(decoder: Any) -> bool:
    """Whether the work of a decoder of the tokenizers library is bounded by its ids, whatever they are: known steps
    that never fail, no regular expression, no text that grows and grows."""
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    growth = 1.0
    while steps:
        step = steps.pop()
        match step:
            case {"type": "Sequence", "decoders": list(inner)}:
                steps += inner
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
                growth *= max(1.0, len(content) / len(pattern))
            case {"type": "Strip", "stop": 0}:
                pass  # one that cuts from both ends fails where there is less
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse" | "Metaspace"}:
                pass
            case _:
                return False
    return growth <= _MOST_GROWTH
