"""The random checkpoint of the tests: made by its script to the byte, true to transformers, and not degenerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from tests.model.oracle import FAIR_GAP, TOLERANCE, Paged, on_device, with_narrowest_choice
from tests.model.test_tokenizer import ROOT, TINY

CONTEXT = 256  # four times what the indexer selects
PLAIN = 993  # ids below are text


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(TINY)


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    return on_device(checkpoint.load())


@pytest.fixture(scope="module")
def greedy(checkpoint: Checkpoint, weights: dict[str, Any]) -> list[int]:
    """A prompt and greedy tokens behind it, CONTEXT in all."""
    tokens = Tokenizer.load(TINY).encode("The lamp turned slowly above the water.")
    paged = Paged(checkpoint.config, weights, batch=1, page_size=16, context=CONTEXT)
    for token in tokens:
        logits, _ = paged.feed(np.asarray([[token]], np.int32), [1], "absorbed")
    while len(tokens) < CONTEXT:
        tokens.append(int(logits[0, -1].argmax()))
        logits, _ = paged.feed(np.asarray([tokens[-1:]], np.int32), [1], "absorbed")
    return tokens


def test_the_script_makes_exactly_what_is_shipped(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    script = [sys.executable, str(ROOT / "tools" / "make_tiny_checkpoint.py"), str(fresh)]
    subprocess.run(script, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in fresh.iterdir()} == {
        file.name: file.read_bytes() for file in TINY.iterdir()
    }


def test_what_it_is(checkpoint: Checkpoint) -> None:
    cfg, tokenizer = checkpoint.config, Tokenizer.load(TINY)
    assert cfg.model_type == "glm_moe_dsa" and checkpoint.has_mtp
    assert cfg.indexer is not None and cfg.indexer.heads >= 16
    assert {(kind.indexer, kind.ffn) for kind in cfg.layers} == {("full", "dense"), ("full", "moe"), ("shared", "moe")}
    assert tokenizer.vocab_size == cfg.vocab_size
    assert tokenizer.stop_token_ids == cfg.eos_token_ids
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 6_000_000
    assert "random weights" in (TINY / "README.md").read_text()


@pytest.mark.slow
def test_greedy_text_varies_and_does_not_stop(greedy: list[int], checkpoint: Checkpoint) -> None:
    assert len(set(greedy)) > 60
    assert len(set(greedy[-100:])) > 30
    assert not set(greedy) & set(checkpoint.config.eos_token_ids)
    assert "\ufffd" not in Tokenizer.load(TINY).decode(greedy)


@pytest.mark.slow
def test_some_drafts_are_right_and_some_are_wrong(
    greedy: list[int], checkpoint: Checkpoint, weights: dict[str, Any]
) -> None:
    import jax
    import jax.numpy as jnp

    from model import graph
    from model.cache import cache_rows

    cfg, pages = checkpoint.config, CONTEXT // 16
    table = jnp.arange(1, pages + 1, dtype=jnp.int32)[None, :]
    mode = graph.Mode("absorbed", "all")

    def batch(tokens: list[int]) -> graph.Batch:
        return graph.Batch(
            jnp.asarray([tokens], jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, len(tokens), jnp.int32), table
        )

    def cache(kind: Any) -> dict[str, Any]:
        return {row.name: jnp.zeros((pages + 1, 16, *row.shape)) for row in cache_rows(cfg, kind)}

    step = jax.jit(lambda w, c, b: graph.step(cfg, w, c, b, mode))
    draft = jax.jit(lambda w, c, b, h: graph.mtp_step(cfg, w, c, b, h, mode))
    main = step(weights, [cache(kind) for kind in cfg.layers], batch(greedy))
    drafts = draft(weights, cache(cfg.mtp_type), batch(greedy[1:]), main.hidden[:, :-1])
    said = np.asarray(main.logits[0, 1:].argmax(-1))
    right = float((np.asarray(drafts.logits[0].argmax(-1)) == said).mean())
    assert 0.2 < right < 0.8


def test_transformers_gives_the_same_logits(checkpoint: Checkpoint, weights: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    mtp = f"model.layers.{checkpoint.config.num_layers}."
    assert all(name.startswith(mtp) for name in report["unexpected_keys"])
    assert model.generation_config.eos_token_id == list(checkpoint.config.eos_token_ids)

    tokens = np.random.default_rng(0).integers(0, PLAIN, (1, CONTEXT)).astype(np.int32)
    expected, gap = with_narrowest_choice(model.eval(), tokens)
    assert gap > FAIR_GAP, "a choice so near to a tie that rounding decides it: take another seed"
    for attention in ("expanded", "absorbed"):
        paged = Paged(checkpoint.config, weights, batch=1, page_size=16, context=CONTEXT)
        logits, _ = paged.feed(tokens, [CONTEXT], attention)
        assert np.abs(logits - expected).max() < TOLERANCE
    assert 1 < expected.std() < 5
