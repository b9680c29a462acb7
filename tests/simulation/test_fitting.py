"""`glm5 fit`: constants that made measurements are found from them, and what the fit is worth is said by other rows."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import UsageError
from runtime.deployment.engines import load
from runtime.deployment.errors import EngineError
from runtime.pricing.bands import NOISE, band_of_own
from runtime.serving import simulate
from runtime.simulation.build import PriceTables, build
from runtime.simulation.fitting import FITTABLE, Fit, fit, write_engine
from runtime.simulation.published import COLUMNS, PublishedRow, read
from runtime.simulation.trust import report_bands
from runtime.simulation.validation import beside
from tests.cli.cli import glm5, refused

LOADS = ((1, 256), (2, 1024), (4, 512), (8, 1024), (16, 256))
TRUE = {"kernel_time_factor": 1.25, "request_seconds": 0.02}
TABLES = PriceTables()


def row(clients: int, isl: int, **more: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {
        "source": "mine", "model": "glm-4.7-flash", "formats": "bf16", "chip": "h200-sxm", "engine": "vllm",
        "engine_version": "0.16", "tp": "1", "dp": "1", "ep": "1", "pp": "1", "mtp": "0", "isl": str(isl), "osl": "64",
        "length_ratio": "1.0", "concurrency": str(clients), "num_prompts": str(4 * clients),
    } | more  # fmt: skip


def figures(asked: PublishedRow, settings: Mapping[str, Any]) -> dict[str, float]:
    """What a server of those constants would measure."""
    spec = dataclasses.replace(asked, settings=settings).spec()
    return beside(asked, simulate(asked.load, build(spec, TABLES).deployment))[1]


def measured(path: Path, settings: Mapping[str, Any], loads: Any = LOADS, **more: str) -> Path:
    columns = ("ttft_mean_ms", "tpot_mean_ms", "output_tok_s")
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [*COLUMNS, *columns])
        out.writeheader()
        for each in loads:
            cells = row(*each, **more) | dict.fromkeys(columns, "1")
            made = figures(read(cells), settings)
            out.writerow(cells | {"ttft_mean_ms": made["ttft_ms"], "tpot_mean_ms": made["tpot_ms"],
                                  "output_tok_s": made["output_tok_s"]})  # fmt: skip
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Fit]:
    """(measurements of a server whose constants are `TRUE`, the engine fitted to them, the fit)."""
    folder = tmp_path_factory.mktemp("fit")
    rows = measured(folder / "rows.csv", TRUE)
    found = fit(rows)
    write_engine(folder / "mine.toml", found, "rows.csv")
    return rows, folder / "mine.toml", found


@pytest.mark.slow
def test_constants_are_found_from_five_rows(fitted: tuple[Path, Path, Fit]) -> None:
    _, path, found = fitted
    before, after = found.errors
    assert found.rows == 5 and found.helps and before > 0.15 and after < 0.25 * before
    assert found.values["kernel_time_factor"] == pytest.approx(1.25, abs=0.12)
    limits = {each.name: (each.low, each.high) for each in FITTABLE}
    assert all(limits[name][0] <= value <= limits[name][1] for name, value in found.values.items())
    engine = load(str(path))
    assert (engine.kind, engine.release, engine.name) == ("vllm", "0.16", "mine")
    assert engine.kernel_time_factor == found.values["kernel_time_factor"]
    assert engine.evidence["kernel_time_factor"].source == "fitted to rows.csv"
    plain = load("vllm@0.16")
    assert engine.max_running_requests == plain.max_running_requests


@pytest.mark.slow
def test_a_load_that_was_not_measured_is_predicted_better(fitted: tuple[Path, Path, Fit]) -> None:
    asked = read(row(6, 768, tpot_mean_ms="1", ttft_mean_ms="1"))
    truth, plain = figures(asked, TRUE), figures(asked, {})
    bent = figures(dataclasses.replace(asked, engine=str(fitted[1])), {})
    for name, left in (("tpot_ms", 0.4), ("ttft_ms", 1.0)):  # of a few prompts' TTFT much is chance
        assert abs(math.log(truth[name] / bent[name])) < left * abs(math.log(truth[name] / plain[name])), name


@pytest.mark.slow
def test_bands_rest_on_the_rows_left_out(fitted: tuple[Path, Path, Fit]) -> None:
    """Narrower than the public band under a load like the measured ones, wider beyond, and said of what it rests on."""

    def bands(engine: str, clients: int, **more: str) -> Any:
        asked = dataclasses.replace(read(row(clients, 512, tpot_mean_ms="1", **more)), engine=engine)
        built = build(asked.spec(), TABLES)
        return report_bands(built, simulate(asked.load, built.deployment))["tpot"]

    public, own, beyond = bands("vllm@0.16", 4), bands(str(fitted[1]), 4), bands(str(fitted[1]), 64)
    assert own.basis.startswith("5 measurements of this deployment")
    assert own.high - own.low < beyond.high - beyond.low < public.high - public.low
    assert "unlike theirs" in beyond.basis
    other = bands(str(fitted[1]), 4, chip="h100-sxm")
    assert other.basis.startswith("constants fitted to another deployment (glm-4.7-flash on h200-sxm")
    assert other.low == pytest.approx(bands("vllm@0.16", 4, chip="h100-sxm").low, rel=0.01)


def test_a_band_of_own_rows_is_a_t_interval() -> None:
    rows = (0.1, -0.1, 0.2, -0.2, 0.0)
    spread = math.sqrt(sum(each**2 for each in rows) / 4)
    found = band_of_own(rows, 0.08, beyond=False)
    assert (found.low, found.high) == pytest.approx([sign * 2.13 * spread * math.sqrt(1.2) for sign in (-1, 1)])
    still = band_of_own((0.05,) * 5, 0.08, beyond=False)  # no less than two equal runs differ by
    assert still.high - still.low == pytest.approx(2 * 2.13 * NOISE * math.sqrt(1.2))


@pytest.mark.slow
def test_rows_that_teach_nothing_write_nothing(tmp_path: Path) -> None:
    """Measurements that are as predicted: a fit cannot be better, so there is no file, and the exit code is 1."""
    code, out, _ = glm5("fit", measured(tmp_path / "rows.csv", {}), "--out", tmp_path / "mine.toml")
    assert code == 1 and "nothing written" in out and not (tmp_path / "mine.toml").exists()


def test_refusals(tmp_path: Path) -> None:
    out, four = tmp_path / "mine.toml", tmp_path / "four.csv"
    with four.open("w", newline="") as file:
        rows = csv.DictWriter(file, [*COLUMNS, "tpot_mean_ms"])
        rows.writeheader()
        rows.writerows(row(*each, tpot_mean_ms="5") for each in LOADS[:4])
    assert "4 rows can be used: measure 5 or more" in refused("fit", four, "--out", out)
    two = tmp_path / "two.csv"
    text = four.read_text()
    two.write_text(text + "\n".join(text.splitlines()[1:]).replace("h200-sxm", "h100-sxm") + "\n")
    assert "rows of 2 deployments (glm-4.7-flash bf16 on h200-sxm" in refused("fit", two, "--out", out)
    broken = tmp_path / "broken.csv"
    broken.write_text(text.replace("h200-sxm", "abacus", 1))
    assert "3 rows can be used (row 1: no profile named abacus" in refused("fit", broken, "--out", out)
    steps = Path(__file__).parents[1] / "data" / "ascend_step_dev.csv"
    assert "needs rows of deployments" in refused("fit", steps, "--out", out)
    assert "call it mine.txt.toml" in refused("fit", four, "--out", tmp_path / "mine.txt")
    assert not out.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('extends = "vllm@9"', "release '9' is not described"),
        ('extends = "mine"', "extends = 'mine' must be one of glm5, sglang"),
        ('extends = "vllm"\nkind = "vllm"', "says kind: that is vllm's, which it extends"),
        ('extends = "vllm"\n[fitted]\nrows = 5', "fitted lacks model"),
        ('extends = "vllm"\n[a]\nkernel_time_factor = {value = 9.0, source = "", date = "", grade = "C"}',
         "from 0.25 to 4"),
    ],
)  # fmt: skip
def test_files_that_extend(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(body)
    with pytest.raises(EngineError, match=words.replace("(", r"\(")):
        load(str(path))


def test_an_extension_is_its_release_but_for_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "vllm@0.13"\n[a]\nrequest_seconds = {value = 0.5, source = "me", date = "", grade = "B"}'
    )
    engine, plain = load(str(path)), load("vllm@0.13")
    assert engine.request_seconds == 0.5 and not engine.overlap_scheduling
    assert dataclasses.replace(engine, request_seconds=plain.request_seconds, name="vllm") == plain
    with pytest.raises(UsageError):
        fit(tmp_path / "none.csv")
