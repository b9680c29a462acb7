"""Tables by engine release: which one a deployment is priced by, against rows of the tables themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.pricing import load, open_book
from runtime.pricing.book import PRICES_FOLDER
from runtime.pricing.choices import fused_reduce
from runtime.pricing.eras import choose, engine_of, order
from tests.cost.chips import CHIPS


def at(release: str) -> tuple[Any, ...]:
    found = order(release)
    assert found is not None
    return found


ROWS = list(csv.DictReader((Path(__file__).parent / "eras.csv").read_text().splitlines()))


def test_releases_sort_as_their_projects_number_them() -> None:
    ascending = [
        "0.4.9",
        "0.5.6.post1",
        "0.5.6.post2",
        "0.5.9",
        "0.5.10",
        "v0.5.14",
        "1.0rc3",
        "1.0",
        "1.3.0rc20",
        "1.3.0",
    ]
    assert sorted(ascending, key=at) == ascending
    assert order("0.13") == order("0.13.0")
    assert order("nightly") is None and order("glm5-hopper") is None and order("") is None


@given(st.lists(st.sampled_from(["0.5.6.post2", "0.5.9", "0.5.10", "0.5.14"]), min_size=1, unique=True),
       st.sampled_from(["0.4", "0.5.6.post1", "0.5.7", "0.5.10", "0.6"]))  # fmt: skip
def test_the_newest_table_that_is_not_newer(releases: list[str], asked: str) -> None:
    releases.sort(key=at, reverse=True)
    key = "gemm/bf16/sglang"
    entries = {key if not i else f"{key}@{r}": {"release": r} for i, r in enumerate(releases)}
    chosen = choose(entries, "sglang", asked)[key]
    not_newer = [r for r in releases if at(r) <= at(asked)]
    assert chosen.body["release"] == (not_newer[0] if not_newer else releases[-1])
    assert bool(chosen.later) == (not not_newer)
    assert choose(entries, "vllm", asked)[key].body["release"] == releases[0]


def test_a_table_that_a_later_release_split_is_whole_before() -> None:
    entries = {
        "moe/fp8-block/vllm": {"release": "0.24.0"},
        "moe/fp8-block/vllm/tp": {"release": "0.24.0"},
        "moe/fp8-block/vllm@0.19.0": {"release": "0.19.0"},
    }
    assert set(choose(entries, "vllm", "0.20")) == {"moe/fp8-block/vllm"}
    assert set(choose(entries, "vllm", "0.24")) == {"moe/fp8-block/vllm", "moe/fp8-block/vllm/tp"}
    assert engine_of("all_reduce/8/sglang-graph@0.5.9") == ("all_reduce/8/sglang-graph", "sglang")


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['kind']}-{r['profile']}-{r['engine']}-{r['release']}")
def test_a_release_is_priced_by_its_own_table(row: dict[str, str]) -> None:
    book = open_book(CHIPS[row["profile"]], row["engine"], release=row["release"])
    given_: dict[str, Any] = dict(pair.split("=") for pair in row["arguments"].split(";"))
    n = {key: int(value) for key, value in given_.items() if value.isdigit()}
    if row["kind"] == "all_reduce":
        price = book.network.collective("all_reduce", n["bytes"], n["group"])
    else:
        even = load.balanced(256)
        price = book.moe(n["tokens"], 6144, 2048, 8, even, n["moe_tp"], n["moe_ep"], given_["format"])
    assert price.evidence == "fitted"
    assert price.seconds * 1e3 == pytest.approx(float(row["milliseconds"]), rel=0.25)


@pytest.mark.parametrize(
    ("profile", "format_"),
    [("a100-sxm-80gb", "bf16"), ("a100-sxm-80gb", "w4a16"), ("h200-sxm", "fp8-block"), ("h100-sxm", "w4a16")],
)
def test_experts_split_by_expert_take_about_as_long_as_split_by_width(profile: str, format_: str) -> None:
    """SGLang's tables up to 0.5.10 gave each rank every choice of a token: they are even."""
    book, even = open_book(CHIPS[profile], "sglang", release="0.5.10"), load.balanced(256)
    by_width, by_expert = (book.moe(8192, 6144, 2048, 8, even, tp, ep, format_).seconds for tp, ep in ((8, 1), (1, 8)))
    assert 0.5 < by_expert / by_width < 1.35


@pytest.mark.parametrize("path", sorted(PRICES_FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_eras_are_kept_where_they_differ_only(path: Path) -> None:
    body = json.loads(path.read_text())
    assert path.stat().st_size < 330_000
    for table in (body["kernels"], body["collectives"]):
        for key, entry in table.items():
            base, _, release = key.partition("@")
            if release:
                assert base in table and at(entry["release"]) <= at(release) < at(table[base]["release"])


@pytest.mark.parametrize(
    ("release", "family", "model", "fused"),
    [
        ("0.5.3", "blackwell", "deepseek_v3", False),
        ("0.5.6.post1", "blackwell", "deepseek_v3", True),
        ("0.5.6.post1", "hopper", "deepseek_v3", False),
        ("0.5.9", "hopper", "deepseek_v3", True),
        ("0.5.9", "hopper", "glm_moe_dsa", False),
        ("0.5.14", "hopper", "glm_moe_dsa", True),
        ("0.5.14", "ampere", "glm4_moe", False),
        ("nightly", "hopper", "deepseek_v3", False),
    ],
)
def test_a_release_fuses_the_all_reduces_that_its_source_says(
    release: str, family: str, model: str, fused: bool
) -> None:
    assert (fused_reduce("sglang", release, family, model) is not None) == fused
    assert fused_reduce("vllm", release, family, model) is None


def test_a_fused_all_reduce_is_priced_by_the_table_of_its_kernel() -> None:
    book = open_book(CHIPS["h200-sxm"], "sglang", release="0.5.9", family="hopper")
    own, fused = (book.network.collective("all_reduce", 229_376, 8, tables=t).seconds for t in ("", "trtllm"))
    trtllm = open_book(CHIPS["h200-sxm"], "trtllm").network.collective("all_reduce", 229_376, 8).seconds
    assert fused == trtllm < own
