"""`glm5 model`: exact counts, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.execution.local.load import embedded_checkpoint
from tests.cli.cli import glm5, refused

MEASURED = """
import sys
from pathlib import Path
from runtime.cli.main import main
try:
    main(["model", "glm-5", "--json"])
finally:
    status = Path("/proc/self/status")
    peak = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else [0]
    print(int(peak[0]) * 1024, "jax" in sys.modules, file=sys.stderr)
"""  # noqa: E501


def test_glm_5_in_little_memory_without_jax() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    peak_bytes, jax = done.stderr.split()
    assert int(peak_bytes) < 1e9 and jax == "False"
    result = json.loads(done.stdout)
    assert 743.5e9 < result["parameters_total"] < 744.5e9
    assert 40e9 < result["parameters_active"] < 41e9
    assert sum(result["parameters_by_component"].values()) == result["parameters_total"]
    assert sum(result["active_by_component"].values()) == result["parameters_active"]
    assert result["parameters_embedding"] == 154880 * 6144
    assert 9.5e9 < result["parameters_mtp"] < 10.5e9 and "mtp" not in result["parameters_by_component"]
    assert result["kv_bytes_per_token"]["fp8"] == 61464
    assert result["kv_bytes_per_token"]["bf16_kv_fp8_index"] == 100152
    assert result["layer_types"] == {
        "mla-full-indexer-dense": 3,
        "mla-full-indexer-moe": 75,
        "mtp-mla-full-indexer-moe": 1,
    }


@pytest.mark.parametrize(("name", "fp8"), [("glm-5.2", 53940), ("deepseek-v3.2", 48068)])
def test_cache_bytes(name: str, fp8: int) -> None:
    assert glm5("model", name, "--json").json["kv_bytes_per_token"]["fp8"] == fp8


def test_a_directory_and_a_file(tmp_path: Path) -> None:
    result = glm5("model", embedded_checkpoint(), "--json").json
    assert result == {**glm5("model", embedded_checkpoint() / "config.json", "--json").json}
    assert result["layer_types"]["mla-shared-indexer-moe"] == 1
    assert "config.json: no such file" in refused("model", tmp_path)


def test_table() -> None:
    output = glm5("model", "glm-4.7-flash")
    rows = {line.split()[0]: line.split() for line in output.out.splitlines() if line.strip()}
    assert output.code == 0 and {"experts", "attention", "sum", "bf16", "fp8", "mla-moe"} <= set(rows)


def test_refusals() -> None:
    assert "no model named 'glm-6'" in refused("model", "glm-6")
    assert "Missing argument" in refused("model")
