"""Reads an engine description and checks it.

A TOML file holds `kind` (which engine it describes: defaults that are formulas and launch flags go by it, never by the
file's name; "other" where those of none hold), `release` and the day it was `released`, `prices` (whose operator
tables price it), `hosts` (vendors of the chips beside which its host times were taken), `name`, `description` and
sections of settings; each setting is `{value=, source=, date=, grade=, note=}`. Sections only group for the reader:
`Engine` is flat.
A value may depend on the device: `by_memory_gib = [[limit, value], ...]` gives the value for devices
whose memory is below `limit` GiB (first match); `value` is what holds when the memory is not given. Or on the chip and
model: `cases = [{when = {..}, value = ..}, ..]`, the first whose conditions hold (see `Circumstances`), which goes
before the memory.
The section `cache` says what rows are stored in; its values are names of `model.formats.ROWS`, `kv` one of `KV`.
Tables `[releases."0.13"]` describe older releases: what differs there, and in all that are older still, from the next
newer one. Or a file `extends` a release of an engine described here, by name, and holds what is otherwise; its section
`fitted` then says which measurements that is from (`glm5 fit` writes such files). Grades: A read from the engine's own
source or documentation, B measured by others, C assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from foundation.errors import shortened
from foundation.limits import within
from foundation.reading import Unreadable, read_toml
from model.formats import KV, ROWS
from runtime.deployment.document import Fault, place, validated
from runtime.deployment.engines.engine import (
    ABOUT,
    REQUIRED,
    SETTINGS,
    CacheRules,
    Choice,
    Circumstances,
    Engine,
    FittedTo,
    Setting,
    Source,
    wrong_setting,
)
from runtime.deployment.engines.releases import latest_not_newer, number, same_release
from runtime.deployment.errors import EngineError

_GIB = 2**30
MOST_GRAPHS = 10_000
"""Decode batch sizes captured: engines capture fifty, and each takes memory of a device."""
_FOLDER = Path(__file__).parent
_OF_A_RELEASE = ("released", "description", "prices", "hosts")
"""What a release may say of itself beside settings."""


def names() -> list[str]:
    """Names of the engines described here."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


KINDS = (*names(), "other")
ENGINES_HELP = f"{', '.join(names())}, or a TOML file; @RELEASE for an older one, as vllm@0.13."
"""How help texts list them."""


def load(name: str, overrides: Mapping[str, Any] | None = None, at: Circumstances = Circumstances()) -> Engine:
    """The engine called `name`, or described by the TOML file at that path: its newest release, or with "@RELEASE"
    behind the name that one.

    overrides: setting -> value, as `{"chunked_prefill_tokens": 32768}`. at: settles the defaults that depend on the
    device or the model.
    Raises EngineError: unknown engine, release or setting, incomplete or malformed file, absurd value.
    """
    path, release = _named(name)
    found = _description(path, path.stat().st_mtime_ns).at(path.name, release)
    values, evidence = _settings(path.name, found.settings, at)
    for key, value in (overrides or {}).items():
        _known(key)
        values[key] = expand(value) if key == "graph_batch_sizes" else value
        evidence[key] = Source("override", "", "A", "set by the caller")
    if "graph_batch_sizes" not in (overrides or {}) and isinstance(most := values.get("graph_max_batch"), int) and most:
        values["graph_batch_sizes"] = tuple(size for size in values.get("graph_batch_sizes", ()) if size <= most)
    missing = [each for each in REQUIRED if each not in values]
    if missing:
        raise EngineError(f"{path.name} lacks {', '.join(missing)}: add each as {{value=, source=, date=, grade=}}")
    if found.about.get("kind") not in KINDS:
        raise EngineError(f"{path.name}: kind = {found.about.get('kind')!r} must be one of {', '.join(KINDS)}")
    values = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in values.items()}  # 1e4 tokens
    about = {"name": path.stem, "description": "", **found.about}
    try:
        engine = validated(Engine, {**about, **values}, EngineError, path.name, say=_say)
    except EngineError as error:
        if path.parent == _FOLDER or str(error).startswith(path.name):
            raise
        raise EngineError(f"{path.name}: {error}") from None
    return replace(engine, cache=_cache_rules(path.name, found.cache), evidence=evidence, fitted=found.fitted)


def described(name: str) -> dict[str, str]:
    """The releases of an engine that are described, newest first, each with the day it came out ("": unknown)."""
    path, _ = _named(name)
    return {
        part.about.get("release", ""): part.about.get("released", "")
        for part in _description(path, path.stat().st_mtime_ns).parts
    }


def nearest_release(name: str, version: str) -> str:
    """The engine by name with the described release that stands for a version which need not be described: the newest
    one that is not newer than it, by its number ("0.5.6.post1") or its day ("nightly 2026-02-13"), or else the oldest.
    A version that tells neither is taken for the newest.
    """
    return f"{name}@{latest_not_newer(version, described(name))}"


def split_release(name: str) -> tuple[str, str]:
    """An engine's name or file, and what behind it names a release: ("vllm", "@0.13"), or "" where an @ belongs to the
    path or there is none."""
    plain, at, release = name.rpartition("@")
    if not at or "/" in release or release.endswith(".toml"):
        return name, ""
    return plain, at + release


def _named(name: str) -> tuple[Path, str]:
    """The file of an engine, and the release that is asked for."""
    plain, at = split_release(name)
    path = Path(plain) if plain.endswith(".toml") else _FOLDER / f"{plain}.toml"
    if not path.is_file() or not (plain.endswith(".toml") or path.parent == _FOLDER):
        raise EngineError(f"unknown engine {plain!r}: choose one of {', '.join(names())}, or give a .toml path")
    return path, at if at == "@" else at[1:]


@dataclass(frozen=True)
class _Part:
    """What a file says of a release and of those older: words about it, its settings and cache rules."""

    about: Mapping[str, Any]
    settings: Mapping[str, Setting]
    cache: Mapping[str, Setting]
    fitted: FittedTo | None = None

    def over(self, older: _Part) -> _Part:
        """This part's words, settings and rules before those of another."""
        settings, cache = {**older.settings, **self.settings}, {**older.cache, **self.cache}
        return _Part({**older.about, **self.about}, settings, cache, self.fitted)


@dataclass(frozen=True)
class _Description:
    """A file: its parts, newest release first."""

    parts: tuple[_Part, ...]

    def at(self, file: str, release: str) -> _Part:
        """The description of a release, the newest for "". Raises `EngineError` for one that is not described."""
        known = [part.about.get("release", "") for part in self.parts]
        last = next((i for i, each in enumerate(known) if same_release(each, release)), None) if release else 0
        if last is None:
            asked = f"release {shortened(repr(release))}" if release != "@" else "no release behind the @"
            raise EngineError(
                f"{file.removesuffix('.toml')}: {asked} is not described; described are {', '.join(known[::-1])}: "
                f"name one of them, as {file.removesuffix('.toml')}@{known[0]}"
            )
        found = self.parts[0]
        for part in self.parts[1 : last + 1]:
            found = replace(part.over(found), fitted=None)
        return found


@lru_cache(maxsize=32)
def _description(path: Path, modified_ns: int) -> _Description:
    """The file as read; planning loads an engine for each of hundreds of layouts."""
    try:
        document = read_toml(path)
    except Unreadable as error:
        what = f" is not valid TOML: {error}" if error.reason == "syntax" else f": {error}"
        raise EngineError(f"{path.name}{what}") from None
    extends, older = document.pop("extends", None), document.pop("releases", {})
    if not isinstance(older, Mapping) or not all(isinstance(each, Mapping) for each in older.values()):
        raise EngineError(f'{path.name}: releases = {older!r} must hold tables, as [releases."0.13"]')
    sections = {name: part for name, part in document.items() if isinstance(part, dict)}
    fitted = sections.pop("fitted", None)
    if fitted is not None:
        fitted = validated(dict[str, FittedTo], {"fitted": fitted}, EngineError, path.name, say=_say)["fitted"]
    sections = validated(dict[str, dict[str, Setting]], sections, EngineError, path.name, say=_say)
    cache = sections.pop("cache", document.get("cache", {}))
    if not isinstance(cache, Mapping):
        raise EngineError(f"{path.name}: cache = {cache!r} must be a section of settings")
    settings = {key: entry for section in sections.values() for key, entry in section.items()}
    about = _words(path.name, {key: document[key] for key in ABOUT if key in document})
    if extends is not None:
        return _Description(
            (
                _checked(path.name, _Part(about, settings, cache, fitted)).over(
                    _extended(path.name, extends, about, older)
                ),
            )
        )
    newest = about.get("release", "")
    parts = [_checked(path.name, _Part(about, settings, cache, fitted))]
    for release in sorted(older, key=number, reverse=True):
        if not number(release) or number(release) >= number(str(newest)):
            raise EngineError(f"{path.name}: releases.{release!r} must be the number of a release before {newest}")
        parts.append(_older(path.name, release, older[release]))
    return _Description(tuple(parts))


def _words(file: str, about: dict[str, Any]) -> dict[str, Any]:
    """What a file says of itself, which is printed: without line ends and other characters that are not shown."""
    for key, value in about.items():
        if isinstance(value, str) and not value.isprintable():
            raise EngineError(f"{file}: {key} = {value!r} must be one line of printable text")
    return about


def _extended(file: str, extends: Any, about: Mapping[str, Any], older: Any) -> _Part:
    """The release that a file extends. about, older: what the file says of itself, and of older releases."""
    if said := [key for key in ("kind", "release", "released", "prices") if key in about] or (older and ["releases"]):
        raise EngineError(f"{file} says {said[0]}: that is {extends}'s, which it extends; leave it out")
    base, _, release = str(extends).partition("@")
    if base not in names():
        raise EngineError(f"{file}: extends = {extends!r} must be one of {', '.join(names())}, or one @RELEASE")
    path = _FOLDER / f"{base}.toml"
    found = _description(path, path.stat().st_mtime_ns).at(path.name, release)
    return replace(found, about={key: value for key, value in found.about.items() if key != "name"})


def _older(file: str, release: str, table: Mapping[str, Any]) -> _Part:
    """One table of `releases`."""
    where = f'{file}: releases."{release}"'
    for key in ("kind", "release", "name"):
        if key in table:
            raise EngineError(f"{where} says {key}: that is the file's, above its sections")
    about = {"release": release, "released": ""} | _words(where, {k: table[k] for k in _OF_A_RELEASE if k in table})
    rules = {key: entry for key, entry in table.items() if key not in (*_OF_A_RELEASE, "cache")}
    for key in rules:
        _known(key, f"{where}: ")
    parts = {"settings": rules, "cache": table.get("cache", {})}
    read = validated(dict[str, dict[str, Setting]], parts, EngineError, where, say=_say)
    return _checked(where, _Part(about, read["settings"], read["cache"]))


def _say(where: str, fault: Fault) -> str:
    """A fault in the shape of a setting, or in an engine's values."""
    if fault.missing:
        return f"{where}: {fault.path[-1]} lacks {', '.join(fault.missing)}"
    if fault.unknown:
        return f"{where}: {fault.path[-1]} does not take {fault.unknown[0]}; it takes {', '.join(fault.known)}"
    wrong = fault.wrong.replace("must be int", "must be a number without a fraction")
    return f"{where}: {place(fault.path)} = {fault.shown} {wrong}"


def _settings(
    file: str, settings: Mapping[str, Setting], at: Circumstances
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Setting -> value and setting -> evidence under these circumstances."""
    values: dict[str, Any] = {}
    evidence: dict[str, Source] = {}
    memory = at.built_bytes or at.memory_bytes
    for key, entry in settings.items():
        case = Choice(None, entry.cases).under(at)
        if case is not None:
            value = case
        elif memory is not None and entry.by_memory_gib:
            steps = entry.by_memory_gib
            value = next((v for limit, v in steps if memory < limit * _GIB), steps[-1][1])
        else:
            value = entry.value
        values[key] = expand(value, f"{file}: ") if key == "graph_batch_sizes" else value
        evidence[key] = Source(entry.source, entry.date, entry.grade, entry.note)
    return values, evidence


_ASKED = get_type_hints(Circumstances)
_TAKEN = get_type_hints(Engine)


def _checked(file: str, part: _Part) -> _Part:
    """A part of which every condition can hold, and every value can be taken. Raises EngineError."""
    for key, entry in part.settings.items():
        _known(key, f"{file}: ")
        _conditions(file, key, entry)
        limits = [limit for limit, _ in entry.by_memory_gib]
        if limits != sorted(limits):
            raise EngineError(
                f"{file}: {key}.by_memory_gib = {shortened(repr(limits))} must rise, the first that fits holds"
            )
        for value in (*(case.value for case in entry.cases), *(value for _, value in entry.by_memory_gib)):
            if key == "graph_batch_sizes":
                expand(value, f"{file}: ")
                continue
            made = int(value) if isinstance(value, float) and value.is_integer() else value
            validated(dict[str, _TAKEN[key]], {key: made}, EngineError, file, say=_say)  # pyright: ignore[reportInvalidTypeForm]
            if why := wrong_setting(key, made):
                raise EngineError(f"{file}: {key} = {shortened(repr(made))} {why}")
    return part


def _conditions(file: str, key: str, setting: Setting) -> None:
    """Raises EngineError for a case of what is no circumstance, or of what it can never be."""
    for case in setting.cases:
        for name, wanted in case.when.items():
            if name not in _ASKED:
                raise EngineError(f"{file}: {key} has a case of {name!r}; cases can be of {', '.join(_ASKED)}")
            if wanted == []:
                raise EngineError(f"{file}: {key} has a case of {name} = [], which never holds")
            for each in wanted if isinstance(wanted, list) else [wanted]:
                asked = {"when": {name: each}}
                kind = dict[str, dict[str, _ASKED[name]]]  # pyright: ignore[reportInvalidTypeForm]
                validated(kind, asked, EngineError, f"{file}: {key}", say=_say)
                if name == "kv" and each not in KV:
                    raise EngineError(f"{file}: {key} has a case of kv = {each!r}; known: {', '.join(KV)}")


def _cache_rules(file: str, section: Mapping[str, Setting]) -> CacheRules:
    known = [f.name for f in fields(CacheRules)]
    if unknown := sorted(section.keys() - set(known)):
        raise EngineError(f"{file}: unknown cache {unknown[0]!r}; known: {', '.join(known)}")
    for key, rule in section.items():
        _conditions(file, f"cache.{key}", rule)
        names = KV if key == "kv" else ROWS
        for value in (rule.value, *(case.value for case in rule.cases)):
            if not isinstance(value, str) or value not in names:
                raise EngineError(f"{file}: cache.{key} {value!r} is unknown; known: {', '.join(names)}")
    return CacheRules(**{key: Choice(rule.value, rule.cases) for key, rule in section.items()})


def expand(sizes: Any, where: str = "") -> tuple[int, ...]:
    """[1, 2, "8:32:8"] -> (1, 2, 8, 16, 24, 32); ranges include their end. where: the file they are in, for errors."""
    name = f"{where}graph_batch_sizes"
    expanded: set[int] = set()
    try:
        for size in sizes:
            if isinstance(size, str):
                first, last, step = (int(part) for part in size.split(":"))
                held = range(first, last + 1, step)
                within(f"{name}: {size[:60]} holds", len(held[: MOST_GRAPHS + 1]), MOST_GRAPHS, EngineError)
                expanded.update(held)
            else:
                expanded.add(int(size))
    except (TypeError, ValueError, OverflowError):
        raise EngineError(
            f'{name} = {shortened(repr(sizes))} must hold sizes and ranges as "first:last:step"'
        ) from None
    within(f"{name}: sizes of", len(expanded), MOST_GRAPHS, EngineError)
    return tuple(sorted(expanded))


def _known(key: str, where: str = "") -> None:
    if key not in SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(SETTINGS)}"
        raise EngineError(f"{where}unknown engine setting {key!r}: {hint}")
