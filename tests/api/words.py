"""A vocabulary, and answers written in it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from runtime.api.vocabulary import Vocabulary

CHECKPOINT = Path(str(resources.files("runtime") / "data" / "tiny-glm5"))
VOCABULARY = Vocabulary.load(CHECKPOINT, 1024)
TOKENIZER, MARKUP = VOCABULARY.tokenizer, VOCABULARY.markup
USER = TOKENIZER.token_id("<|user|>")  # ends a turn


def ids(text: str) -> list[int]:
    """Tokens of a text; marks and special tokens are spelt out."""
    return TOKENIZER.encode(text)


def call(name: str, **values: str) -> str:
    """A call as GLM writes it."""
    pairs = (f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in values.items())
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"
