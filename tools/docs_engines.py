"""Writes docs/engines.md from the engines' descriptions and their reader: what such a file holds, setting by setting.

    python -m tools.docs_engines [FILE]      [default: docs/engines.md]

What a setting means is what the docstring of `runtime.deployment.engines.engine.Engine` says of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

from foundation.reading import read_toml
from model.formats import KV
from runtime.deployment import engines
from runtime.deployment.engines.engine import SETTINGS, CacheRules, Circumstances, Engine, Tables
from runtime.deployment.engines.loader import KINDS
from tools import page
from tools.docs_formats import table

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "engines.md"
ENGINES = Path(engines.__file__).parent
KEYS = {
    "`kind`": "which engine it describes: {kinds}. Defaults that are formulas and launch lines go by it, never by the "
    "file's name; `other` where those of none hold",
    "`release`, `released`": "the version whose settings the sections are, the newest of those described, and its day",
    "`prices`": "whose operator tables price it: {tables}",
    "`hosts`": 'vendors of the chips beside which its host times were taken, as `["NVIDIA"]`; beside others the answer '
    'lists them under "assumed for you"',
    "`name`, `description`": "words for people",
}

PAGE = """# Engines

<!-- made by `python -m tools.docs_engines`; do not edit -->

`--engine FILE.toml` takes the description of a serving engine. The shipped ones are
`runtime/deployment/engines/*.toml`; a copy of one, under any name, behaves like it, so a description begins as a copy.

Above the sections stand:

{keys}

Then settings, in sections that only group them for the reader. A setting is a table of `value`, `source`, `date`,
`grade` (A: read in the engine's own source or documentation; B: measured by others; C: assumed) and, where it helps,
`note`:

    [scheduling]
    max_running_requests = {{value = 1024, by_memory_gib = [[70, 256], [1e9, 1024]], source = "..", grade = "A", ..}}

Below, `[releases."0.13"]` says what was otherwise in a release, setting by setting without a section (and in
`[releases."0.13".cache]`), with its `released` and `description`. It holds for all that are older too, until one of
those says otherwise; an empty table is a release like the next newer one. `--engine vllm@0.13` takes that release,
`--engine vllm` the newest. Any other is refused; `glm5 validate` takes for a version that is not described the newest
one that is not newer, by number or by day (`runtime/deployment/engines/loader.py: nearest_release`).

{releases}

A value may depend on the device's memory, `by_memory_gib = [[limit, value], ..]`: that of the first limit above it.
Or on chip and model, `cases = [{{when = {{..}}, value = ..}}, ..]`: that of the first case whose conditions all hold,
before the memory; else `value`. Conditions are on {conditions}
(`runtime/deployment/engines/engine.py: Circumstances`); a list holds where it names the fact.
`--set engine.SETTING=VALUE` overrides one for a run.

### Settings
Those without a default must be there. The values are those of the shipped descriptions' newest releases, before
`by_memory_gib` and `cases`. `runtime/deployment/engines/defaults.py` has the defaults that are formulas of chip, layout
and drafts, by kind; `runtime/deployment/engines/reserve.py` what an engine reserves beside weights and pool.

{settings}

### Caches
The section `[cache]` says what a token's rows are stored in. Values are names of
[formats.md](formats.md#rows-of-caches); of `kv`, what is picked when `--kv` says nothing: {kv}.

{caches}
"""


def meanings(owner: type) -> dict[str, tuple[str, str]]:
    """Field -> (part of the description, meaning), from the docstring of its class."""
    known, part, found, name = {f.name for f in fields(owner)}, "", {}, ""
    for line in (owner.__doc__ or "").splitlines()[1:]:
        begun = re.match(r"    (\w+): (.*)", line)
        if begun and begun[1] in known:
            name = begun[1]
            found[name] = part, begun[2]
        elif name and line.startswith("        "):
            found[name] = part, f"{found[name][1]} {line.strip()}"
        else:
            name = ""
            part = line.strip().lower() if re.fullmatch(r"    [A-Z][a-z]+", line) else part
    return found


def shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def setting_rows() -> Iterator[tuple[str, ...]]:
    documents = {name: read_toml(ENGINES / f"{name}.toml") for name in engines.names()}
    means = meanings(Engine)
    for each in (f for f in fields(Engine) if f.name in SETTINGS):
        part, meaning = means[each.name]
        values: dict[str, list[str]] = {}
        for name, document in documents.items():
            for section in document.values():
                if isinstance(section, dict) and each.name in section and "source" in section[each.name]:
                    values.setdefault(shown(section[each.name]["value"]), []).append(name)
        given = "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
        default = "" if each.default is MISSING else shown(each.default)
        yield f"`{each.name}`", part, meaning, default, given


def release_rows() -> Iterator[tuple[str, str]]:
    for name in engines.names():
        known = [f"{release} ({day})" if day else release for release, day in engines.described(name).items()]
        yield f"`{name}`", ", ".join(known)


def render() -> str:
    """The page."""
    caches = [(f"`{name}`", meaning) for name, (_, meaning) in meanings(CacheRules).items()]
    keys = [
        (key, text.format(kinds=", ".join(KINDS), tables=", ".join(get_args(Tables)))) for key, text in KEYS.items()
    ]
    return PAGE.format(
        releases=table("engine", "releases described, newest first", rows=list(release_rows())),
        keys=table("key", "", rows=keys),
        conditions=", ".join(f"`{f.name}`" for f in fields(Circumstances)),
        settings=table("setting", "part", "meaning", "default", "shipped", rows=list(setting_rows())),
        kv=", ".join(KV),
        caches=table("cache", "", rows=caches),
    )


if __name__ == "__main__":
    page.write(__doc__, DEFAULT, render)
