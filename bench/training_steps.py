"""Training steps that people published, beside what `runtime.pricing.training` makes of the same layouts.

    python -m bench.training_steps [FILE]      [default: the table between the markers of docs/training_steps.md]

`training_steps.csv` has what was published; tokens_per_s is of one device. Nothing of it went into a price. How far
each step was off goes into runtime/pricing/training/residuals.json, which bands are made of.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hw_profiles
from model.hf_config import load_config
from runtime.deployment.ledger import DeviceMemory
from runtime.pricing import Chip, open_book
from runtime.pricing.training import Sequences, TrainLayout, band, training_memory, training_step
from runtime.pricing.training.flops import training_flops

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "training_steps.md"
RESIDUALS = Path(band.__file__).with_name("residuals.json")
BEGIN, END = "<!-- begin: made by `python -m bench.training_steps` -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """line: of the table. ratio: tokens a second, predicted over published."""

    line: str
    ratio: float
    group: str
    sparse: bool
    price_error: float


def row(said: Mapping[str, str]) -> Row:
    """One published step, and what it was predicted to be."""
    profile, cfg = hw_profiles.load(said["chip"]), load_config(said["model"])
    devices, tp, pp = (int(said[name]) for name in ("devices", "tp", "pp"))
    length, count = int(said["length"]), int(said["sequences"])
    layout = TrainLayout(
        tp, pp, devices // tp // pp, int(said["ep"]),
        micro_batch_tokens=length * (2 if "two sequences" in said["source"] else 1),
        recompute=said["recompute"],  # type: ignore[arg-type]
        interleave=int(said["interleave"]),
        overlap_exchange=said["overlap_exchange"] == "1",
    )  # fmt: skip
    book = open_book(Chip.from_fields(profile.name, profile.number, {}), family=profile.family)
    batch = Sequences.equal(count, length)
    step = training_step(cfg, book, layout, batch, said["formats"])
    held = training_memory(cfg, layout, DeviceMemory.of(profile, devices), said["formats"])
    found, published = step.tokens_per_s / devices, float(said["tokens_per_s"])
    rate = training_flops(cfg, batch) / step.seconds / devices / 1e12
    shares = {name: part.seconds / step.seconds for name, part in step.parts.items()}
    talking = sum(shares.get(name, 0.0) for name in ("tensor", "exchange", "stages"))
    cells = [
        f"{devices} {profile.name}", cfg.name, said["formats"], layout.name, f"{published:,.0f}", f"{found:,.0f}",
        f"{found / published:.2f}", f"{rate:,.0f}", f"{talking:.0%}", f"{shares['bubble']:.0%}",
        f"{held.total_bytes / 1e9:.0f} of {held.usable_bytes / 1e9:.0f}", said["source"],
    ]  # fmt: skip
    group = f"{said['source'].split('(')[0].strip()}, {cfg.name}, {profile.name}"
    return Row(f"| {' | '.join(cells)} |", found / published, group, cfg.sparse, step.price.relative_error)


def residuals(rows: Sequence[Row]) -> str:
    """What `residuals.json` holds: rows of one source, model and chip together."""
    groups: dict[str, dict[str, Any]] = {}
    for each in rows:
        new = {"group": each.group, "sparse": each.sparse, "seconds": [], "price_error": round(each.price_error, 3)}
        groups.setdefault(each.group, new)["seconds"].append(round(math.log(each.ratio), 4))
    lines = ",\n  ".join(map(json.dumps, groups.values()))
    return f'{{"made_by": "python -m bench.training_steps",\n "groups": [\n  {lines}\n]}}\n'


def table(rows: Sequence[Row]) -> str:
    head = (
        "devices", "model", "formats", "layout", "tokens/s a device, published", "predicted", "ratio", "TFLOP/s",
        "talking", "bubble", "memory, GB", "source",
    )  # fmt: skip
    sort = ["---", "---", "---", "---", *["---:"] * 6, "---:", "---"]
    off = sorted(abs(math.log(each.ratio)) for each in rows)
    median = math.exp(off[len(off) // 2]) - 1
    lines = [f"| {' | '.join(cells)} |" for cells in (head, sort)] + [each.line for each in rows]
    inside, groups = band.training_coverage()
    ends = (
        f"{low:.2f} to {high:.2f}" for low, high in (band.training_band(kind, 0.0).around(1) for kind in (False, True))
    )
    said = (
        f"Median factor off: {1 + median:.2f}. Bands of a step's seconds, as factors: without an indexer {next(ends)}, "
        f"with one {next(ends)}; {inside} of {groups} groups lie inside the band that the others give."
    )
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=DOCS)
    path = parser.parse_args().file
    with (HERE / "training_steps.csv").open(encoding="utf-8") as file:
        rows = [row(said) for said in csv.DictReader(file)]
    RESIDUALS.write_text(residuals(rows), encoding="utf-8")
    band.published_steps.cache_clear()
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
