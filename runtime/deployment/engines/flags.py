"""What a TOML file of `launch/` says about an engine. The files' own heads explain their sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from foundation.reading import Unreadable, read_toml
from runtime.deployment.engines.loader import holds
from runtime.deployment.errors import EngineError

Facts = Mapping[str, Any]

_FOLDER = Path(__file__).parent / "launch"


@dataclasses.dataclass(frozen=True)
class LaunchTable:
    """An engine's flags and rules, as read."""

    name: str
    program: tuple[str, ...]
    runs_on: tuple[str, ...]
    port: int
    visible_devices: str
    flags: Mapping[str, tuple[str, str]]
    additional: Mapping[str, tuple[Any, str]]
    sources: Mapping[str, str]
    extra: tuple[Mapping[str, Any], ...]
    environment: tuple[Mapping[str, Any], ...]
    remark: tuple[Mapping[str, Any], ...]
    refuse: tuple[Mapping[str, Any], ...]

    def flag(self, key: str) -> str:
        return self.flags[key][0]

    def can(self, key: str) -> bool:
        return key in self.flags

    def extra_words(self, facts: Facts) -> list[list[str]]:
        """The words of each `[[extra]]` that applies."""
        return [list(rule["words"]) for rule in self.extra if holds(rule["when"], facts)]

    def variables(self, facts: Facts) -> dict[str, str]:
        """The environment variables that apply."""
        found: dict[str, str] = {}
        for rule in self.environment:
            if holds(rule["when"], facts):
                found |= rule["set"]
        return found

    def remarks(self, facts: Facts) -> list[str]:
        return [rule["text"] for rule in self.remark if holds(rule["when"], facts)]

    def refusals(self, facts: Facts) -> list[str]:
        return [rule["why"] for rule in self.refuse if holds(rule["when"], facts)]

    @property
    def documented(self) -> Mapping[str, str]:
        """Every flag that this engine may be given, and the document it was read in."""
        found = {flag: source for flag, source in self.flags.values()}
        for rule in self.extra:
            found |= {word.partition("=")[0]: rule["source"] for word in rule["words"] if word.startswith("--")}
        return {flag: self.sources[source] for flag, source in found.items()}


def _document(name: str) -> dict[str, Any]:
    path = _FOLDER / f"{name}.toml"
    try:
        return read_toml(path)
    except Unreadable as error:
        raise EngineError(f"{path}: {error}") from None


@lru_cache
def table(name: str) -> LaunchTable:
    """The table of an engine. Raises `EngineError` where there is none."""
    body = _document(name)
    return LaunchTable(
        name=body["name"],
        program=tuple(body["program"]),
        runs_on=tuple(body["runs_on"]),
        port=body["port"],
        visible_devices=body["visible_devices"],
        flags={key: (flag, source) for key, (flag, source) in body["flags"].items()},
        additional={key: (value, source) for key, (value, source) in body.get("additional", {}).items()},
        sources=body["sources"],
        extra=tuple(body.get("extra", ())),
        environment=tuple(body.get("environment", ())),
        remark=tuple(body.get("remark", ())),
        refuse=tuple(body.get("refuse", ())),
    )


def checkpoint(model: str, scheme: str) -> str | None:
    """The published checkpoint of a preset (its name without "-fp8") in these formats, if there is one."""
    return _document("checkpoints").get(scheme, {}).get(model)


def unsupported(engine: str, vendor: str, scheme: str, kv: str, sparse: bool) -> str | None:
    """Why an engine does not serve these formats on a vendor's chips; None where it does or where nothing is known.

    sparse: the model has an indexer.
    """
    if not (_FOLDER / f"{engine}.toml").is_file():
        return None
    known = {"vendor": vendor, "scheme": scheme, "kv": kv, "sparse": sparse}
    rules = (rule for rule in table(engine).refuse if rule["when"].keys() <= known.keys())
    return next((rule["why"] for rule in rules if holds(rule["when"], known)), None)
