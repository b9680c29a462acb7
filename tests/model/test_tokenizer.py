"""Text to ids and back, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from foundation import foreign_text
from foundation.streaming import TextStream
from model.errors import TokenizerError
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "random-glm5"
VOCAB = 1024
TOKENIZER = Tokenizer.load(TINY)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
any_ids = st.lists(st.integers(0, VOCAB + 5))  # a few beyond the vocabulary
# Bytes of long characters in any order: the hard case of streaming.
byte_ids = st.lists(st.sampled_from([i for i in range(256) if TOKENIZER.decode([i]) == "\ufffd"] + [32, 1000, VOCAB]))


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join(map(stream.put, ids)) + stream.flush()


@given(any_text)
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(any_text)
def test_the_ids_are_those_of_transformers(text: str) -> None:
    theirs = hugging_face(TINY)
    assert TOKENIZER.encode(text) == theirs(text, add_special_tokens=False).input_ids


@given(any_ids, st.booleans())
def test_the_text_of_ids_is_that_of_transformers(ids: list[int], skip: bool) -> None:
    assert TOKENIZER.decode(ids, skip) == hugging_face(TINY).decode(ids, skip_special_tokens=skip)


def hugging_face(folder: Path, made: dict[Path, Any] = {}) -> Any:  # noqa: B006 - a cache
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if folder not in made:
        made[folder] = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return made[folder]


def test_special_tokens_are_one_id_each() -> None:
    ids = TOKENIZER.encode("[gMASK]<sop><|user|>Hi<|assistant|><think></think><tool_call>")
    names = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<tool_call>"]
    assert [token for token in ids if token >= 993] == [TOKENIZER.token_id(name) for name in names]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Hi<think></think><tool_call>"
    assert TOKENIZER.vocab_size == VOCAB


def test_bad_ids_tokens_and_texts() -> None:
    with pytest.raises(TokenizerError, match="no token has the id -1"):
        TOKENIZER.decode([3, -1])
    with pytest.raises(TokenizerError, match=r"has no token '<\|nobody\|>'"):
        TOKENIZER.token_id("<|nobody|>")
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        TOKENIZER.encode("half a pair: \ud83d")
    with pytest.raises(TokenizerError, match="no token has the id 1099511627776"):
        TOKENIZER.decode([2**40])


@given(any_text)
def test_the_pieces_of_a_text_are_its_bytes(text: str) -> None:
    pieces = TOKENIZER.pieces()
    assert b"".join(pieces[token] for token in TOKENIZER.encode(text)) == text.encode()


# --- streaming -----------------------------------------------------------------------------------


@given(any_ids | byte_ids, st.booleans())
def test_a_stream_adds_up_to_decode(ids: list[int], skip: bool) -> None:
    assert streamed(TOKENIZER.stream(skip), ids) == TOKENIZER.decode(ids, skip)


@given(any_text)
def test_a_stream_never_emits_half_a_character(text: str) -> None:
    stream = TOKENIZER.stream()
    pieces = [stream.put(token) for token in TOKENIZER.encode(text.replace("\ufffd", ""))]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_a_stream_waits_for_the_last_byte_only() -> None:
    stream = TOKENIZER.stream()
    rocket = TOKENIZER.encode("🦖")
    assert len(rocket) > 1
    assert [stream.put(token) for token in rocket] == [""] * (len(rocket) - 1) + ["🦖"]
    assert stream.put(rocket[0]) == ""
    assert stream.flush() == "\ufffd"
    assert streamed(stream, rocket) == "🦖"  # a flushed stream is as new


TOKENS = ("a", "b", "▁", "▁a", "a▁", "##a", "a</w>", "</w>", "b</w>a", "<pad>", "|", ".", " n't", "Ġ", "Ã©", "Ã", "©",
          "<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "\ufffd", "")  # fmt: skip
A_TOKEN_EACH = [
    decoders.Replace("▁", " "), decoders.Replace("a", ""), decoders.Metaspace(), decoders.WordPiece(), decoders.CTC(),
    decoders.ByteFallback(), decoders.Strip(" ", 1, 0), decoders.Strip(" ", 2, 0), decoders.BPEDecoder(),
]  # fmt: skip
JOINED = [decoders.Fuse(), decoders.ByteLevel()]
any_step = st.sampled_from([*A_TOKEN_EACH, *JOINED, decoders.Replace("ab", "x"), decoders.Replace("\ufffd", "?")])


def decoding(decoder: decoders.Decoder | None) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="a"))
    inner.add_special_tokens(["<pad>"])
    if decoder is not None:
        inner.decoder = decoder
    return inner


@given(
    st.none() | st.sampled_from([*A_TOKEN_EACH, *JOINED]) | st.lists(any_step, max_size=4).map(decoders.Sequence),
    st.lists(st.integers(0, len(TOKENS) + 1), max_size=12),
    st.booleans(),
)
def test_a_stream_adds_up_whatever_the_decoder(decoder: Any, ids: list[int], skip: bool) -> None:
    inner = decoding(decoder)
    assert streamed(Tokenizer(inner).stream(skip), ids) == inner.decode(ids, skip_special_tokens=skip)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
BYTES = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


@pytest.mark.parametrize(
    ("decoder", "tokens", "pieces"),
    [
        (LLAMA, ("▁", "▁", "▁", "a"), ["", " ", " ", "a"]),  # each space is a token that decodes to nothing alone
        (decoders.Metaspace(), ("▁", "▁a", "b"), ["", " a", "b"]),
        (BYTES, ("a", "<0xE2>", "<0x82>", "<0xAC>", "b"), ["a", "", "", "", "€b"]),
        (BYTES, ("<0x41>", "<0xE2>", "a"), ["", "", "\ufffd\ufffda"]),  # the A is lost with what follows it
        (decoders.BPEDecoder(), ("a</w>", "b", "a"), ["a", " b", "a"]),
        (decoders.CTC(), ("a", "a", "<pad>", "a"), ["a", "", "", "a"]),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]), ("a", "b"), ["", ""]),
        (None, ("a", "b"), ["a", " b"]),
    ],
)
def test_text_is_shown_as_soon_as_nothing_can_change_it(decoder: Any, tokens: tuple[str, ...], pieces: list) -> None:
    inner = decoding(decoder)
    stream, ids = Tokenizer(inner).stream(), [TOKENS.index(token) for token in tokens]
    assert [stream.put(token) for token in ids] == pieces
    assert "".join(pieces) + stream.flush() == inner.decode(ids, skip_special_tokens=False)


def test_a_text_of_any_length_is_encoded_or_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And many texts are, in as many requests as it takes."""
    texts = ["a b c", "", "def", "g" * 10]
    expected = TOKENIZER.encode_each(texts)
    monkeypatch.setattr(foreign_text, "MOST_TEXT_BYTES", 10)
    assert TOKENIZER.encode_each(texts) == expected
    with pytest.raises(TokenizerError, match=r"tokenizer.json.*12 bytes in UTF-8 is longer than the 10"):
        TOKENIZER.encode_each(["a", "語" * 4])
