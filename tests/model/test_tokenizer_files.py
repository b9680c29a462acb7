"""Tokenizer files: every bad one is one clear line, and what misbehaves does so elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders

from foundation import foreign_text
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from tests.model.test_tokenizer import A_TOKEN_EACH, LLAMA, ROOT, TINY, TOKENIZER, decoding, streamed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    return tmp_path


def complaint(folder: Path) -> str:
    with pytest.raises(TokenizerError) as raised:
        Tokenizer.load(folder)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", b"", "not a tokenizer"),
        ("tokenizer.json", b'{"model": {', "not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "nonsense"}}', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "cannot be read"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[1]", "holds a list, not an object"),
        ("generation_config.json", b'{"eos_token_id": ["x"]}', "must be token ids, not ['x']"),
        ("generation_config.json", b'{"eos_token_id": true}', "must be token ids, not True"),
    ],
)
def test_bad_files(folder: Path, file: str, content: bytes | None, expected: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    message = complaint(folder)
    assert message.startswith(str(folder / file)) and expected in message


def test_a_truncated_tokenizer(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    assert "not a tokenizer" in complaint(folder)


def test_stop_tokens_come_from_every_file_that_names_them(folder: Path) -> None:
    chat = tuple(TOKENIZER.token_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>"))
    assert TOKENIZER.stop_token_ids == chat
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert Tokenizer.load(folder).stop_token_ids == chat
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 6]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eop>"}}')
    assert Tokenizer.load(folder).stop_token_ids == (5, 6, 7, *sorted([*chat, TOKENIZER.token_id("<eop>")]))


def test_truncation_and_padding_left_in_the_file_are_ignored(folder: Path) -> None:
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("one two three four five six") == TOKENIZER.encode(
        "one two three four five six"
    )


def special(*tokens: str) -> dict[str, Any]:
    return {t: {"id": t, "ids": [TOKENIZER.token_id(t)], "tokens": [t]} for t in tokens}


def template(*single: str) -> dict[str, Any]:
    """A post-processor that puts tokens around a prompt, "A"."""
    parts = [{"Sequence": {"id": t, "type_id": 0}} if t == "A" else {"SpecialToken": {"id": t, "type_id": 0}}
             for t in single]  # fmt: skip
    return {
        "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special(*{*single} - {"A"})
    }  # fmt: skip


BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
PAIR = {"sep": ["<eop>", 998], "cls": ["<sop>", 997]}


@pytest.mark.parametrize(
    ("processor", "config", "around"),
    [
        (template("[gMASK]", "<sop>", "A"), {}, (["[gMASK]", "<sop>"], [])),
        (template("<sop>", "A", "<|endoftext|>"), {}, (["<sop>"], ["<|endoftext|>"])),
        (template("A", "<eop>"), {}, ([], ["<eop>"])),
        ({"type": "RobertaProcessing", **PAIR, "trim_offsets": True, "add_prefix_space": True}, {}, None),
        ({"type": "BertProcessing", **PAIR}, {}, None),
        (BYTES_ONLY, {}, ([], [])),
        ({"type": "Sequence", "processors": [BYTES_ONLY, template("<sop>", "A")]}, {}, (["<sop>"], [])),
        (None, {"add_bos_token": True, "bos_token": "<sop>"}, ([], [])),
        (BYTES_ONLY, {"add_bos_token": True, "bos_token": "<sop>", "add_eos_token": True}, ([], [])),
        (template("<sop>", "A"), {"add_bos_token": False, "bos_token": None}, (["<sop>"], [])),
        (template("<sop>", "A"), {"cls_token": "<cls>", "bos_token": {"__type": "AddedToken", "content": "new"}}, None),
    ],
)  # fmt: skip
def test_a_plain_prompt_is_encoded_as_transformers_does(
    folder: Path, processor: dict[str, Any] | None, config: dict[str, Any], around: tuple[list[str], list[str]] | None
) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    raw = {**json.loads((folder / "tokenizer.json").read_text()), "post_processor": processor}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The quick fox", " a <sop>new", "<cls>", ""):
        assert tokenizer.encode(text, add_special_tokens=True) == theirs(text).input_ids
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    if around is not None:
        first, last = ([tokenizer.token_id(token) for token in side] for side in around)
        assert tokenizer.encode("Hi", add_special_tokens=True) == [*first, *TOKENIZER.encode("Hi"), *last]
    alone = tokenizers.Tokenizer.from_str(tokenizer.to_json())  # what a package holds
    assert alone.encode("Hi").ids == theirs("Hi").input_ids


def test_neither_jax_nor_transformers_is_imported() -> None:
    code = "import sys, model.tokenizer; assert not {'jax', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- tokenizers that misbehave -------------------------------------------------------------------


def growing(letter: str) -> list[dict[str, Any]]:
    return [{"type": "Replace", "pattern": {"String": letter}, "content": 2 * letter}] * 40


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def alone(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "added_tokens": [], "pre_tokenizer": None, "post_processor": None}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_text.WORKER, "cpu_seconds", 1.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, "Regex search error"),
        ({"pre_tokenizer": split("(a|aa)+$")}, "Regex search error"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}}, "Regex search error"),
        ({"normalizer": {"type": "Sequence", "normalizers": growing("a")}}, "takes more than"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "(SIGABRT)"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}}, "index out of bounds"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 10**9}}, "index out of bounds"),
        pytest.param({"decoder": {"type": "Sequence", "decoders": growing("a")}, "normalizer": None}, "takes more than",
                     marks=pytest.mark.slow),
        ({"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                             "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}]}}, "no entry found"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_bear_a_short_text(
    folder: Path, changes: dict[str, Any], expected: str, impatient: None
) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    message = complaint(folder)
    assert message.startswith(f"{file}: not a tokenizer (") and expected in message
    assert TOKENIZER.decode(TOKENIZER.encode("what the others have is there again")).endswith("again")


@pytest.mark.parametrize(
    ("changes", "text", "expected"),
    [
        ({"pre_tokenizer": split("(x+x+)+y")}, "x" * 60, "Regex search error"),
        ({"pre_tokenizer": split("(z*)*$")}, "z" * 40_000 + "y", "(takes more|Regex)"),
        ({"normalizer": {"type": "Sequence", "normalizers": growing("z")}}, "z", "takes more"),
        (alone({"type": "WordLevel", "unk_token": "q", "vocab": {"a": 0}}), "b", "Missing .UNK. token"),
        (alone({"type": "BPE", "unk_token": "nope", "vocab": {"a": 0}, "merges": []}), "b", "`nope` not found"),
        (alone({"type": "WordPiece", "unk_token": "q", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9, "vocab": {"a": 0}}), "b", "Missing .UNK. token"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_bear_a_prompt(
    folder: Path, changes: dict[str, Any], text: str, expected: str, impatient: None
) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    made = Tokenizer.load(folder)
    with pytest.raises(TokenizerError, match=expected) as raised:
        made.encode(text)
    assert str(raised.value).startswith(f"{file}: cannot encode the text (") and "\n" not in str(raised.value)
    assert TOKENIZER.encode("a")


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        ({"type": "Replace", "pattern": {"Regex": "(z+)+$"}, "content": ""}, "z" * 40 + "y", "Regex"),
        ({"type": "Sequence", "decoders": growing("z")}, "z", "takes more than"),
        ({"type": "Strip", "content": "z", "start": 1, "stop": 1}, "z", "slice index"),
    ],
)  # fmt: skip
def test_a_decoder_that_misbehaves_does_so_elsewhere(
    folder: Path, decoder: dict[str, Any], token: str, expected: str, impatient: None
) -> None:
    file = folder / "tokenizer.json"
    raw = {**json.loads(file.read_text()), "decoder": decoder, "normalizer": None}
    raw["added_tokens"] = []
    raw["post_processor"] = raw["pre_tokenizer"] = None
    raw["model"] = {"type": "WordLevel", "unk_token": "q", "vocab": {"q": 0, token: 1}}
    file.write_text(json.dumps(raw))
    made = Tokenizer.load(folder)
    assert made.decode([0]) == "q"
    with pytest.raises(TokenizerError, match=expected) as raised:
        made.decode([1])
    assert str(raised.value).startswith(f"{file}: cannot decode (") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("decoder", "tame"),
    [
        (None, True),
        (decoders.ByteLevel(), True),
        (LLAMA, True),
        (decoders.Sequence([decoders.Sequence([decoders.Metaspace(), decoders.Fuse()])]), True),
        (decoders.Replace(tokenizers.Regex("a"), ""), False),
        (decoders.Replace("", "a"), False),
        (decoders.Replace("a", "a" * 17), False),
        (decoders.Sequence([decoders.Replace("a", "aaa"), decoders.Replace("a", "aaaaaa")]), False),
        (decoders.Strip(" ", 1, 1), False),
        (decoders.WordPiece(), False),
        (decoders.CTC(), False),
        (decoders.BPEDecoder(), False),
    ],
)
def test_which_decoders_work_in_this_process(decoder: Any, tame: bool) -> None:
    assert foreign_text.is_tame(decoder) is tame


@pytest.mark.parametrize("decoder", [*A_TOKEN_EACH, LLAMA, decoders.Replace(tokenizers.Regex("[ab]"), "x")])
def test_a_foreign_decoder_is_the_same_decoder(folder: Path, decoder: Any) -> None:
    inner = decoding(decoder)
    (folder / "tokenizer.json").write_text(inner.to_str())
    made, ids = Tokenizer.load(folder), [1, 2, 0, 9, 5, 40]
    assert made.decode(ids) == inner.decode(ids, skip_special_tokens=False)
    assert streamed(made.stream(), ids) == inner.decode(ids, skip_special_tokens=False)


def test_a_large_tokenizer_is_refused_unread(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(foreign_text.MOST_BYTES + 1)
    assert "larger than" in complaint(folder)
