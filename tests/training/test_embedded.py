"""The embedded checkpoint: what its config gives, true to transformers, and right about what it was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.load import embedded_checkpoint
from runtime.training import config, export, vocabulary
from tests.cli.cli import glm5
from tests.model.oracle import FAIR_GAP, TOLERANCE, Paged, on_device, with_narrowest_choice

PATH: Path = embedded_checkpoint()
READ = config.read(config.DEFAULT)


def test_it_is_of_the_config_that_ships_beside_the_trainer() -> None:
    made = export.make_tokenizer(READ)
    stops = vocabulary.stop_ids(made)
    raw = {**READ.raw_model, "eos_token_id": stops, "pad_token_id": stops[0]}
    assert json.loads((PATH / "config.json").read_text()) == raw
    assert (PATH / "tokenizer.json").read_text() == made.to_str(pretty=True) + "\n"
    assert (PATH / "chat_template.jinja").read_text() == export.TEMPLATE.read_text()
    card = (PATH / "README.md").read_text()
    assert f"{READ.steps} steps" in card and "not a language model to use" in card


def test_what_it_is() -> None:
    opened = Checkpoint(PATH)
    cfg = opened.config
    assert cfg.model_type == "glm_moe_dsa" and opened.has_mtp
    assert {(kind.indexer, kind.ffn) for kind in cfg.layers} == {("full", "dense"), ("full", "moe"), ("shared", "moe")}
    assert Tokenizer.load(PATH).stop_token_ids == cfg.eos_token_ids
    assert sum(file.stat().st_size for file in PATH.iterdir()) <= 8_000_000


@pytest.mark.parametrize("text", [pytest.param("learnt", marks=pytest.mark.slow), "random"])
def test_transformers_gives_the_same_logits(text: str) -> None:
    """Past the selection, on text it knows and on tokens it has never seen together."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()
    opened, tokenizer = Checkpoint(PATH), Tokenizer.load(PATH)
    weights = on_device(opened.load())
    if text == "learnt":
        generator = export.make_generator(READ, export.make_tokenizer(READ))
        tokens = np.asarray([generator.row(np.random.default_rng(3), "recall", 160)[0]], np.int32)
    else:
        tokens = np.random.default_rng(0).integers(0, tokenizer.token_id("<|endoftext|>"), (1, 160)).astype(np.int32)
    expected, gap = with_narrowest_choice(model, tokens)
    assert gap > FAIR_GAP, "a choice so near to a tie that rounding decides it: take another seed"
    for attention in ("expanded", "absorbed"):
        paged = Paged(opened.config, weights, batch=1, page_size=16, context=160)
        logits, _ = paged.feed(tokens, [160], attention)
        assert np.abs(logits - expected).max() < TOLERANCE


def ask(prompt: str, *words: object) -> dict[str, Any]:
    return glm5("run", "--chat", "--prompt", prompt, "--max-tokens", 16, "--json", *words).json


def test_it_answers_a_chat() -> None:
    assert ask("47+38=", "--no-thinking")["text"] == "85<|user|>"


def test_a_template_of_its_own() -> None:
    text = ChatTemplate.load(PATH).render([{"role": "user", "content": "47+38="}], enable_thinking=False)
    assert text == "[gMASK]<sop><|user|>47+38=<|assistant|></think>"
