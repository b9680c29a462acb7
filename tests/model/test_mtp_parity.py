"""Multi-token prediction against transformers and against a composition of its decoder layers.

What a draft is fed: at position i the hidden state of i and the token of i + 1. The second draft of the
same layer is fed what the first carries on, which is where GLM (after the shared-head norm) and DeepSeek
(before it) differ, and where a wrong choice first shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import graph
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from tests.model.oracle import (
    FAMILIES,
    SEQUENCES,
    TOLERANCE,
    TOPK,
    Oracle,
    Paged,
    garbage_caches,
    on_device,
)

Oracles = Callable[[str], Oracle]
LENGTH = 40  # rows of a first draft
MtpCases = Callable[[str], "MtpCase"]


@dataclasses.dataclass(frozen=True)
class MtpCase:
    oracle: Oracle
    checkpoint: Checkpoint
    weights: dict[str, Any]
    torch_mtp: Any

    @property
    def next_tokens(self) -> np.ndarray:
        """tokens[:, i] is the token after position i."""
        return self.oracle.tokens[:, 1 : LENGTH + 1]


@pytest.fixture(scope="module")
def mtp_cases(oracles: Oracles, tmp_path_factory: pytest.TempPathFactory) -> MtpCases:
    pytest.importorskip("torch", exc_type=ImportError)
    from tests.model.mtp_oracle import TorchMtp, add_mtp_layer

    made: dict[str, MtpCase] = {}

    def get(name: str) -> MtpCase:
        if name not in made:
            oracle = oracles(name)
            path = add_mtp_layer(oracle, tmp_path_factory.mktemp("mtp") / name)
            checkpoint = Checkpoint(path)
            made[name] = MtpCase(oracle, checkpoint, on_device(checkpoint.load()), TorchMtp(oracle, path))
        return made[name]

    return get


class Drafts:
    """Feeds `graph.mtp_step` over one paged cache."""

    def __init__(self, cfg: ModelConfig, weights: dict[str, Any], page_size: int = 8, width: int = 8):
        self.cfg, self.weights = cfg, weights
        pages = 1 + SEQUENCES * width
        order = np.random.default_rng(3).permutation(np.arange(1, pages)).astype(np.int32)
        self.table = jnp.asarray(order.reshape(SEQUENCES, width))
        (self.cache,) = garbage_caches(cfg, [cfg.mtp_type], pages, page_size)
        self.start = 0

    def feed(self, tokens: np.ndarray, hidden: Any, attention: str) -> tuple[np.ndarray, np.ndarray]:
        """tokens [b, t] and hidden [b, t, d] -> logits [b, t, vocab] and the carried states [b, t, d]."""
        t = tokens.shape[1]
        full = (SEQUENCES,)
        batch = graph.Batch(
            jnp.asarray(tokens), jnp.full(full, self.start, jnp.int32), jnp.full(full, t, jnp.int32), self.table
        )
        mode = graph.Mode(attention, "all")  # type: ignore[arg-type]
        step = jax.jit(lambda w, c, b, h: graph.mtp_step(self.cfg, w, c, b, h, mode))
        out = step(self.weights, self.cache, batch, jnp.asarray(hidden))
        (self.cache,) = out.caches
        self.start += t
        return np.asarray(out.logits), np.asarray(out.hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mtp_layer_is_stored_behind_the_last(mtp_cases: MtpCases, name: str) -> None:
    case = mtp_cases(name)
    assert case.checkpoint.has_mtp
    assert len(case.weights["mtp"]) == 1
    assert case.checkpoint.load(mtp=False)["mtp"] == []


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_first_draft_against_transformers(mtp_cases: MtpCases, name: str) -> None:
    """transformers reads our MTP layer with its own loader and drafts the same."""
    import torch
    from transformers.modeling_layers import MtpModel

    case = mtp_cases(name)
    main = type(case.oracle.torch_model).from_pretrained(case.checkpoint.path)
    # transformers finds MTP layers by the layer number of each published release
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{case.oracle.config.num_layers}\..*"]
    theirs = MtpModel.from_pretrained(main)
    tokens = torch.from_numpy(case.oracle.tokens[:, : LENGTH + 1].astype(np.int64))
    with torch.no_grad():
        hidden = main.model(tokens[:, :-1]).last_hidden_state
        positions = torch.arange(1, LENGTH + 1)[None, :]
        # its masks come from `forward_layer`, which draws one layer: no cache, so all rows at once
        reference = theirs._project_to_logits(
            theirs.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
        ).numpy()
    ours, _ = Drafts(case.checkpoint.config, case.weights).feed(case.next_tokens, hidden.numpy(), "expanded")
    assert np.abs(reference).max() > 1
    assert np.abs(ours - reference).max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [name if name in ("glm_moe_dsa", "glm4_moe") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_both_drafts_against_the_composition(mtp_cases: MtpCases, name: str) -> None:
    """From our own main stack, through the first draft at every position, to the second at the last."""
    case = mtp_cases(name)
    cfg, reference = case.checkpoint.config, case.torch_mtp
    fed = case.oracle.tokens[:, :LENGTH]
    rows = reference.rows(case.next_tokens, reference.hidden(fed))
    first, raw, normed = reference.run(rows)

    whole = case.oracle.tokens  # longer than the drafted part: the shape that other tests compile too
    _, hidden = Paged(case.oracle.config, case.oracle.weights).feed(whole, [whole.shape[1]] * SEQUENCES, "expanded")
    drafts = Drafts(cfg, case.weights)
    ours, carried = drafts.feed(case.next_tokens, hidden[:, :LENGTH], "expanded")
    assert np.abs(ours - first).max() < TOLERANCE

    # GLM carries the state after the shared-head norm, DeepSeek the raw one.
    carry = normed if name.startswith("glm") else raw
    assert np.abs(carried - carry.numpy()).max() < TOLERANCE
    drafted = first[:, -1:].argmax(-1).astype(np.int32)
    second = reference.run(torch_cat(rows, reference.rows(drafted, carry[:, -1:])))[0][:, -1]
    ours_second, _ = drafts.feed(drafted, carried[:, -1:], "absorbed")
    assert np.abs(ours_second[:, 0] - second).max() < TOLERANCE

    wrong = raw if name.startswith("glm") else normed
    other = reference.run(torch_cat(rows, reference.rows(drafted, wrong[:, -1:])))[0][:, -1]
    assert np.abs(other - second).max() > 10 * TOLERANCE, "the carries could not be told apart"


def test_an_mtp_layer_selects_past_index_topk(mtp_cases: MtpCases) -> None:
    """The MTP layer of a DSA model has an indexer of its own, even above layers that share."""
    case = mtp_cases("glm_moe_dsa")
    assert case.oracle.config.layers[-1].indexer == "shared"
    assert case.checkpoint.config.mtp_type.indexer == "full"
    assert "index_q" in case.weights["mtp"][0]
    assert LENGTH > 2 * TOPK


def torch_cat(*parts: Any) -> Any:
    import torch

    return torch.cat(parts, dim=1)
