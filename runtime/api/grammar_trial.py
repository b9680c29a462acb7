"""Whether a grammar can be made of a text, tried in a process of its own: the other side of `grammar`.

Run by `foundation.child.Child`, never imported. A schema is a program of whoever sent the request, and the library that
compiles it is not made for programs that mean harm: some make it run for ever, or overflow its stack, which ends the
process that it is in. The vocabulary is one of bytes: what goes wrong does not hang on the tokens.
"""

from __future__ import annotations

import functools
import resource
from typing import Any, NoReturn

import llguidance

from foundation.child import serve

_STACK_BYTES = 1 << 22  # half of what the threads have on which it is then done in earnest


class _Bytes:
    """A token for each byte, wherever no mark has its id."""

    bos_token_id = None

    def __init__(self, size: int, marks: tuple[int, ...]):
        self.eos_token_id = marks[-1]
        free = (at for at in range(size) if at not in marks)
        of_byte = dict(zip(free, range(256), strict=False))
        self.tokens = [b"\xff" + str(at).encode() if at in marks else bytes([of_byte[at]]) if at in of_byte else b""
                       for at in range(size)]  # fmt: skip
        self.special_token_ids = list(marks)

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError


@functools.lru_cache(4)
def _tokenizer(marks: tuple[int, ...]) -> llguidance.LLTokenizer:
    size = max(marks) + 257
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(size, marks)), size, [marks[-1]])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """grammar: its text. marks: ids of tokens that it names, and last one that ends an answer."""
    matcher = llguidance.LLMatcher(_tokenizer(tuple(request["marks"])), request["grammar"], log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"error": matcher.get_error() if matcher.is_error() else None}


def main(lifeline: int) -> NoReturn:
    """Serves the process that started this one."""
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    serve(_answer, lifeline)
