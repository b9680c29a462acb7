"""Token ids to text as they come: what is shown, joined, is the text of all ids, whatever the decoder.

Text is shown as soon as nothing that follows can change it. What can, is what decoders do beyond a single token:

    ByteLevel      joins the bytes of all tokens; half a character is U+FFFD until the rest of it comes
    ByteFallback   a run of byte tokens is text as a whole, or as a whole is not
    BPEDecoder     writes the last token's end-of-word mark otherwise than that of others
    CTC            drops a token that repeats the one before it
    Strip, Metaspace, WordPiece   treat the first token, or the first characters, apart
    Fuse           joins what the steps behind it then see as one text

A decoder is read from its own description. One that does what is not foreseen here has its text shown at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_JOINING = ("Fuse", "ByteLevel")
_A_TOKEN_EACH = ("Replace", "Strip", "Metaspace", "WordPiece", "ByteFallback")

Steps = list[dict[str, Any]]


class TextStream:
    """Decodes ids as they come: the texts returned, joined, are `decode` of all ids.

    decode: the text of ids. inner: the `tokenizers.Tokenizer` behind it, whose decoder and tokens are looked at.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], inner: Any):
        self._decode = decode
        self._unsettled, self._open = _unsettled(inner), False
        self._shown: list[int] = []  # ids shown last, whose text is not empty: what treats the first ones apart is past
        self._shown_text = ""  # of them
        self._pending: list[int] = []

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes, often ""; raises as `decode` does."""
        was_open, self._open = self._open, self._unsettled(token_id)
        if self._open or was_open:
            nothing = not self._decode([token_id])  # as an id that no token has: then all stays as it was
            self._open = self._open or nothing
        self._pending.append(token_id)
        return "" if self._open else self._show(hold=True)

    def flush(self) -> str:
        """The text still held back; the stream is then as new."""
        rest = self._show(hold=False)
        self._shown, self._shown_text, self._pending, self._open = [], "", [], False
        return rest

    def _show(self, hold: bool) -> str:
        text = self._decode([*self._shown, *self._pending])
        new = text[len(self._shown_text) :]
        if hold and (not new or text.endswith(_INCOMPLETE)):
            return ""  # ids that add nothing yet stay: what follows may depend on them
        if alone := self._decode(self._pending):
            self._shown, self._shown_text = self._pending, alone
        else:
            self._shown, self._shown_text = [*self._shown, *self._pending], text
        self._pending = []
        return new


def spells_bytes(inner: Any) -> bool:
    """Whether the tokens of a `tokenizers.Tokenizer` are written a character for each byte."""
    decoder = inner.decoder
    return decoder is not None and any(s["type"] == "ByteLevel" for s in _flat(json.loads(decoder.__getstate__())))


def _unsettled(inner: Any) -> Callable[[int], bool]:
    """Whether what follows a token may change the text up to it."""
    steps = _steps(inner.decoder)
    if steps is None:
        return lambda token_id: True
    in_bytes = any(step["type"] == "ByteFallback" for step in steps)
    marks = [step["suffix"] for step in steps if step["type"] == "BPEDecoder"]

    def unsettled(token_id: int) -> bool:
        token = inner.id_to_token(token_id) or ""
        last = ((token.replace(mark, ""), token.replace(mark, " ")) for mark in marks)
        return (in_bytes and _BYTE_TOKEN.fullmatch(token) is not None) or any(not b.startswith(a) for a, b in last)

    return unsettled


def _steps(decoder: Any) -> Steps | None:
    """A decoder's steps, in order; none without a decoder. None for one whose text must wait for the end."""
    if decoder is None:
        return []
    steps = _flat(json.loads(decoder.__getstate__()))
    joined = next((at for at, step in enumerate(steps) if step["type"] in _JOINING), len(steps))
    each, behind = steps[:joined], steps[joined + 1 :]
    kinds = [step["type"] for step in each]
    alone = kinds == ["BPEDecoder"]  # other steps may take its marks for something else
    known = alone or all(kind in _A_TOKEN_EACH for kind in kinds[kinds[:1] == ["CTC"] :])  # CTC compares tokens
    return steps if known and all(map(_a_character_each, behind)) else None


def _flat(step: dict[str, Any]) -> Steps:
    return [inner for each in step["decoders"] for inner in _flat(each)] if step["type"] == "Sequence" else [step]


def _a_character_each(step: dict[str, Any]) -> bool:
    """Whether a step that sees all of the text as one changes no character for the sake of those behind it."""
    pattern = step.get("pattern", {}).get("String", "")
    return step["type"] in ("Strip", "Fuse") or (
        step["type"] == "Replace" and len(pattern) == 1 and pattern != _INCOMPLETE
    )
