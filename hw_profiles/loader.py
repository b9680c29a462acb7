"""Find a profile by name or path, read it, and apply `--set` overrides."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from foundation.paths import Outside, inside
from foundation.reading import Unreadable, read_text, read_toml
from hw_profiles.errors import InvalidOverride, InvalidProfile, UnknownProfile
from hw_profiles.fields import CURVES, FIELDS, LABELS, show, suggest, wrong_value
from hw_profiles.parse import parse, wrong_knots
from hw_profiles.schema import PROFILES, SET, Curve, Figure, Profile

ALIASES = {
    "a100": "a100-sxm-80gb",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "h800": "h800-sxm",
    "h20": "h20-96gb",
    "h20-sxm": "h20-96gb",
    "b200": "b200-sxm",
    "b300": "b300-sxm",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
    "cpu": "cpu-host",
}

CAPACITY, USABLE = "chip.memory.capacity_bytes", "chip.memory.usable_bytes"
Override = float | str | list[list[float]]


def names() -> tuple[str, ...]:
    """The names of all shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.toml")))


def load(name_or_path: str | Path, overrides: Mapping[str, Override] | None = None) -> Profile:
    """Read a shipped profile by name or alias, or any TOML by path; then apply `overrides`.

    Raises UnknownProfile, InvalidProfile (one line a problem) or InvalidOverride. An overridden figure is
    graded "user".
    """
    path = _find(str(name_or_path))
    try:
        document = read_toml(path)
    except Unreadable as error:
        if error.reason == "syntax":
            raise InvalidProfile(f"{path.name}: is not valid TOML: {error}") from None
        if error.reason == "encoding":
            raise InvalidProfile(f"{path.name}: is {error}") from None
        raise UnknownProfile(f"{path}: cannot be read: {error}") from None
    profile = parse(document, path.name, path)
    _check_prices(profile)
    return _override(profile, overrides) if overrides else profile


def prices_sha256(text: str) -> str:
    """What a profile says of the text of its prices file."""
    return hashlib.sha256(text.encode()).hexdigest()


def _check_prices(profile: Profile) -> None:
    """Raises where a profile's prices lie outside its folder, or are not those it was written with, as where
    `glm5 calibrate` was killed between the two files."""
    if profile.prices and profile.path:
        try:
            inside(profile.path.parent, profile.prices)
        except Outside as error:
            if error.reason != "absent":  # which whoever needs them says
                raise InvalidProfile(f"{profile.path.name}: prices: {profile.prices}: {error}") from None
    if profile.prices_sha256 and profile.prices_path and profile.path:
        try:
            same = prices_sha256(read_text(profile.prices_path)) == profile.prices_sha256
        except Unreadable as error:
            raise InvalidProfile(f"{profile.path.name}: prices: {profile.prices_path}: {error}") from None
        if not same:
            raise InvalidProfile(
                f"{profile.path.name}: prices: {profile.prices} is not the file that this profile was written with; "
                "calibrate again, or take out `prices_sha256` to use it as it is"
            )


def parse_override(text: str) -> tuple[str, Override]:
    """`"chip.memory.bandwidth_bytes_per_s=4e12"` to a pair for `load`. Raises InvalidOverride.

    Numbers become floats; what is no number stays text (`link.scale_up.topology=switch`).
    """
    field, equals, value = (part.strip() for part in text.partition("="))
    if not field or not equals or not value:
        raise InvalidOverride(f"--set {show(text)}: write field=value, as in {_EXAMPLE}")
    try:
        return field, float(value)
    except ValueError:
        return field, value


_EXAMPLE = "chip.memory.bandwidth_bytes_per_s=4.0e12"


def _find(name: str) -> Path:
    if name.endswith(".toml") or "/" in name or "\\" in name:
        path = Path(name)
        if not path.is_file():
            raise UnknownProfile(f"{show(name)}: no such file")
        return path
    known = names()
    name = ALIASES.get(name, name)
    if name not in known:
        hint = suggest(name, (*known, *ALIASES)) or f"; shipped are {', '.join(known)}"
        raise UnknownProfile(f"no profile named {show(name)}{hint} (a file needs its .toml ending)")
    return PROFILES / f"{name}.toml"


def _override(profile: Profile, overrides: Mapping[str, Override]) -> Profile:
    figures, curves, labels = dict(profile.figures), dict(profile.curves), dict(profile.labels)
    problems: list[str] = []
    for field, value in overrides.items():
        what: str | None = None
        if field in FIELDS:
            what = wrong_value(field, value)
            if not what:
                old = profile.number(field)
                figures[field] = Figure(float(value), FIELDS[field].unit, SET, "", "user", replaces=old)  # pyright: ignore
        elif field in CURVES:
            knots = value if isinstance(value, list) else [[1.0, value]]
            what = wrong_knots(knots)
            if not what:
                pairs = tuple((float(size), float(share)) for size, share in knots)
                curves[field] = Curve(pairs, CURVES[field], SET, "", "user")
        elif field in LABELS:
            allowed = LABELS[field]
            if not isinstance(value, str) or (allowed and value not in allowed):
                what = f"must be {'one of ' + ', '.join(allowed) if allowed else 'text'}, got {show(value)}"
            else:
                labels[field] = value
        else:
            what = f"no such field{suggest(field) or '; `glm5 profiles show NAME` lists them'}"
        if what:
            problems.append(f"--set {show(field)}: {what}")
    if not problems:
        figures |= _memory(profile, figures, problems)
    if problems:
        raise InvalidOverride(problems)
    return dataclasses.replace(profile, figures=figures, curves=curves, labels=labels)


def _memory(profile: Profile, figures: Mapping[str, Figure], problems: list[str]) -> dict[str, Figure]:
    """Usable memory that goes with another capacity: the same share of it, unless it was set as well."""
    capacity, usable = (figures.get(path) for path in (CAPACITY, USABLE))
    if capacity is None or usable is None:
        return {}
    if usable.source != SET and capacity.source == SET:
        old = profile.figures.get("chip.memory.capacity_bytes")
        share = usable.value / old.value if old else 1.0
        note = f"{share:.4g} of the capacity, as before" if old else "all of the capacity"
        return {USABLE: Figure(capacity.value * share, usable.unit, f"{SET} {CAPACITY}", "", "user", note)}
    if usable.value > capacity.value and SET in (usable.source, capacity.source):
        problems.append(
            f"--set {USABLE}: {usable.value:.6g} is more than {CAPACITY}, {capacity.value:.6g}; set that as well"
        )
    return {}
