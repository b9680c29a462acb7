"""The measurements behind docs/rl.md: every cell is a run that `glm5 rl` takes, and a table says what its runs gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.rl_cells import SEEDS, TABLES, all_cells
from bench.rl_tables import tables
from runtime.training.rl import config

NAMES = tuple(each.__name__ for each in TABLES)


def test_every_cell_is_a_run_and_none_comes_twice(tmp_path: Path) -> None:
    cells = list(all_cells(NAMES))
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        if cell.seed == SEEDS[0] and cell.stages:
            (tmp_path / "rl.toml").write_text(cell.toml)
            read = config.read(tmp_path / "rl.toml")
            assert read.seed == cell.seed and len(read.stages) == len(cell.stages)


def result(seed: int, **more: Any) -> dict[str, Any]:
    held = [[0, {"thinking": 0.1}], [9, {"thinking": 0.1 * seed}]]
    return {
        "table": "lags", "labels": ["16", "tis", "0.0005"], "seed": seed, "held_out": held, "last_reward": 0.25,
        "cut": 0.5, "gap": 0.125, **more,
    }  # fmt: skip


def test_a_row_has_the_median_and_the_range_and_counts_failures() -> None:
    found = tables([result(seed) for seed in (1, 4, 2)] + [result(5, failed="the loss is nan")], ("lags",))
    row = found.splitlines()[-1]
    assert row.startswith("| 16, tis, 0.0005 | 4 | 1 | 20 (10 to 40) | 25 (25 to 25) | 50.0 ")
