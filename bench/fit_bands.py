"""Makes runtime/pricing/residuals.json: how far predictions were off at every deployment whose measurements are kept.

    python -m bench.fit_bands [CSV ..]     [default: the files of tests/data]

To be run after anything that changes predictions. Rows that are scored apart (drafts of unknown acceptance) teach
nothing and are left out. Prints the coverage of bands that leave one group out.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from runtime.pricing import bands
from runtime.simulation.validation import FIGURES, score

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
FILES = [DATA / name for name in ("public_dev.csv", "ascend_step_dev.csv")]
"""Not silicon_dev.csv: some of its rows were in view when constants of engines were set."""
OUT = Path(bands.__file__).with_name("residuals.json")


def residuals(files: list[Path]) -> list[dict[str, Any]]:
    """The groups, each once for every kind of prediction that its rows were."""
    found: dict[Any, dict[str, Any]] = {}
    for row in (row for file in files for row in score(file)):
        if row.skipped or row.apart or row.kind is None:
            continue
        name = row.group or row.name
        held = found.setdefault((name, row.kind), {"group": name, **vars(row.kind), "figures": {}})
        for quantity, predicted in row.predicted.items():
            each = round(math.log(row.measured[quantity] / predicted), 4)
            held["figures"].setdefault(FIGURES[quantity], []).append(each)
    return list(found.values())


def main() -> None:
    groups = residuals([Path(name) for name in sys.argv[1:]] or FILES)
    lines = ",\n  ".join(json.dumps(group) for group in groups)
    OUT.write_text(f'{{"made_by": "python -m bench.fit_bands",\n "groups": [\n  {lines}\n]}}\n', encoding="utf-8")
    bands.known_groups.cache_clear()
    for figure in FIGURES.values():
        share, width, count = bands.coverage(figure)
        print(f"{figure}: {share:.0%} of the rows of {count} groups inside, median half-width {width:.0%}")


if __name__ == "__main__":
    main()
