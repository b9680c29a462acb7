"""What engines leave for their KV pools, against their own logs, and the parts of it by hand."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.ledger import Ledger
from runtime.simulation.build import memories, spec_for

GIB = 2**30
LOGS = (Path(__file__).parent / "data" / "kv_pool_logs.csv").read_text().splitlines()[1:]


def held(
    model: str, engine: str, layout: Layout, kv: str, chip: str = "h200-sxm", formats: str = "fp8", **more: Any
) -> Ledger:
    settings = more.pop("settings", {})
    return memories(
        spec_for(load_config(model), hw_profiles.load(chip), layout, formats, kv, engine, settings, **more)
    )[0]


@pytest.mark.parametrize("row", list(csv.DictReader(LOGS)), ids=lambda row: row["id"])
def test_memory_is_what_engines_log(row: Mapping[str, str]) -> None:
    layout = Layout(*(int(row[axis]) for axis in ("tp", "dp", "ep")))
    settings = {name: int(value) for name, value in [row["set"].split("=")]} if row["set"] else {}
    found = held(row["model"], row["engine"], layout, row["kv"], row["chip"], row["formats"], settings=settings)
    said = {
        "loaded GiB": (found.weights_total_bytes + found.workspace_bytes) / GIB,
        "pool GiB": found.kv_bytes / GIB,
        "pool tokens": found.pool_tokens,
        "bytes a token": found.kv_bytes_per_token,
    }
    assert said[row["quantity"]] == pytest.approx(float(row["value"]), rel=0.03)


def test_vllms_workspaces_by_hand() -> None:
    """GLM-5.3 at TP8 and 1,048,576 positions: queries and widened cache of FlashMLA-sparse, selected tokens, copies of
    the up-projections in 78 layers of 8 heads, two rotary tables."""
    found = held("glm-5.3-fp8", "vllm@0.28", Layout(8), "fp8")
    sparse = 8192 * 8 * 576 * 2 + 5 * 1_048_576 * 576 * 2
    copies = 78 * 8 * 512 * (192 + 256) * 2
    assert found.workspace_bytes == pytest.approx(sparse + 8192 * 2048 * 4 + copies + 2 * 1_048_576 * 64 * 2)
    sampler = 25 * 1024 * 154_880
    assert found.activation_bytes == pytest.approx(sampler + GIB / 2)
    assert found.free_bytes == pytest.approx(0.08 * found.usable_bytes)


def test_a_16_bit_cache_is_not_widened_but_the_indexer_still_gathers() -> None:
    narrow, wide = (held("glm-5.3-fp8", "vllm@0.28", Layout(8), kv) for kv in ("fp8", "bf16"))
    assert narrow.workspace_bytes - wide.workspace_bytes == pytest.approx(5 * 1_048_576 * 1152)
    gathered = 40 * 1_048_576 * 132 - 8192 * 8 * 1152
    assert wide.activation_bytes - narrow.activation_bytes == pytest.approx(gathered)


def test_a_shorter_context_leaves_more_for_the_pool() -> None:
    whole = held("glm-5.3-fp8", "vllm", Layout(8), "fp8")
    short = held("glm-5.3-fp8", "vllm", Layout(8), "fp8", settings={"context_tokens": 131_072})
    assert short.kv_bytes - whole.kv_bytes == pytest.approx((1_048_576 - 131_072) * (5 * 1152 + 256))


@pytest.mark.parametrize("model", ["glm-4.6", "deepseek-v3", "glm-5-fp8"])
@pytest.mark.parametrize("engine", ["vllm", "vllm@0.16", "vllm-ascend", "sglang", "trtllm"])
def test_the_parts_are_the_whole(model: str, engine: str) -> None:
    chip = "ascend-910c-die" if engine == "vllm-ascend" else "h200-sxm"
    formats = "w8a8" if engine == "vllm-ascend" else "fp8"
    found = held(model, engine, Layout(8) if model == "glm-4.6" else Layout(16, ep=16), "bf16", chip, formats)
    parts = found.weights_total_bytes + found.workspace_bytes + found.kv_bytes + found.activation_bytes
    parts += found.communication_bytes + found.runtime_bytes + found.free_bytes
    assert parts == pytest.approx(found.usable_bytes) and found.free_bytes >= 0
    assert (found.workspace_bytes > 0) == (engine in ("vllm", "vllm@0.16") and model != "glm-4.6")


def test_fewer_requests_at_once_leave_more_for_the_pool() -> None:
    few, many = (
        held("deepseek-v3", "vllm", Layout(8), "bf16", settings={"max_running_requests": n}) for n in (256, 1024)
    )
    assert few.kv_bytes - many.kv_bytes == pytest.approx(25 * 1024 * 129_280 - few.activation_bytes + GIB / 2)
