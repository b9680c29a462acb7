"""Options of a load and its targets that `simulate`, `plan` and `choose` share, as fields of a `Demand`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foundation.errors import UsageError

if TYPE_CHECKING:
    from model.config import ModelConfig

Isl = Annotated[int, typer.Option(min=1, help="Input tokens a request.")]
Osl = Annotated[int, typer.Option(min=1, help="Output tokens a request.")]
LengthRatio = Annotated[float, typer.Option(min=0.01, max=1.0, help="Lengths are uniform in [ratio x L, L].")]
LengthCv = Annotated[
    float | None,
    typer.Option(help="Lengths are lognormal with means --isl and --osl and this coefficient of variation."),
]
LengthFile = Annotated[
    Path | None,
    typer.Option(help="Lengths are of this CSV: input_tokens,output_tokens[,weight]; see docs/input_files.md."),
]
SharedPrefix = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE[:GROUPS]", help="Share of each prompt's tokens that the requests of its group begin with."
    ),
]
Turns = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10_000,
        help="Requests are turns of conversations, so many each: a prompt is all before it and --isl new tokens.",
    ),
]
ThinkS = Annotated[float | None, typer.Option(help="Seconds from an answer to the next turn [default: 0].")]
Rate = Annotated[float | None, typer.Option(help="Requests a second, instead.")]
TtftMs = Annotated[float | None, typer.Option(help="Target: time to the first token.")]
TpotMs = Annotated[float | None, typer.Option(help="Target: time per output token.")]
Bounded = Annotated[
    Literal["mean", "50", "90", "99"],
    typer.Option(help="What the targets bound: the mean over requests, or this percentile of them."),
]
Drafts = Annotated[int, typer.Option(min=0, help="Drafts a step of multi-token prediction.")]
Acceptance = Annotated[
    str | None,
    typer.Option(
        metavar="P1,P2,...",
        help="Chance of each draft of --mtp to be accepted, given that those before it were, as 0.85 or 0.85+-0.05.",
    ),
]

LENGTHS = ("isl", "osl", "length_ratio", "length_cv", "length_file")
"""Options that say how long requests are."""
HABITS = ("shared_prefix", "turns", "think_s")
"""Options that say what requests have to do with one another."""


def lengths_asked(cfg: ModelConfig, params: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a `Demand` from the options `LENGTHS`. said: those on the command line.

    Lognormal lengths are cut where the model's positions end, if that is sooner. Raises `UsageError` for two answers to
    one question, and `WorkloadError`.
    """
    from runtime.deployment.demand import LENGTH_MOST
    from runtime.serving import Lognormal, read_histogram

    if params["length_file"] is not None:
        _refuse("--length-file, which has the lengths", said, ("isl", "osl", "length_ratio", "length_cv"))
        rows = read_histogram(params["length_file"]).rows
        longest = {f"{name}sl": max(row[i] for row in rows) for i, name in enumerate("io")}
        return {**longest, "histogram": rows}
    isl, osl, cv = params["isl"], params["osl"], params["length_cv"]
    found = {"isl": isl, "osl": osl, "length_ratio": params["length_ratio"]}
    if cv is None:
        return found
    _refuse("--length-cv: lengths are uniform or lognormal", said, ("length_ratio",))
    most = max(1.0, min(LENGTH_MOST, cfg.max_positions / (isl + osl)))
    Lognormal(isl, cv, int(isl * most))
    return {**found, "length_cv": cv, "length_most": most}


def habits_asked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Demand` from those of the options `HABITS` that were given. Raises `UsageError`, `WorkloadError`."""
    from runtime.serving.workload import MOST_THINK_S

    found: dict[str, Any] = {}
    if params["shared_prefix"] is not None:
        found["shared_prefix"], found["prefix_groups"] = shared_prefix(params["shared_prefix"])
    turns, think_s = params["turns"], params["think_s"]
    if turns is not None:
        found["turns"] = turns
    if think_s is not None:
        if not 0 <= think_s <= MOST_THINK_S:
            raise UsageError(f"--think-s {think_s:g}: give a number of seconds from 0 to {MOST_THINK_S:g}")
        if turns in (None, 1):
            raise UsageError("--think-s is between the turns of a conversation: add --turns of two or more")
        found["think_s"] = think_s
    return found


def shared_prefix(text: str) -> tuple[float, int]:
    """(share, groups) of SHARE[:GROUPS]. Raises `UsageError` or `WorkloadError`."""
    from runtime.serving import Sharing

    share, colon, groups = text.partition(":")
    counted = groups.isascii() and groups.isdigit() and len(groups) < 20
    try:
        number = float(share)
    except ValueError:
        number = None
    if number is None or (colon and not counted):
        raise UsageError(f"--shared-prefix {text}: give a share from 0 to 1, and perhaps groups, as 0.8 or 0.8:16")
    made = Sharing(number, int(groups) if colon else 1)
    return made.share, made.groups


def acceptance_asked(text: str | None, drafts: int) -> tuple[int, dict[str, Any]]:
    """(drafts a step, fields of a `Spec` about them) of P1,P2,..., each with or without a +-. drafts:
    0 for as many as are said. Raises `UsageError` or `WorkloadError`."""
    from runtime.serving import Speculation
    from runtime.simulation.build import accepted_within

    if text is None:
        return drafts, {}
    said = [part.replace("±", "+-").partition("+-") for part in text.split(",")]
    try:
        chances = tuple(float(part[0]) for part in said)
        spreads = [float(part[2]) if part[1] else None for part in said]
    except ValueError:
        spreads, chances = [math.nan], ()
    if not all(spread is None or 0 <= spread <= 1 for spread in spreads):
        raise UsageError(
            f"--acceptance {text}: give a chance from 0 to 1 for each draft, as 0.85,0.7,0.5 or 0.85+-0.05"
        ) from None
    Speculation(chances)
    found: dict[str, Any] = {"acceptance": chances}
    if any(spread is not None for spread in spreads):
        pairs = zip(chances, spreads, strict=True)
        found["acceptance_ranges"] = tuple(accepted_within(chance, spread) for chance, spread in pairs)
    if drafts not in (0, len(chances)):
        raise UsageError(f"--acceptance has {len(chances)} chances for the {drafts} drafts of --mtp: give one for each")
    return len(chances), found


def _refuse(beside: str, said: Mapping[str, str], names: tuple[str, ...]) -> None:
    for name in names:
        if name in said:
            raise UsageError(f"{said[name]} does not go with {beside}: leave out one of them")
