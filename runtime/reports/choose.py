"""The page of a choice of chips: `glm5 choose --html FILE`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from foundation.writing import replacing
from runtime.reports.page import EVIDENCE, assumed_list, document, section


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all. result: the JSON object of `glm5 choose`. Raises `UsageError` where the
    file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(choices_page(result), encoding="utf-8")


def choices_page(result: Mapping[str, Any]) -> str:
    """The page's HTML."""
    targets = ", ".join(result["targets"]) or "no targets"
    rows = [row for row in result["choices"] if "devices" in row]
    out = [row for row in result["choices"] if "devices" not in row]
    sections = [
        section("Chips", _table(rows, result["currency"] or "cost")) if rows else "",
        section("What does not serve it", _reasons(out)),
        section("How sure this is", "".join(map(_basis, rows))),
        section("Other numbers of devices", "".join(map(_tried, rows))),
    ]
    return document("Choice of chips", result["model"], f"{result['load']} · {targets}", sections)


def _table(rows: list[Mapping[str, Any]], currency: str) -> str:
    priced = any(row["cost_per_million_output_tokens"] is not None for row in rows)
    stat = rows[0]["statistic"]
    heads = ["chip", "devices", "targets", f"TTFT {stat}, ms", f"TPOT {stat}, ms", "output tok/s a device"]
    powered = any(row["joules_per_output_token"] is not None for row in rows)
    heads += [f"{currency} a million output tokens"] * priced
    heads += ["board power, kW", "J an output token at most"] * powered + ["plan"]
    body = "".join(f"<tr>{''.join(_cells(row, priced, powered))}</tr>" for row in rows)
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    words = "Below a figure: where nine in ten are expected. Devices: up to where servers are at the slow end."
    if powered:
        words += " Power: the most that the devices draw by their data sheets, hosts and switches left out."
    note = f'<p class="quiet">{words}</p>'
    return f'<table class="figures choices"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}'


def ranged(row: Mapping[str, Any], name: str, digits: int, none: str = "–", to: str = "–") -> str:
    """A figure of a choice with its range; `none` where it has none."""
    if row.get(name) is None:
        return none
    low, high = row[f"{name}_range"]
    return f"{row[name]:,.{digits}f} ({low:,.{digits}f}{to}{high:,.{digits}f})"


def _power(row: Mapping[str, Any]) -> str:
    if row["power_w"] is None:
        return _figure("–")
    return _figure(f"{row['power_w'] / 1e3:,.1f}", row["power_evidence"])


def _figure(text: str, below: str = "") -> str:
    return f"<td>{escape(text)}{f'<span class=quiet>{escape(below)}</span>' if below else ''}</td>"


def _ranged(row: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure, and below it its range."""
    point, _, inside = ranged(row, name, digits).partition(" ")
    return _figure(point, inside.strip("()"))


def _words(text: str) -> str:
    return f'<td class="words">{escape(text)}</td>'


def _cells(row: Mapping[str, Any], priced: bool, powered: bool) -> list[str]:
    more = f"up to {row['devices_if_slow']}" if row["devices_if_slow"] > row["devices"] else ""
    met = "met" if row["meets_targets"] else f"missed: {row['reason']}"
    met += "; also at the slow end" if row["meets_targets_if_slow"] else ""
    formats = f"{row['formats']['weights']}, KV {row['formats']['kv']}"
    return [
        f"<th>{escape(row['profile'])}</th>",
        _figure(f"{row['devices']:,}", more),
        _words(met),
        _ranged(row, "ttft_ms", 0),
        _ranged(row, "tpot_ms", 1),
        _ranged(row, "output_tokens_per_s_per_device", 0),
        *([_ranged(row, "cost_per_million_output_tokens", 2)] if priced else []),
        *([_power(row), _ranged(row, "joules_per_output_token", 1)] if powered else []),
        _words(f"{row['plan']}, {row['engine']}, {formats}"),
    ]


def _reasons(rows: list[Mapping[str, Any]]) -> str:
    lines = (f"<li>{escape(row['profile'])}, {escape(row['engine'])}: {escape(row['reason'])}</li>" for row in rows)
    return f"<ul>{''.join(lines)}</ul>" if rows else ""


def _basis(row: Mapping[str, Any]) -> str:
    bands = "".join(f"<li>{escape(name)}: {escape(words)}</li>" for name, words in row["band_basis"].items())
    known = f"{row['evidence']}. {EVIDENCE[row['evidence']]}"
    return f"<h3>{escape(row['profile'])}</h3><p>{escape(known)}</p><ul>{bands}</ul>{assumed_list(row['assumed'])}"


def _tried(row: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{each['devices']} devices: {escape(each['missed'])}</li>" for each in row["tried"])
    return f"<h3>{escape(row['profile'])}</h3><ul>{lines}</ul>" if lines else ""
