"""Loads that `simulate` and `plan` can be asked about: shared prefixes, conversations, lengths of a distribution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.cli import glm5, refused

pytestmark = pytest.mark.usefixtures("coarse")
LOAD = ("--isl", 2048, "--osl", 16, "--concurrency", 2, "--length-ratio", 1)
FEW = ("simulate", *LOAD, "--requests", 20)


def test_a_shared_prefix_is_found_and_said(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = glm5(*FEW, "--shared-prefix", 0.75, "--json", "--html", page).json
    assert result["prefix_hit_rate"] == pytest.approx(0.75 * 19 / 20)  # the first finds nothing
    assert (result["load"]["shared_prefix"], result["load"]["prefix_groups"]) == (0.75, 1)
    assert "0.75 of each prompt shared by all" in page.read_text(encoding="utf-8")
    shown = glm5(*FEW, "--shared-prefix", "0.75:2").out
    assert "0.75 of each prompt shared by one of 2 groups" in shown and "% of prompt tokens found in it" in shown
    alone = glm5(*FEW, "--json").json
    assert result["ttft_ms"]["mean"] < alone["ttft_ms"]["mean"]
    assert glm5(*FEW, "--shared-prefix", 0, "--json").json == alone


def test_an_engine_whose_prefix_cache_is_off_says_so() -> None:
    words = (*FEW, "--shared-prefix", 0.75, "--set", "engine.prefix_cache=false")
    code, out, _ = glm5(*words)
    assert code == 0 and "note: the engine's prefix cache is off" in out and "0.0% of prompt tokens" in out


def test_conversations() -> None:
    result = glm5(*FEW, "--turns", 4, "--think-s", 3, "--json").json
    assert result["load"]["prompt_tokens"] == [2048, 4 * 2048 + 3 * 16] and result["load"]["turns"] == 4
    prompts = sum(turn * 2064 + 2048 for turn in range(4))
    assert result["prefix_hit_rate"] == pytest.approx(sum(turn * 2064 for turn in range(4)) / prompts, abs=0.02)
    assert (
        "2 clients, 2,048 to 8,240 tokens in and 16 out; conversations of 4 turns, 3 s between"
        in glm5(*FEW, "--turns", 4, "--think-s", 3).out
    )


def test_lengths_of_a_distribution(tmp_path: Path) -> None:
    words = ("simulate", "--isl", 500, "--osl", 8, "--concurrency", 4, "--requests", 60)
    spread = glm5(*words, "--length-cv", 1, "--json").json
    low, high = spread["load"]["prompt_tokens"]
    assert low < 250 and 1000 < high <= 4000 and spread["load"]["length_ratio"] is None
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens,weight\n100,4,3\n900,9,1\n")
    words = ("simulate", "--concurrency", 4, "--requests", 40, "--length-file", path)
    given = glm5(*words, "--json").json
    assert given["load"]["prompt_tokens"] == [100, 900] and given["load"]["output_tokens"] == [4, 9]


def test_a_plan_holds_its_load(tmp_path: Path) -> None:
    """A file of lengths is in the plan, which is simulated again without it; and what is shared is worth something."""
    path, plan = tmp_path / "lengths.csv", tmp_path / "plan.json"
    path.write_text("input_tokens,output_tokens\n1000,8\n3000,16\n")
    words = ("plan", "--tp", 8, "--pp", 1, "--kv", "bf16", "--formats", "fp8", "--concurrency", 4, "--out", plan)
    said = glm5(*words, "--length-file", path, "--shared-prefix", "0.5:2")
    assert "prefix cache: " in said.out and "on average 2,000 and 12 (2 kinds)" in said.out
    path.unlink()
    made = json.loads(plan.read_text())
    assert made["demand"]["histogram"] == [[1000, 8, 1.0], [3000, 16, 1.0]]
    again = glm5("simulate", "--plan", plan, "--json").json
    assert again["ttft_ms"]["mean"] == pytest.approx(made["predicted"]["ttft_ms"]["mean"])
    assert again["prefix_hit_rate"] == pytest.approx(made["predicted"]["prefix_hit_rate"]) and again["prefix_hit_rate"]
    more = glm5("simulate", "--plan", plan, "--shared-prefix", 0.9, "--json").json
    assert more["prefix_hit_rate"] > again["prefix_hit_rate"]
    assert "lengths are those of a file" in refused("simulate", "--plan", plan, "--isl", 5)


def test_acceptance_by_position(tmp_path: Path) -> None:
    words = ("simulate", "--isl", 1024, "--osl", 64, "--concurrency", 1, "--requests", 40)
    by_position = glm5(*words, "--mtp", 3, "--acceptance", "0.9,0.5,0.2", "--json").json
    mean = 1 + 0.9 + 0.9 * 0.5 + 0.9 * 0.5 * 0.2
    as_mean = glm5(*words, "--mtp", 3, "--accept", mean, "--json").json
    assert by_position["tpot_ms"]["mean"] == pytest.approx(as_mean["tpot_ms"]["mean"], rel=0.05)
    assert not any("acceptance" in line for line in by_position["assumed"])
    assert glm5(*words, "--acceptance", "0.9,0.5,0.2", "--json").json == by_position
    plan = tmp_path / "plan.json"
    held = ("--tp", 8, "--pp", 1, "--kv", "bf16", "--formats", "fp8", "--concurrency", 4, "--isl", 512, "--osl", 32)
    made = glm5("plan", *held, "--acceptance", "0.9,0.5,0.2", "--out", plan, "--json").json
    assert made["pools"][-1]["acceptance"] == [0.9, 0.5, 0.2]
    again = glm5("simulate", "--plan", plan, "--json").json
    assert again["tpot_ms"]["mean"] == pytest.approx(made["predicted"]["tpot_ms"]["mean"])


MISTAKES = [
    ("--acceptance 0.9,1.2", "chances from 0 to 1"),
    ("--acceptance 0.9,,0.2", "give a chance"),
    ("--acceptance nan", "chances from 0 to 1"),
    ("--mtp 2 --acceptance 0.9", "1 chances for the 2 drafts"),
    ("--shared-prefix 1.5", "from 0 to 1"),
    ("--shared-prefix -0.1", "from 0 to 1"),
    ("--shared-prefix nan", "from 0 to 1"),
    ("--shared-prefix most", "give a share from 0 to 1"),
    ("--shared-prefix 0.8:", "0.8 or 0.8:16"),
    ("--shared-prefix 0.8:0", "groups: give at least 1"),
    ("--shared-prefix 0.8:x", "0.8 or 0.8:16"),
    ("--shared-prefix 0.8:9999999999", "1,000,000"),
    ("--turns 0", "greater than or equal to 1"),
    ("--turns 1000000", "less than or equal to 10000"),
    ("--turns 100 --concurrency 1 --requests 1", "positions"),
    ("--think-s 3", "add --turns"),
    ("--turns 2 --think-s -1", "--think-s -1"),
    ("--turns 2 --think-s nan", "--think-s nan"),
    ("--length-cv 0", "cv from 0"),
    ("--length-cv nan", "cv from 0"),
    ("--length-cv 1 --length-ratio 0.5", "--length-ratio does not go with --length-cv"),
    ("--length-file none.csv", "cannot read the lengths none.csv"),
    ("--length-file none.csv --isl 5", "--isl does not go with --length-file"),
    ("--trace-file t.jsonl --shared-prefix 0.5", "--shared-prefix does not go with --trace-file"),
    ("--trace-file t.jsonl --turns 2", "--turns does not go with --trace-file"),
    ("--isl 200000 --osl 9000 --length-cv 1", "positions"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes(words: str, said: str) -> None:
    assert said in refused("simulate", *words.split())
    if "trace" not in words and "requests" not in words:
        assert said in refused("plan", *words.split())
