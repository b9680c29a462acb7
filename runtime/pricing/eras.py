"""Which release of an engine a price was measured at, and which of them a deployment of another release takes.

A price file holds the newest table of each kernel under the kernel's own key, and under `key@release` the older ones
that differ from the next newer by more than a few per cent. `release` in an entry is the oldest one that its figures
hold for: a table that a later one repeats is not kept, but its release is where the later one begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from runtime.deployment.engines.releases import MOST_CHARACTERS

ENGINES = ("sglang", "trtllm", "vllm")
"""Engines with operator tables, in the order they stand in for one another."""
OLDER_ERROR = 0.35
"""Error of a price that no table of its engine is as old as, beside the kernel's own: two neighbouring releases of one
table differ by about so much at their 90th percentile (median over the pairs of aiconfigurator-core 0.12)."""
_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(?:\.?(dev|rc|post)(\d+))?(?![\w.])")
_PHASES = {"dev": -2, "rc": -1, "": 0, "post": 1}


class Chosen(NamedTuple):
    """An entry of a price file. later: where no table is as old as the release asked for, what was taken, in words."""

    body: Mapping[str, Any]
    later: str = ""


@cache
def order(release: str) -> tuple[Any, ...] | None:
    """What releases sort by ("0.5.6.post2", "1.3.0rc20"); None for a text that is no release, such as a nightly's."""
    found = _RELEASE.match(release.strip()[:MOST_CHARACTERS])
    if found is None:
        return None
    numbers = [int(part) for part in found[1].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers, _PHASES[found[2] or ""], int(found[3] or 0)


def engine_of(key: str) -> tuple[str, str]:
    """(what a key says up to its engine, the engine); the engine is "" for entries that are no engine's."""
    stem: list[str] = []
    for part in key.partition("@")[0].split("/"):
        stem.append(part)
        if (engine := part.partition("-")[0]) in ENGINES:
            return "/".join(stem), engine
    return "/".join(stem), ""


def _as_fast(engine: str, release: str, measured: str, which: str) -> str:
    return f"kernels of {engine} {release} as fast as in {measured}, the {which} release measured"


def entry_of(entries: Mapping[str, Any], key: str, engine: str, release: str) -> Chosen:
    """An entry of a price file for a release of an engine that runs its kernel; of a later one, as `choose` says it."""
    body = entries[key]
    asked, at = order(release), order(body["release"])
    later = asked is not None and at is not None and at > asked
    return Chosen(body, _as_fast(engine, release, body["release"], "first") if later else "")


def choose(entries: Mapping[str, Any], engine: str, release: str) -> dict[str, Chosen]:
    """The entries of a price file by their own keys, at one release of an engine.

    Of the engine's: the newest table that is not newer than the release, else the oldest. Of others, and where the
    release is none that can be ordered: the newest.
    """
    asked = order(release)
    eras: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}
    for key, body in entries.items():
        eras.setdefault(key.partition("@")[0], []).append((order(body.get("release", "")), body))
    found: dict[str, Chosen] = {}
    for key, tables in eras.items():
        if asked is None or engine_of(key)[1] != engine or any(at is None for at, _ in tables):
            found[key] = Chosen(entries[key])
            continue
        tables.sort(key=lambda table: table[0])
        fitting = [body for at, body in tables if at <= asked]
        oldest = tables[0][1]
        taken = _as_fast(engine, release, oldest["release"], "oldest")
        found[key] = Chosen(fitting[-1]) if fitting else Chosen(oldest, taken)

    # one table that a later release has split in two is whole at an earlier one
    def split_later(key: str, chosen: Chosen) -> bool:
        stem = engine_of(key)[0]
        if not chosen.later or stem == key or stem not in found:
            return False
        return order(found[stem].body["release"]) < order(chosen.body["release"])  # type: ignore[operator]

    return {key: chosen for key, chosen in found.items() if not split_later(key, chosen)}
