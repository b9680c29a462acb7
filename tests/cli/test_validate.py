"""`glm5 validate`: what it prints, what it puts in JSON, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.cli import glm5, refused

DATA = Path(__file__).parents[1] / "data"


def test_json_of_step_times() -> None:
    result = glm5("validate", DATA / "ascend_step_dev.csv", "--json").json
    assert result["rows"] == len(result["rows_detail"]) == 3 and result["skipped"] == 0
    assert result["step_median_error"] > 0 and result["step_mape"] <= 0.12
    assert result["step_inside_band"] == 1.0 and "tpot_mape" not in result
    for row in result["rows_detail"]:
        low, high = row["band"]["step_s"]
        assert low < row["predicted"]["step_s"] < high and row["measured"]["step_s"] > 0
        assert row["evidence"] in ("measured", "fitted", "datasheet", "assumed")


def test_json_of_end_to_end_rows(tmp_path: Path) -> None:
    header, *rows = (DATA / "silicon_dev.csv").read_text().splitlines()
    chosen = tmp_path / "rows.csv"
    chosen.write_text("\n".join([header, rows[0], rows[12], rows[12].replace("h200-sxm", "abacus")]))
    result = glm5("validate", chosen, "--json").json
    assert result["rows"] == 2 and result["skipped"] == 1
    for name in ("tpot", "ttft"):
        for figure in ("mape", "median_error", "inside_band", "median_half_width"):
            assert 0 <= result[f"{name}_{figure}"] <= (4 if figure == "median_half_width" else 1)
    assert set(result["groups"]) == {
        f"{model} h200-sxm sglang tp8 dp1 ep1 pp1" for model in ("deepseek-v3", "glm-5-fp8")
    }
    assert "abacus" in result["rows_detail"][2]["skipped"] and result["rows_detail"][2]["predicted"] == {}


def test_table(tmp_path: Path) -> None:
    body = (DATA / "ascend_step_dev.csv").read_text()
    path = tmp_path / "steps.csv"
    path.write_text(body + body.splitlines()[1].replace("W8A8_DYNAMIC", "W1A1") + "\n")
    output = glm5("validate", path)
    assert output.code == 0 and "step_mape: " in output.out and "skipped: 1" in output.out
    assert "W1A1" in output.out and "kimi-k2.5" in output.out


@pytest.mark.parametrize(("body", "words"), [("", "an empty file"), ("a,b\n1,2\n", "no column model")])
def test_refusals(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(body)
    assert words in refused("validate", path)
    assert "No such file" in refused("validate", tmp_path / "none.csv")
