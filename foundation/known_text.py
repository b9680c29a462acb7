"""Templates and tokenizers that ship with this product: no strangers', so their short work is done in this process.

Known by the SHA-256 of their text: a copy with one byte more is a stranger's. What they are given is still anybody's.
Their work is linear in it (the template loops over messages, tools, parts and arguments, once each; the tokenizer's
regular expression takes every run of characters at once), and what is long is left to the other process, whose limits
then cost nothing beside the work. The work is `text_worker`'s, on the same messages: only where it is done differs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any

from foundation.child import ChildFailure, dumps, loads, one_line

KNOWN = {
    "e4ef489b0f748e6f6ee76ec41633774b5307901d99dd57350ffd2d3f6b80af8a": "the chat template that glm5 train writes",
    "cdf5d0b125cbd55f73af275df660081a51c0cce324306a5f5bf51567085fcf25": "the embedded checkpoint's tokenizer",
}
MOST_BYTES = 1 << 16  # of a request: 0.06 s of work where it takes longest
_lock = threading.Lock()


def is_known(text: str, special: Sequence[str] = ()) -> bool:
    """Whether a text is one of those that ship, and other files name no special token (`special`) that it lacks."""
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() not in KNOWN:
        return False
    return not special or {each["content"] for each in json.loads(text)["added_tokens"]}.issuperset(special)


def load(request: dict[str, Any]) -> dict[str, Any]:
    """What the worker answers to having a known text handed to it."""
    return _answer(request)


def ask(request: dict[str, Any]) -> dict[str, Any] | None:
    """What the worker answers to a request about a known text, None where that is long. Raises as `Child.ask` does."""
    data = dumps(request)
    return _answer(loads(data)) if len(data) <= MOST_BYTES else None


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from foundation import text_worker  # not before: it takes as long as all else that a start imports

    try:
        with _lock:
            return text_worker.answer(request)
    except Exception as error:
        raise ChildFailure("refused", one_line(error)) from None
