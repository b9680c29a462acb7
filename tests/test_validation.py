"""Scored on measurements: the accuracy promised on the shipped rows, and files that are wrong in every way."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from foundation.errors import UsageError
from model.hf_config import load_config
from runtime.deployment.engines import Circumstances
from runtime.deployment.engines.inferencex import launch_kv, launch_settings
from runtime.simulation.published import model_of
from runtime.simulation.scores import ScoredRow, by_group, summary
from runtime.simulation.validation import END_TO_END, STEP, read_rows, score

DATA = Path(__file__).parent / "data"
SILICON, ASCEND = DATA / "silicon_dev.csv", DATA / "ascend_step_dev.csv"
GLM, SGLANG, TRTLLM = (
    f"{name} tp8 dp1 ep1 pp1"
    for name in ("glm-5-fp8 h200-sxm sglang", "deepseek-v3 h200-sxm sglang", "deepseek-v3 h200-sxm trtllm")
)


@cache
def scored(path: Path) -> tuple[ScoredRow, ...]:
    return tuple(score(path))


def test_every_row_is_priced() -> None:
    assert [row.skipped for row in (*scored(SILICON), *scored(ASCEND))] == [None] * 21
    assert {name: group["rows"] for name, group in by_group(scored(SILICON)).items()} == {SGLANG: 8, TRTLLM: 4, GLM: 6}


def test_glm_5_rows() -> None:
    glm = by_group(scored(SILICON))[GLM]
    assert glm["tpot_mape"] <= 0.09 and glm["tpot_median_error"] <= 0.05
    assert glm["ttft_mape"] <= 0.15 and "saturated_rows" not in glm


def test_deepseek_rows() -> None:
    groups = by_group(scored(SILICON))
    assert groups[SGLANG]["tpot_mape"] <= 0.15 and groups[TRTLLM]["tpot_mape"] <= 0.15
    assert groups[SGLANG]["ttft_mape"] <= 0.15


def test_a_saturated_row_is_called_so() -> None:
    """TTFT rises from 0.7 s at 16 to 2.3 s at 64 in flight: prompts wait for KV pages."""
    (saturated,) = [row for row in scored(SILICON) if row.saturated]
    assert saturated.name == "deepseek-v3 h200-sxm sglang 8192/1024 c64"
    assert saturated.error("ttft_ms") <= 0.55


def test_a_saturated_row_may_have_measured_no_ttft() -> None:
    figure = {"output_tok_s": 500.0}
    row = ScoredRow("k15", figure, figure, {"output_tok_s": [400.0, 600.0]}, saturated=True, evidence="assumed")
    assert summary([row])["saturated_rows"] == 1 and "saturated_ttft_mape" not in summary([row])


def test_ascend_steps() -> None:
    assert summary(scored(ASCEND))["step_mape"] <= 0.12


@pytest.mark.parametrize("ep", ["1", "4", "8", "16"])
def test_a_step_has_the_expert_groups_that_its_row_says(tmp_path: Path, ep: str) -> None:
    with ASCEND.open(newline="") as file:
        row = next(each for each in csv.DictReader(file) if each["tp"] == "4")
    (read,) = score(write(tmp_path / "steps.csv", row | {"ep": ep}))
    assert read.skipped is None and f" tp4 dp4 ep{ep} " in f" {read.group} "


@pytest.mark.parametrize(("ep", "why"), [("3", "ep"), ("32", "ep"), ("0", "ep")])
def test_expert_groups_that_do_not_divide_are_said(tmp_path: Path, ep: str, why: str) -> None:
    with ASCEND.open(newline="") as file:
        row = next(each for each in csv.DictReader(file) if each["tp"] == "4")
    (read,) = score(write(tmp_path / "steps.csv", row | {"ep": ep}))
    assert read.skipped and why in read.skipped and "\n" not in read.skipped


def test_the_bands_hold() -> None:
    rows = (*scored(SILICON), *scored(ASCEND))
    held = [row.inside(quantity) for row in rows for quantity in row.predicted]
    assert sum(held) / len(held) >= 0.85
    assert summary(rows)["inside_band"] == sum(held) / len(held)


# --- rows and files that are wrong


def cells(**changed: Any) -> dict[str, str]:
    with SILICON.open(newline="") as file:
        first = next(csv.DictReader(file))
    return {**first, "osl": "64", **{name: str(value) for name, value in changed.items()}}


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "llama-9"}, "no model named 'llama-9'"),
    ({"system": "tpu-v9"}, "no profile named tpu-v9"),
    ({"engine": "lightllm"}, "unknown engine 'lightllm'"),
    ({"engine": ""}, "column engine is empty"),
    ({"precision": "fp3"}, "unknown formats 'fp3'"),
    ({"isl": "many"}, "malformed"),
    ({"isl": 0}, "0"),
    ({"osl": -5}, "-5"),
    ({"concurrency": 0}, "0"),
    ({"concurrency": "2.5"}, "malformed"),
    ({"tp": 7}, "128 / 7"),
    ({"tp": 2}, "does not fit 2 devices"),
    ({"ep": 3}, "ep must divide"),
    ({"ttft_ms": ""}, "column ttft_ms is empty"),
    ({"ttft_ms": "nan"}, "above zero"),
    ({"tpot_ms": 0}, "above zero"),
    ({"tpot_ms": "fast"}, "not a number"),
    ({"isl": 900000}, "tokens of KV cache"),
]


def test_rows_that_cannot_be_priced_are_listed_with_the_reason(tmp_path: Path) -> None:
    good, *bad = rows = score(write(tmp_path / "rows.csv", cells(), *(cells(**changed) for changed, _ in WRONG)))
    assert good.skipped is None
    for row, (changed, reason) in zip(bad, WRONG, strict=True):
        assert row.skipped is not None and reason in row.skipped and "\n" not in row.skipped, changed
    result = summary(rows)
    assert (result["rows"], result["skipped"]) == (1, len(WRONG))


def test_a_file_of_nothing_but_bad_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row can be read; the first: column tp is empty"):
        read_rows(write(tmp_path / "rows.csv", cells(tp=""), cells(ttft_ms="x")))


@pytest.mark.parametrize("name", ["/etc/hostname.json", "../config.json", "gone.json"])
def test_a_file_of_measurements_names_no_files_of_others(tmp_path: Path, name: str) -> None:
    """Whoever wrote it is not who runs it."""
    folder = tmp_path / "sent"
    folder.mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="give a name, or a file beside this one"):
        read_rows(write(folder / "rows.csv", cells(model=name)))
    (folder / "config.json").write_text("{}")
    (row,) = read_rows(write(folder / "rows.csv", cells(model="config.json")))[1]
    assert Path(row["model"]) == folder / "config.json"
    assert "no model named" in str(score(write(folder / "rows.csv", cells(model=str(tmp_path))))[0].skipped)


def test_nothing_priced_is_a_summary_of_nothing(tmp_path: Path) -> None:
    rows = score(write(tmp_path / "rows.csv", cells(tp=7)))
    assert summary(rows) == {"rows": 0, "skipped": 1} and by_group(rows) == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "an empty file"),
        (",".join(END_TO_END).encode() + b"\n", "no rows below the header"),
        (b"model,system\nglm-5,h200-sxm\n", "no column precision, engine"),
        (b"measured_s,model\n1,x\n", "no column device, num_queries"),
        (b"\xff\xfe\x00", "not a CSV file"),
        (",".join(STEP).encode() + b"\na,b\n", "no row can be read"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, body: bytes, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(body)
    with pytest.raises(UsageError) as refused:
        score(path)
    assert words in str(refused.value) and "rows.csv" in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UsageError, match="directory"):
            score(path)


def test_a_byte_order_mark_is_no_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + SILICON.read_bytes())
    assert read_rows(path) == read_rows(SILICON)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    score(ASCEND, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_what_the_launch_scripts_pass() -> None:
    """docs/validation.md lists them; they depend on the engine, the chip's generation and the lengths."""
    hopper, blackwell = (
        Circumstances.of(load_config("glm-5-fp8"), hw_profiles.load(chip)) for chip in ("h200-sxm", "b200-sxm")
    )
    v3 = Circumstances.of(load_config("deepseek-v3"), hw_profiles.load("h200-sxm"))
    assert launch_settings("sglang", hopper, 20, 1024, 1024) == {"memory_fraction": 0.85}
    new = launch_settings("sglang", blackwell, 20, 1024, 1024)
    assert new["max_running_requests"] == 20 and new["graph_batch_sizes"] == [1, 2, 4, 8, 16, 20]
    assert launch_settings("sglang", v3, 20, 1024, 1024)["max_running_requests"] == 512
    assert launch_settings("sglang", v3, 20, 8192, 1024)["max_running_requests"] == 256
    assert launch_settings("trtllm", v3, 20, 8192, 1024)["max_step_tokens"] == 8320
    assert launch_settings("vllm", v3, 20, 8192, 1024) == {}
    assert (launch_kv("trtllm"), launch_kv("sglang")) == ("fp8", None)


def test_models_by_their_hugging_face_names() -> None:
    names = {"deepseek-ai/DeepSeek-V3.1": "deepseek-v3", "zai-org/GLM-5-FP8": "glm-5-fp8", "glm-5": "glm-5"}
    assert {name: model_of(name).name for name in names} == names
