"""Makes the tables of docs/validation.md: `python -m tools.docs_validation [BLOCK ..]`, by default all of them.

A block stands between `<!-- NAME -->` and `<!-- end NAME -->`; what is around it is written by hand. All take some five
minutes: causes are switched off one by one, and a constant is fitted anew without each group.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from runtime.pricing import bands
from runtime.pricing.bands import FEW, PredictionKind, band, coverage, known_groups
from runtime.serving import simulate
from runtime.simulation import published
from runtime.simulation.build import build
from runtime.simulation.mechanisms import MECHANISMS
from runtime.simulation.scores import ScoredRow, by_group, over_groups, summary
from runtime.simulation.validation import beside, read_rows, score

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "docs" / "validation.md"
DATA = ROOT / "tests" / "data"
DASH = "\N{EN DASH}"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """A table whose first columns are flush left."""
    heads = list(heads)
    marks = ["---"] * left + ["---:"] * (len(heads) - left)
    lines = [heads, *rows]
    return "\n".join(
        [f"| {' | '.join(lines[0])} |", f"|{'|'.join(marks)}|", *(f"| {' | '.join(cells)} |" for cells in lines[1:])]
    )


@cache
def scored(file: str, without: str = "") -> list[ScoredRow]:
    """The rows of a file of tests/data, without one cause."""
    return score(DATA / file, without=next((each for each in MECHANISMS if each.name == without), None))


def signed(error: float) -> str:
    return f"{error:+.0%}"


def figures(row: ScoredRow, quantity: str, digits: int = 1) -> list[str]:
    """Measured, predicted, error and band."""
    measured, predicted = row.measured[quantity], row.predicted[quantity]
    low, high = row.bands[quantity]
    mark = "" if row.inside(quantity) else " \N{DAGGER}"
    ends = f"{low:.{digits}f}{DASH}{high:.{digits}f}{mark}"
    return [f"{measured:.{digits}f}", f"{predicted:.{digits}f}", signed(predicted / measured - 1), ends]


def silicon() -> str:
    rows = scored("silicon_dev.csv")
    four = ("measured, ms", "predicted", "error", "band")
    heads = ["row: model, chip, engine, input/output tokens, in flight", *(f"TPOT {four[0]}", *four[1:])]
    heads += [f"TTFT {four[0]}", *four[1:]]
    cells = [
        [row.name + " **saturated**" * row.saturated, *figures(row, "tpot_ms"), *figures(row, "ttft_ms")]
        for row in rows
    ]
    groups = []
    for name, group in by_group(rows).items():
        own = [row for row in rows if row.group == name]
        errors = [row.error("tpot_ms") for row in own]
        groups.append(
            [name, str(group["rows"]), f"{statistics.fmean(errors):.1%}", f"{statistics.median(errors):.1%}",
             f"{group['ttft_mape']:.1%}",
             f"{group['saturated_ttft_mape']:.1%}" if "saturated_ttft_mape" in group else "-"]
        )  # fmt: skip
    inside = [row.inside(quantity) for row in rows for quantity in row.predicted]
    return "\n\n".join(
        (
            table(heads, cells),
            "\N{DAGGER} the measurement lies outside the band.",
            table(
                [
                    "group",
                    "rows",
                    "TPOT mean error",
                    "median",
                    "TTFT mean error, unsaturated rows",
                    "TTFT of saturated rows",
                ],
                groups,
            ),  # fmt: skip
            f"Bands hold {statistics.fmean(inside):.0%} of the {len(inside)} figures.",
        )
    )


def steps() -> str:
    rows = scored("ascend_step_dev.csv")
    cells = []
    for row in rows:
        ms = dataclasses.replace(
            row,
            **{
                name: {"step_s": 1e3 * getattr(row, name)["step_s"]}
                for name in ("measured", "predicted")
            },
            bands={"step_s": [1e3 * end for end in row.bands["step_s"]]},
        )  # fmt: skip
        cells.append([row.name, *figures(ms, "step_s", 0)])
    errors = [row.error("step_s") for row in rows]
    words = f"Mean error {statistics.fmean(errors):.1%}, median {statistics.median(errors):.1%}."
    return table(["row", "measured, ms", "predicted", "error", "band"], cells) + f"\n\n{words}"


def ends(figure: str, kind: PredictionKind) -> str:
    found = band(figure, kind, bands.USUAL_PRICE_ERROR)
    return f"{math.exp(found.low):.2f}{DASH}{math.exp(found.high):.2f}"


def coverages() -> str:
    """How many rows of each group the bands of the others hold, and the bands by kind."""
    cells = []
    for figure in ("tpot", "ttft", "throughput", "step"):
        share, width, count = coverage(figure)
        cells.append([figure, str(count), f"{share:.0%}", f"{width:.0%}"])
    whole = table(["figure", "groups", "rows inside, their group left out", "median half-width"], cells)
    timed = [group for group in known_groups() if "tpot" in group.figures]
    kinds = sorted({group.kind for group in timed}, key=lambda kind: tuple(vars(kind).values()))
    rows = []
    for kind in kinds:
        count = len({group.name for group in timed if group.kind == kind})
        own = str(count) if count >= FEW else f"{count}, too few: a wider kind's, a quarter wider"
        name = f"{kind.engine}, {kind.priced} prices, {kind.regime}"
        rows.append([name, own, *(ends(figure, kind) for figure in ("tpot", "ttft", "throughput"))])
    heads = ["kind of prediction", "groups", "TPOT, times the prediction", "TTFT", "output tokens/s"]
    return f"{whole}\n\n{table(heads, rows)}"


def number(group: Mapping[str, Any], quantity: str) -> str:
    return f"{group[f'{quantity}_residual']:+.2f}" if f"{quantity}_residual" in group else ""


def check() -> str:
    return groups("public_check.csv")


def groups(file: str = "public_dev.csv") -> str:
    rows = scored(file)
    found = by_group(rows)
    cells = [
        [name, str(group["rows"]), *(number(group, quantity) for quantity in ("tpot", "ttft", "output_tok_s")),
         group["apart"]]
        for name, group in found.items()
    ]  # fmt: skip
    whole, all_rows = over_groups(found), summary(rows)

    def off(name: str) -> str:
        return f"{whole[f'{name}_median_error']:.1%} and {whole[f'{name}_mean_error']:.1%}"

    words = (
        f"|median ln(measured / predicted)| over the {whole['tpot_groups']} groups that are scored together, in the "
        f"median group and in the mean: TPOT {off('tpot')}, output tokens/s {off('output_tok_s')}, TTFT {off('ttft')}. "
        f"With its sign TPOT is {whole['tpot_signed_median']:+.1%} in the median group. Of all {all_rows['rows']} "
        f"rows, those apart included, the bands hold {all_rows['tpot_inside_band']:.0%} of TPOT and "
        f"{all_rows['ttft_inside_band']:.0%} of TTFT."
    )
    heads = ["group", "rows", "TPOT", "TTFT", "output tokens/s", "scored apart"]
    return f"{table(heads, cells)}\n\n{words}"


def label(group: str) -> str:
    """Model, chip, engine and release of a group."""
    return group.partition(",")[0]


def moves(groups: Mapping[str, Any], whole: Mapping[str, Any], group: str) -> bool:
    """Whether a group's TPOT is another without the cause."""
    return abs(groups[group]["tpot_residual"] - whole[group]["tpot_residual"]) >= 0.005


def ablation() -> str:
    names = ["", *(each.name for each in MECHANISMS)]
    by_cause = {name or "nothing": by_group(scored("public_dev.csv", name)) for name in names}
    whole = by_cause["nothing"]
    together = [name for name, group in whole.items() if not group["apart"]]
    keys = ("tpot_median_error", "tpot_mean_error", "tpot_signed_median", "output_tok_s_median_error",
            "output_tok_s_mean_error", "ttft_median_error")  # fmt: skip
    lines = []
    for name, found in by_cause.items():
        got = over_groups(found)
        lines.append([name, *(f"{got[key]:+.1%}" if "signed" in key else f"{got[key]:.1%}" for key in keys)])
    moved = [name for name in by_cause if any(moves(by_cause[name], whole, group) for group in together)]
    cells = [
        [label(group), f"{whole[group]['tpot_residual']:+.2f}"]
        + [number(by_cause[name][group], "tpot") if moves(by_cause[name], whole, group) else "" for name in moved]
        for group in together
    ]
    heads = ["without", "TPOT: median error", "mean", "signed median", "output tokens/s: median error", "mean",
             "TTFT: median"]  # fmt: skip
    return "\n\n".join(
        (
            table(heads, lines),
            "Of each group, where it moves anything (blank: less than 0.005):",
            table(["ln(measured / predicted) of TPOT without", "nothing", *moved], cells),
        )
    )


def causes() -> str:
    return table(["name", "the cause, and what holds without it"], [[f"`{m.name}`", m.words] for m in MECHANISMS], 2)


REQUEST_SECONDS = [each / 1000 for each in range(0, 21, 2)]
"""Tried for a request's time at the front end of vLLM 0.11."""


def front_end() -> str:
    """That constant fitted without each group that it was fitted to, and the group scored."""
    rows = map(published.read, read_rows(DATA / "public_dev.csv")[1])
    asked = [row for row in rows if row.engine == "vllm@0.11" and not row.apart]
    names = list(dict.fromkeys(each.group for each in asked))

    @cache
    def residuals(place: int, seconds: float | None) -> dict[str, float]:
        given = {} if seconds is None else {"request_seconds": seconds}
        row = dataclasses.replace(asked[place], settings={**asked[place].settings, **given})
        measured, predicted = beside(row, simulate(row.load, build(row.spec()).deployment))
        return {quantity: math.log(measured[quantity] / predicted[quantity]) for quantity in measured}

    def of(name: str, seconds: float | None, quantity: str) -> list[float]:
        return [residuals(place, seconds)[quantity] for place, row in enumerate(asked) if row.group == name]

    def loss(seconds: float, without: str) -> float:
        rest = (name for name in names if name != without)
        return sum(
            statistics.fmean(
                each**2 for quantity in ("ttft_ms", "output_tok_s") for each in of(name, seconds, quantity)
            )
            for name in rest
        )

    cells = []
    for name in names:
        fitted = min(REQUEST_SECONDS, key=lambda seconds, name=name: loss(seconds, name))
        shown = [
            f"{statistics.median(of(name, seconds, quantity)):+.2f}"
            for quantity in ("tpot_ms", "ttft_ms", "output_tok_s")
            for seconds in (None, fitted, 0.0)
        ]
        cells.append([label(name), f"{1e3 * fitted:.0f} ms", *shown])
    three = ("as described", "fitted without it", "at 0")
    columns = (f"{name} {each}" for name in ("TPOT", "TTFT", "tokens/s") for each in three)
    return table(["group", "fitted to the others", *columns], cells)


def peers() -> str:
    """Our columns of the comparison, anew; the peer's are as they were measured."""
    rows = {row.name: row for row in scored("silicon_dev.csv")}
    lines = held("peers").split("\n")
    for place, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = rows.get(cells[0].replace(" (saturated)", ""))
        if row is not None:
            for column, quantity in ((2, "tpot_ms"), (6, "ttft_ms")):
                cells[column] = signed(row.predicted[quantity] / row.measured[quantity] - 1)
        elif own := [each for each in rows.values() if each.group.startswith(f"{cells[0]} ")]:
            for column, quantity in ((1, "tpot_ms"), (4, "ttft_ms")):
                cells[column] = f"{statistics.fmean(each.error(quantity) for each in own):.1%}"
        else:
            continue
        lines[place] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "silicon": silicon,
    "steps": steps,
    "bands": coverages,
    "groups": groups,
    "check": check,
    "front-end": front_end,
    "ablation": ablation,
    "causes": causes,
    "peers": peers,
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end {name} -->)", re.DOTALL)


def held(name: str) -> str:
    """A block as the page has it."""
    found = _pattern(name).search(DEFAULT.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{DEFAULT}: no block {name}: write <!-- {name} --> and <!-- end {name} -->")
    return found[1].rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help=", ".join(BLOCKS))
    for name in parser.parse_args().blocks or BLOCKS:
        if name not in BLOCKS:
            parser.error(f"no block {name}: {', '.join(BLOCKS)}")
        held(name)
        made = BLOCKS[name]()
        text = DEFAULT.read_text(encoding="utf-8")
        DEFAULT.write_text(_pattern(name).sub(lambda _, made=made: f"{made}\n", text), encoding="utf-8")
        print(f"{name}: made")


if __name__ == "__main__":
    main()
