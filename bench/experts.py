"""Expert placement against EPLB on the power-law suite: `python -m bench.experts [seed ...]`.

EPLB figures are of the plain re-implementation in `tests/planner/eplb_reference.py`, which gives EPLB's
placements. Its seconds are those of plain Python lists; "published" are those of EPLB itself (PyTorch, seed 7,
a two-core machine). Ours are the best of three runs and include the lower bound.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table

from runtime.planning.experts import place_experts, split_unevenly
from tests.planner.eplb_reference import eplb, max_over_mean, power_law_suite

# alpha, devices, nodes, slots, seconds of EPLB itself
SUITE = [
    (0.5, 8, 1, 256, 0.49),
    (0.5, 32, 4, 288, 2.19),
    (0.5, 64, 8, 320, 3.37),
    (0.5, 144, 18, 288, 3.34),
    (0.5, 320, 40, 320, 0.01),
    (1.01, 8, 1, 256, 0.43),
    (1.01, 32, 4, 288, 1.46),
    (1.01, 64, 8, 320, 2.62),
    (1.01, 144, 18, 288, 3.91),
    (1.01, 320, 40, 320, 0.01),
    (1.2, 8, 1, 256, 0.55),
    (1.2, 32, 4, 288, 1.62),
    (1.2, 64, 8, 320, 3.55),
    (1.2, 144, 18, 288, 5.01),
    (1.2, 320, 40, 320, 0.01),
]
COLUMNS = ("alpha", "devices", "nodes", "slots", "EPLB mean", "worst", "s", "published s")
OURS = ("ours mean", "worst", "s", "bound mean", "worst", "gap", "EPLB gap", "uneven", "layers worse")


def main(seeds: list[int]) -> None:
    """Print one table a seed."""
    console = Console(width=180)
    for seed in seeds:
        table = Table(*COLUMNS, *OURS, title=f"max / mean device load over 75 layers of 256 experts, seed {seed}")
        for case in SUITE:
            table.add_row(*_row(seed, *case))
        console.print(table)


def _row(seed: int, alpha: float, devices: int, nodes: int, slots: int, published: float) -> list[str]:
    load = power_law_suite(alpha, seed)
    start = time.perf_counter()
    reference = eplb(load, slots, 1, nodes, devices)
    reference_seconds = time.perf_counter() - start
    theirs = max_over_mean(reference, load, devices)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        placement = place_experts(load, devices, nodes, slots)
        seconds.append(time.perf_counter() - start)
    ours, bound = placement.max_over_mean, placement.bound
    uneven = split_unevenly(placement, load).max_over_mean
    return [
        *map(str, (alpha, devices, nodes, slots)),
        *(f"{theirs.mean():.4f}", f"{theirs.max():.4f}", f"{reference_seconds:.2f}", f"{published:.2f}"),
        *(f"{ours.mean():.4f}", f"{ours.max():.4f}", f"{min(seconds):.3f}"),
        *(f"{bound.mean():.4f}", f"{bound.max():.4f}"),
        *(f"{placement.gap.mean():.2%}", f"{(theirs / bound - 1).mean():.2%}", f"{uneven.mean():.4f}"),
        str(int((ours > theirs * (1 + 1e-9)).sum())),
    ]


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [7])
