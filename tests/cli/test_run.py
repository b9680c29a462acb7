"""`glm5 run`: what it prints and writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting.compare import read_texts
from tests.cli.cli import glm5, refused

PROMPT = ("run", "--backend", "cpu", "--prompt", "The old fox runs by the wall. It", "--max-tokens", 12, "--ignore-eos")
IDS = tuple(range(40, 60))  # more than the small checkpoint's indexer selects
KEYS = {"backend", "prompt_ids", "token_ids", "text", "finish_reason", "timings_s", "accept_length"}


def run_ids(small: Path, *words: object) -> Any:
    return glm5("run", "--checkpoint", small, "--prompt-ids", ",".join(map(str, IDS)), "--max-tokens", 8, *words)


@pytest.fixture(scope="module")
def plain(small: Path) -> dict[str, Any]:
    """The small checkpoint's continuation of `IDS`."""
    return run_ids(small, "--json").json


@pytest.mark.slow
def test_the_embedded_model_streams_what_its_drafts_confirm() -> None:
    streamed = glm5(*PROMPT)
    assert streamed.code == 0 and "[cpu: " in streamed.err and "made-up text" in streamed.err
    result = glm5(*PROMPT, "--mtp", 3, "--json").json
    assert streamed.out == result["text"] + "\n"
    assert set(result) == KEYS
    assert result["backend"] == "cpu" and result["finish_reason"] == "length"
    tokenizer = Tokenizer.load(embedded_checkpoint())
    assert result["prompt_ids"] == tokenizer.encode(PROMPT[4])
    assert len(result["token_ids"]) == 12 and tokenizer.decode(result["token_ids"]) == result["text"]
    assert 1 < result["accept_length"] <= 4
    assert all(seconds > 0 for seconds in result["timings_s"].values())


def test_json(plain: dict[str, Any]) -> None:
    assert set(plain) == KEYS
    assert plain["prompt_ids"] == list(IDS) and plain["accept_length"] is None


def test_logits(small: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    output = run_ids(small, "--dump-logits", tmp_path / "logits.npz")
    assert output.code == 0 and output.out == plain["text"] + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npz"]
    with np.load(tmp_path / "logits.npz") as stored:
        assert stored.files == ["logits"]
        logits = stored["logits"]
    assert logits.dtype == np.float32 and logits.shape == (len(IDS) + 8, 1024)
    assert logits.argmax(-1)[len(IDS) - 1 : -1].tolist() == plain["token_ids"]


def test_a_file_of_prompts(small: Path, tmp_path: Path) -> None:
    prompts = ["Experts\u2028and\x0cshared ones\x85", "The cache holds\ra page of tokens"]
    (tmp_path / "prompts.txt").write_bytes("\r\n\n".join(prompts).encode())
    words = ("run", "--checkpoint", small, "--max-tokens", 6)
    together = glm5(*words, "--prompts", tmp_path / "prompts.txt")
    lines = [json.loads(line) for line in together.out.splitlines()]
    assert together.code == 0 and len(lines) == 2
    for prompt, line in zip(prompts, lines, strict=True):
        alone = glm5(*words, "--prompt", prompt, "--json").json
        assert {**line, "timings_s": None} == {**alone, "timings_s": None}


@pytest.mark.parametrize(
    ("words", "ending"), [((), "<|assistant|><think>"), (["--no-thinking"], "<|assistant|></think>")]
)
def test_chat_ends_with_the_generation_prompt(small: Path, words: list[str], ending: str) -> None:
    result = glm5("run", "--checkpoint", small, "--chat", *words, "--prompt", "Hi", "--max-tokens", 1, "--json").json
    tokenizer = Tokenizer.load(small)
    assert result["prompt_ids"] == tokenizer.encode("[gMASK]<sop><|user|>Hi" + ending)
    assert len(tokenizer.encode(ending)) == 2, "a special token was split"


def test_seeds(small: Path) -> None:
    first, again, other = (
        run_ids(small, "--temperature", 1, "--top-p", 0.9, "--top-k", 50, "--seed", seed, "--json").json["token_ids"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("file", "tokenizer"),
    [("config.json", True), pytest.param("generation_config.json", False, marks=pytest.mark.slow)],
)
def test_stop_tokens(small: Path, plain: dict[str, Any], tmp_path: Path, file: str, tokenizer: bool) -> None:
    """Of either config, whether or not there is a tokenizer."""
    third = plain["token_ids"][2]
    folder = tmp_path / "stopping"
    shutil.copytree(small, folder)
    config = json.loads((small / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    if not tokenizer:
        (folder / "tokenizer.json").unlink()
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text() if path.exists() else "{}"), "eos_token_id": third}))
    result = run_ids(folder, "--json").json
    assert result["finish_reason"] == "stop"
    assert result["token_ids"] == plain["token_ids"][: plain["token_ids"].index(third) + 1]
    assert run_ids(folder, "--json", "--ignore-eos").json["token_ids"] == plain["token_ids"]


def test_a_plain_prompt_gets_what_the_tokenizer_puts_around_it(small: Path, tmp_path: Path) -> None:
    """With --prompts too; a chat, which its template begins, does not."""
    folder = tmp_path / "begins"
    shutil.copytree(small, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"] = {"type": "BertProcessing", "cls": ["<sop>", 997], "sep": ["<eop>", 998]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "prompts").write_text("Hi\nHello\n")
    words = ("run", "--checkpoint", folder, "--max-tokens", 1)
    inner = Tokenizer.load(small)
    assert glm5(*words, "--prompt", "Hi", "--json").json["prompt_ids"] == [997, *inner.encode("Hi"), 998]
    lines = [json.loads(line) for line in glm5(*words, "--prompts", tmp_path / "prompts").out.splitlines()]
    assert [line["prompt_ids"] for line in lines] == [[997, *inner.encode(text), 998] for text in ("Hi", "Hello")]
    chat = glm5(*words, "--prompt", "Hi", "--chat", "--json").json["prompt_ids"]
    assert chat == inner.encode("[gMASK]<sop><|user|>Hi<|assistant|><think>")
    texts = read_texts(Checkpoint(folder), Tokenizer.load(folder), None, tmp_path / "prompts", 16, 1)
    assert texts.windows[0][0] == 997 and texts.windows[-1][-1] != 997
    assert [ids for _, ids in texts.prompts] == [tuple(line["prompt_ids"]) for line in lines]


def test_ids_need_no_tokenizer(small: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in small.iterdir():
        if file.name != "tokenizer.json":
            shutil.copyfile(file, folder / file.name)
    output = run_ids(folder)
    assert output.code == 0 and [int(word) for word in output.out.split()] == plain["token_ids"]
    assert "tokenizer.json: no such file" in refused("run", "--checkpoint", folder, "--prompt", "Hi")
