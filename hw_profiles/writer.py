"""A `Profile` back into TOML, as `glm5 calibrate` writes it. `load` of the text gives an equal profile."""

import json
from typing import Any

from hw_profiles.schema import ChipFormats, Curve, Figure, Profile


def dumps(profile: Profile) -> str:
    """The TOML text of a profile, every figure with its own source, date and grade."""
    lines = ["schema = 1"]
    for key in ("name", "vendor", "family", "kind", "description"):
        lines.append(f"{key} = {_value(getattr(profile, key))}")
    if profile.package_devices != 1:
        lines.append(f"package_devices = {profile.package_devices}")
    if profile.prices:
        lines.append(f"prices = {_value(profile.prices)}")
    if profile.prices_sha256:
        lines.append(f"prices_sha256 = {_value(profile.prices_sha256)}")

    section = ""
    entries: dict[str, str] = {path: _figure(figure) for path, figure in profile.figures.items()}
    entries |= {path: _value(text) for path, text in profile.labels.items()}
    for path in sorted(entries, key=lambda path: (path.rpartition(".")[0], path)):
        table, _, key = path.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines.append(f"{key} = {entries[path]}")
    for path, curve in profile.curves.items():
        lines += ["", f"[{path}]", f"size_unit = {_value(curve.size_unit)}"]
        lines.append(f"knots = [{', '.join(f'[{size!r}, {share!r}]' for size, share in curve.knots)}]")
        lines += [f"{key} = {_value(text)}" for key, text in _origin(curve).items()]
    formats = profile.formats
    lines += ["", "[formats]"]
    lines += [f"{key} = {_value(list(getattr(formats, key)))}" for key in ("weights", "kv")]
    lines += [f"{key} = {_value(text)}" for key, text in _origin(formats).items()]
    return "\n".join(lines) + "\n"


def _figure(figure: Figure) -> str:
    parts: dict[str, Any] = {"value": figure.value} | _origin(figure)
    if figure.range:
        parts["range"] = list(figure.range)
    return "{ " + ", ".join(f"{key} = {_value(value)}" for key, value in parts.items()) + " }"


def _origin(item: Figure | Curve | ChipFormats) -> dict[str, str]:
    origin = {"source": item.source, "date": item.date, "grade": item.grade, "note": item.note}
    return {key: text for key, text in origin.items() if text}


def _value(value: str | float | list[Any]) -> str:
    if isinstance(value, str | list):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
