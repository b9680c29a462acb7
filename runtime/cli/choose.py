"""`glm5 choose`: which chips to take for a load and its targets, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from foundation.errors import UsageError
from foundation.limits import within
from foundation.reading import Unreadable, read_toml
from foundation.writing import require_writable
from model.formats import SCHEMES_HELP
from model.split import MOST_DEVICES
from runtime.cli import completion
from runtime.cli.given import given
from runtime.cli.loads import (
    Acceptance,
    Bounded,
    Drafts,
    Isl,
    LengthCv,
    LengthFile,
    LengthRatio,
    Osl,
    Rate,
    SharedPrefix,
    ThinkS,
    TpotMs,
    TtftMs,
    Turns,
    acceptance_asked,
    habits_asked,
    lengths_asked,
)
from runtime.cli.plan import PERCENTILES


def choose(
    context: typer.Context,
    profiles: Annotated[
        str,
        typer.Option(
            autocompletion=completion.chips, help="Chips of `glm5 profiles list` or TOML files: a,b,c or all."
        ),
    ],
    model: Annotated[
        str, typer.Option(autocompletion=completion.models, help="A preset, a checkpoint directory or a config.json.")
    ] = "glm-5-fp8",
    isl: Isl = 8192,
    osl: Osl = 1024,
    length_ratio: LengthRatio = 0.8,
    length_cv: LengthCv = None,
    length_file: LengthFile = None,
    shared_prefix: SharedPrefix = None,
    turns: Turns = None,
    think_s: ThinkS = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in flight.")] = None,
    rate: Rate = None,
    ttft_ms: TtftMs = None,
    tpot_ms: TpotMs = None,
    percentile: Bounded = "90",
    max_devices: Annotated[int, typer.Option(min=1, help="Devices of a chip at most.")] = 128,
    engine: Annotated[
        str, typer.Option(help="Engines, a,b,c; auto: SGLang, or what is described beside the chip's vendor.")
    ] = "auto",
    formats: Annotated[
        str,
        typer.Option(
            autocompletion=completion.schemes, help=f"auto (none narrower than the checkpoint's), {SCHEMES_HELP}."
        ),
    ] = "auto",
    kv: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.caches, help="KV cache: bf16, fp8 or int8 [default: the engine's choice]."
        ),
    ] = None,
    mtp: Drafts = 0,
    acceptance: Acceptance = None,
    prices: Annotated[Path | None, typer.Option(help="TOML of what a device-hour costs; see docs/planning.md.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose chips for a load: of each the fewest whole nodes that meet the targets, as ranges.

    Where none of a chip meets them, its nearest plan is given. The exit code is 1 where no chip does.
    """
    if html:
        require_writable(html)
    within("--max-devices", max_devices, MOST_DEVICES)
    if rate is not None and concurrency is not None:
        raise UsageError("give one of --concurrency and --rate")
    for name, value in (("--rate", rate), ("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"{name} {value:g}: give a number above zero")
    currency, hourly = read_device_prices(prices) if prices else ("", {})

    import hw_profiles
    from hw_profiles.loader import names
    from model.hf_config import load_config
    from runtime.cli.simulated import progress_bar
    from runtime.deployment.demand import Demand
    from runtime.planning.choosing import choose as choose_chips
    from runtime.planning.choosing import engine_beside, row_of
    from runtime.planning.options import Question

    cfg = load_config(model)
    mtp, accepted = acceptance_asked(acceptance, mtp)
    if mtp and not cfg.mtp_layers:
        raise UsageError(f"{cfg.name} has no MTP layer to draft with: leave out --mtp")
    listed = [name.strip() for name in profiles.split(",") if name.strip()]
    if not listed:
        raise UsageError("--profiles names no chip: give some, as a,b,c, or all")
    engines = dict.fromkeys(name.strip() for name in engine.split(",") if name.strip())
    if not engines:
        raise UsageError("--engine names none: give some, as a,b,c, or auto")
    chips = [hw_profiles.load(name) for name in dict.fromkeys(names() if listed == ["all"] else listed)]
    if strange := hourly.keys() - {*names(), *(chip.name for chip in chips)}:
        raise UsageError(f"{prices}: {min(strange)} is no chip of --profiles nor of `glm5 profiles list`")
    demand = Demand(
        concurrency=concurrency, rate=rate, ttft_ms=ttft_ms, tpot_ms=tpot_ms, objective="min-devices",
        percentile=PERCENTILES[percentile], **lengths_asked(cfg, context.params, given(context)),
        **habits_asked(context.params),
    )  # fmt: skip
    asked = [
        (Question(cfg, demand, name, None if formats == "auto" else formats, kv, mtp, **accepted), chip)
        for chip in chips
        for name in ([engine_beside(chip)] if engine == "auto" else engines)
    ]
    with progress_bar(not as_json, "chips") as progress:
        found = choose_chips(asked, max_devices, progress or (lambda done, total: None))
    rows = [row_of(each, hourly.get(each.profile)) for each in found]
    rows.sort(key=_order)
    result = {
        "model": cfg.name,
        "load": f"{demand.load}, {demand.lengths}",
        "targets": demand.wants(),
        "currency": currency,
        "choices": rows,
    }
    if html:
        from runtime.reports.choose import write_page

        write_page(html, result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if not any(row["meets_targets"] for row in rows):
        raise typer.Exit(1)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Those that meet the targets first, by cost where it is known, then by devices."""
    cost = row.get("cost_per_million_output_tokens")
    known = "devices" in row
    return (
        not row["meets_targets"],
        not known,
        math.inf if cost is None else cost,
        row.get("devices", 0),
        row["profile"],
        row["engine"],
    )


def read_device_prices(path: Path) -> tuple[str, dict[str, float]]:
    """(currency, chip -> what one of its devices costs an hour) of a file. Raises `UsageError`."""
    try:
        held = read_toml(path)
    except Unreadable as error:
        raise UsageError(f"{path}: {error}") from None
    hourly = held.pop("per_device_hour", None)
    if not isinstance(hourly, dict) or not hourly:
        raise UsageError(f"{path}: no table [per_device_hour] of chips, as: h200-sxm = 2.5")
    currency = held.pop("currency", "")
    if not isinstance(currency, str) or held:
        wrong = next(iter(held), "currency")
        raise UsageError(f"{path}: {wrong}: a file of prices holds currency, a text, and [per_device_hour]")
    for chip, price in hourly.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < 1e9:
            raise UsageError(f"{path}: {chip} = {price!r}: a price is a number above zero")
    return currency, {chip: float(price) for chip, price in hourly.items()}


def show(result: Mapping[str, Any]) -> None:
    """A choice of chips for a terminal."""
    from rich.table import Table

    from runtime.cli.simulated import show_assumed
    from runtime.cli.terminal import Terminal

    console = Terminal(highlight=False)
    targets = f"; targets: {', '.join(result['targets'])}" if result["targets"] else ""
    console.print(f"[bold]{result['model']}[/], {result['load']}{targets}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("chip", no_wrap=True)
    more = [*_cost_heading(result), *_power_heading(result)]
    for heading in ("devices", "TTFT ms", "TPOT ms", "tok/s/device", *more):
        table.add_column(heading, justify="right")
    for heading in ("targets", "plan", "evidence"):
        table.add_column(heading)
    shown = [row for row in result["choices"] if "devices" in row]
    for row in shown:
        table.add_row(*choice_cells(row, bool(_cost_heading(result)), bool(_power_heading(result))))
    if shown:
        console.print("ranges: where nine in ten are expected; devices: up to where servers are at the slow end")
        if _power_heading(result):
            console.print("J/token: joules an output token at most, as all devices at their board power would take")
        console.print(table)
    for row in result["choices"]:
        if row["reason"]:
            what = "nearest plan misses" if "devices" in row else "out"
            console.print(f"{row['profile']}, {row['engine']}: {what}: {row['reason']}", markup=False)
    for basis in dict.fromkeys(row["band_basis"]["tpot"] for row in shown):
        chips = ", ".join(row["profile"] for row in shown if row["band_basis"]["tpot"] == basis)
        console.print(f"bands of {chips}: {basis}", markup=False)
    for assumed in dict.fromkeys(tuple(row["assumed"]) for row in shown):
        rows = [row for row in shown if tuple(row["assumed"]) == assumed]
        show_assumed(console, assumed, ", ".join(f"{row['profile']}, {row['engine']}" for row in rows))


def _cost_heading(result: Mapping[str, Any]) -> Sequence[str]:
    priced = any(row.get("cost_per_million_output_tokens") is not None for row in result["choices"])
    return [f"{result['currency'] or 'cost'}/M out"] if priced else []


def _power_heading(result: Mapping[str, Any]) -> Sequence[str]:
    powered = any(row.get("joules_per_output_token") is not None for row in result["choices"])
    return ["J/token"] if powered else []


def choice_cells(row: Mapping[str, Any], priced: bool, powered: bool) -> list[str]:
    """A choice as cells: point and range of each figure."""

    from runtime.reports.choose import ranged

    in_words = partial(ranged, row, none="-", to=" to ")
    more = f" to {row['devices_if_slow']}" if row["devices_if_slow"] > row["devices"] else ""
    verdict = (
        "misses" if not row["meets_targets"] else "meets" if row["meets_targets_if_slow"] else "meets, not if slow"
    )
    kept = f"{row['plan']}, {row['engine']}, {row['formats']['weights']}, KV {row['formats']['kv']}"
    return [
        row["profile"],
        f"{row['devices']}{more}",
        in_words("ttft_ms", 0),
        in_words("tpot_ms", 1),
        in_words("output_tokens_per_s_per_device", 0),
        *([in_words("cost_per_million_output_tokens", 2)] if priced else []),
        *([in_words("joules_per_output_token", 1)] if powered else []),
        verdict,
        kept,
        row["evidence"],
    ]
