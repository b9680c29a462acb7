"""Profiles made of measured operators: of a run.py's JSON, and of msmodeling's CSV form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from runtime.porting import operator_times
from runtime.simulation import package_runs
from tests.cli.cli import glm5, refused

CHIP = hw_profiles.load("ascend-910c-die")
PEAK, RATE = CHIP.number("chip.peak.bf16_flops_per_s"), CHIP.number("chip.memory.bandwidth_bytes_per_s")
LAUNCH = CHIP.number("overhead.kernel_launch_s")
assert PEAK and RATE and LAUNCH
INT8 = 707.8e12
HEAD = "Input Shapes,Input Data Types,Output Shapes,Output Data Types,Duration(us)"


def _product(name: str, m: int, k: int, n: int, seconds: float, equation: str = "") -> dict[str, Any]:
    kind = "int8" if "quant_matmul" in name else "bfloat16"
    return {
        "operator": name, "phase": "decode", "equation": equation, "calls_a_step": 1, "median_s": seconds,
        "inputs": [{"shape": [m, k], "dtype": kind}, {"shape": [k, n], "dtype": kind}],
        "outputs": [{"shape": [m, n], "dtype": "bfloat16"}],
    }  # fmt: skip


def run_json(compute: float, memory: float, empty: float = 2e-5) -> dict[str, Any]:
    """Large products at `compute` of the peak, and of one row at `memory` of the bandwidth."""
    rows = []
    for size in (2048, 4096, 8192):
        rows.append(_product("aten.mm", size, size, size, empty + 2 * size**3 / (PEAK * compute)))
        rows.append(_product("npu.npu_quant_matmul", size, size, size, empty + 2 * size**3 / (INT8 * compute)))
        moved = 2 * (size + size * size + size)
        rows.append(_product("aten.einsum", 1, size, size, empty + moved / (RATE * memory), "ab,bc->ac"))
    rows.append({**_product("npu.npu_swiglu", 4, 64, 32, 1e-5), "operator": "npu.npu_swiglu"})
    gear = {"sequences": 4, "tokens": 1, "context_pages": 64}
    step = {"median_s": 0.05, "least_s": 0.05, "p90_s": 0.05, "count": 20}
    return {
        "kind": "glm5-npu-measurements", "version": 1, "model": "glm-5", "layout": "tp16 dp1 ep16 pp1", "devices": 16,
        "formats": "w8a8", "device": "Ascend910_9362", "empty_s": empty, "operators": rows,
        "programs": [
            {"phase": "decode", "gear": gear, "context_tokens": 8192, "step": step, "units": {}},
            {"phase": "prefill", "gear": {**gear, "sequences": 1, "tokens": 2048}, "context_tokens": 8192, "step": step,
             "units": {}},
        ],
    }  # fmt: skip


def _curves(path: Path) -> dict[str, Any]:
    return {name: curve for name, curve in hw_profiles.load(path).curves.items()}


def test_the_shares_that_products_reach_become_the_profiles_curves(tmp_path: Path):
    measured, out = tmp_path / "m.json", tmp_path / "mine.toml"
    measured.write_text(json.dumps(run_json(0.6, 0.5)))
    done = glm5("calibrate", "--from", measured, "--profile", "ascend-910c-die", "--out", out)
    assert done.code == 0, done.err
    curves = _curves(out)
    assert [share for _, share in curves["efficiency.compute"].knots] == pytest.approx([0.6] * 3, rel=1e-3)
    assert [share for _, share in curves["efficiency.memory"].knots] == pytest.approx([0.5] * 3, rel=1e-3)
    assert curves["efficiency.compute"].knots[1][0] == pytest.approx(2 * 4096**3, rel=1e-3)
    assert curves["efficiency.network"] == CHIP.curves["efficiency.network"]
    assert curves["efficiency.compute"].evidence == "measured"
    assert hw_profiles.load(out).figures == CHIP.figures


def test_a_grouped_product_does_the_work_of_the_rows_that_are_in_groups(tmp_path: Path):
    """Given 512 rows and 16 matrices, of which 32 rows for 8 of them: as much as 32 rows and 8 matrices are."""
    k, n = 6144, 4096
    call = _product("npu.npu_grouped_matmul", 512, k, n, 1e-3)
    call["inputs"][1]["shape"] = [16, k, n]
    few = {**call, "rows": 32.0, "groups": 8.0}
    measured = tmp_path / "m.json"
    measured.write_text(json.dumps({**run_json(0.6, 0.5), "operators": [call, few], "empty_s": 0.0}))
    whole, found = map(operator_times.product, operator_times.read(measured, 0.0))
    assert whole and found
    assert whole.flops == 2 * 512 * k * n and found.flops == 2 * 32 * k * n
    assert found.bytes == 2 * (32 * k + 8 * k * n + 32 * n)


def test_msmodelings_table_of_a_kernel_is_read_in_its_form(tmp_path: Path):
    """Quotes inside the cell, an int8 weight in FRACTAL_NZ's four dims, absent inputs, a row that was not measured."""
    lines = ["Input Shapes,Input Data Types,Input Formats,Output Shapes,Output Data Types,Average Duration(us)"]
    for m in (1024, 2048, 4096):
        k = n = 4096
        micros = (2 * m * k * n / (INT8 * 0.55) + LAUNCH) * 1e6
        lines.append(
            f'"""{m},{k};{n // 32},{k // 16},16,32;{n};{n};""",INT8;INT8;FLOAT;INT32;FLOAT,ND;FRACTAL_NZ;ND;ND;ND,'
            f'"""{m},{n}""",DT_BF16,{micros}'
        )
    lines.append('"1,64;4,4,16,32;128;128",INT8;INT8;FLOAT;INT32,ND;FRACTAL_NZ;ND;ND,"1,128",DT_BF16,0')
    folder, out = tmp_path / "table", tmp_path / "mine.toml"
    folder.mkdir()
    (folder / "QuantBatchMatmulV3.csv").write_text("\n".join(lines))
    (folder / "Softmax.csv").write_text("no product\n")
    for source in (folder, folder / "QuantBatchMatmulV3.csv"):
        found = glm5("calibrate", "--from", source, "--profile", "ascend-910c-die", "--out", out, "--json").json
        assert found["operators"] == found["products"] == 3
        assert [share for _, share in found["efficiency.compute"]] == pytest.approx([0.55] * 3, rel=1e-2)
        assert _curves(out)["efficiency.memory"] == CHIP.curves["efficiency.memory"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("m.json", "{", "cannot be read"),
        ("m.json", '{"kind": "other"}', "no measurements of a package's run.py"),
        ("m.json", '{"kind": "glm5-npu-measurements", "version": 9}', "of version 9, this release reads 1"),
        ("m.json", json.dumps({**run_json(0.6, 0.5), "operators": []}), "no measured operators"),
        ("m.json", json.dumps({**run_json(0.6, 0.5), "empty_s": None}), "measure again with this package's run.py"),
        ("Softmax.csv", "a,b\n1,2\n", "a kernel that prices have none of"),
        ("MatMulV2.csv", "a,b\n1,2\n", "no column Input Shapes"),
        ("MatMulV2.csv", f"{HEAD}\nx,INT8,1,INT8,4\n", "line 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_and_writes_nothing(name: str, text: str, says: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    out = tmp_path / "mine.toml"
    said = refused("calibrate", "--from", tmp_path / name, "--profile", "ascend-910c-die", "--out", out)
    assert says in said and not out.exists()


def test_options_that_contradict_each_other_are_refused(tmp_path: Path):
    assert "go together" in refused("calibrate", "--from", tmp_path / "m.json")
    assert "leave out" in refused("calibrate", "--from", tmp_path / "m.json", "--profile", "h200-sxm", "--quick")


def test_the_runner_writes_what_is_read_here():
    pytest.importorskip("torch")
    from runtime.porting.export import ascend_run

    assert (ascend_run.MEASUREMENTS, ascend_run.MEASUREMENTS_VERSION) == (package_runs.KIND, package_runs.VERSION)


def test_validate_scores_the_steps_of_a_run(tmp_path: Path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(run_json(0.6, 0.5)))
    decode, prefill = glm5("validate", path, "--json").json["rows_detail"]
    assert not decode["skipped"] and not prefill["skipped"]
    assert decode["measured"] == {"step_s": 0.05}
    csv = tmp_path / "steps.csv"
    csv.write_text(
        "device,model,num_queries,query_len,context,world,tp,dp,ep,mtp,q_linear,q_attn,measured_s\n"
        "ascend-910c-die,glm-5,4,1,8192,16,16,1,16,0,W8A8_DYNAMIC,DISABLED,0.05\n"
    )
    (same,) = glm5("validate", csv, "--json").json["rows_detail"]
    assert decode["predicted"] == same["predicted"]
    assert math.isfinite(prefill["predicted"]["step_s"]) and prefill["predicted"]["step_s"] > 0
    path.write_text('{"kind": "glm5-npu-measurements", "version": 1, "programs": []}')
    assert "no steps that a package's run.py has measured" in refused("validate", path)
