"""Scores measurements without each cause in turn: the table of docs/validation.md.

    python -m bench.ablation [CSV]     [default: tests/data/public_dev.csv]

Half a minute for each cause.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.simulation.mechanisms import MECHANISMS
from runtime.simulation.scores import by_group, over_groups
from runtime.simulation.validation import score

FILE = Path(__file__).resolve().parent.parent / "tests" / "data" / "public_dev.csv"


def label(group: str) -> str:
    """Model, chip, engine and release of a group."""
    return group.partition(",")[0]


def main() -> None:
    file = Path(sys.argv[1]) if sys.argv[1:] else FILE
    scored: dict[str, Mapping[str, Any]] = {}
    for each in (None, *MECHANISMS):
        scored[each.name if each else "nothing"] = by_group(score(file, without=each))
    whole = scored["nothing"]
    together = [name for name, group in whole.items() if not group["apart"]]
    print(
        "| without | TPOT: median error | mean | signed median | output tokens/s: median error | mean | TTFT: median |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, groups in scored.items():
        got = over_groups(groups)
        keys = ("tpot_median_error", "tpot_mean_error", "tpot_signed_median", "output_tok_s_median_error",
                "output_tok_s_mean_error", "ttft_median_error")  # fmt: skip
        cells = (f"{got[key]:+.1%}" if "signed" in key else f"{got[key]:.1%}" for key in keys)
        print(f"| {name} | {' | '.join(cells)} |")
    moved = [name for name in scored if any(moves(scored[name], whole, group) for group in together)]
    print("\n| ln(measured / predicted) of TPOT without | nothing |", " | ".join(moved), "|")
    print("|---|" + "---:|" * (1 + len(moved)))
    for group in together:
        cells = [f"{whole[group]['tpot_residual']:+.2f}"]
        for groups in (scored[name] for name in moved):
            cells.append(f"{groups[group]['tpot_residual']:+.2f}" if moves(groups, whole, group) else "")
        print(f"| {label(group)} | {' | '.join(cells)} |")


def moves(groups: Mapping[str, Any], whole: Mapping[str, Any], group: str) -> bool:
    """Whether a group's TPOT is another without the cause."""
    return abs(groups[group]["tpot_residual"] - whole[group]["tpot_residual"]) >= 0.005


if __name__ == "__main__":
    main()
