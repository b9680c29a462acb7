"""A profile to begin with: the figures that somebody has, and every other field as a comment to fill in."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence

from foundation.reading import Unreadable, parse_toml
from hw_profiles.checks import check
from hw_profiles.errors import InvalidProfile
from hw_profiles.fields import CURVES, FIELDS, LABELS, asked_as, refused, show, suggest
from hw_profiles.parse import parse

NEEDED = ("chip.peak.bf16_flops_per_s", "chip.memory.capacity_bytes", "chip.memory.bandwidth_bytes_per_s")
"""What every plan and simulation needs."""
_WHY = {
    "node": "Devices in one server, and how they talk: needed as soon as a model takes more than one device.",
    "link.scale_up": "Within a server or supernode.",
    "link.scale_out": "Between servers or supernodes: needed where a layout crosses them, and for KV transfer.",
    "link.host": "To host memory: decides what a host tier of the KV cache is worth.",
    "overhead": "Fixed times and memory. What is not here is assumed, and every answer says so.",
}
_HEAD = """\
# {name}, begun by `glm5 profiles new`. SI units (1 GB = 1e9 bytes), per device and direction, dense rates.
# Fill in what you know and take the # away; leave the rest: an answer that needs it names it, and one that assumes
# something in its place says so.
"""


def new_profile(
    name: str,
    vendor: str,
    figures: Mapping[str, object],
    weights: Sequence[str],
    kv: Sequence[str],
    source: str,
    grade: str,
    missing: str = "",
) -> str:
    """The text of a commented profile. figures: by field, curves as one factor. missing: what to say where one of
    `NEEDED` is not among them.

    Raises InvalidProfile for what is absent, unknown or absurd, or implausible (see `checks`).
    """
    if any(field not in figures for field in NEEDED):
        raise InvalidProfile(missing or f"needs {', '.join(NEEDED)}")
    known = (*FIELDS, *CURVES, *LABELS)
    if unknown := [field for field in figures if field not in known]:
        raise InvalidProfile([f"--set {field}: no such field{suggest(field)}" for field in unknown])
    about = {"name": name, "vendor": vendor, "family": name, "kind": "accelerator", "description": f"{name}, {vendor}"}
    lines = [_HEAD.format(name=name), "schema = 1", *(f"{key} = {_text(value)}" for key, value in about.items())]
    lines += ["", "[sources.given]", f"title = {_text(source)}", f'date = "{datetime.date.today().isoformat()}"']
    lines += [f"grade = {_text(grade)}", *_sections(figures), *_curves(figures), "", "[formats]"]
    lines += [f"weights = {_text([asked_as(each.strip()) for each in weights])}"]
    lines += [f"kv = {_text([each.strip() for each in kv])}", 'source = "given"']
    text = "\n".join(lines) + "\n"
    try:
        tables = parse_toml(text)
    except Unreadable as error:
        texts = ", ".join(show(each) for each in (name, vendor, source) if not each.isprintable()) or "what is given"
        raise InvalidProfile(f"{texts} cannot be written to a profile ({error}); use plain text") from None
    if problems := check(parse(tables, name)):
        raise InvalidProfile(problems)
    return text


def _sections(figures: Mapping[str, object]) -> Iterator[str]:
    """The tables of figures and labels, each field on a line, those that nobody gave as comments."""
    table = ""
    for field in sorted((*FIELDS, *LABELS), key=lambda field: _tables().index(field.rpartition(".")[0])):
        section, _, key = field.rpartition(".")
        if section != table:
            table = section
            yield ""
            if why := _WHY.get(section):
                yield f"# {why}"
            yield f"[{section}]"
        if field in figures:
            value = figures[field]
            number = f"{value:.15g}" if isinstance(value, int | float) else _text(value)
            yield f"{key} = {number}" if field in LABELS else f'{key} = {{ value = {number}, source = "given" }}'
        elif field in LABELS:
            yield f'# {key} = "…"  # {", ".join(LABELS[field] or ("text",))}'
        else:
            use = "; for comparison" if refused(field) else ""
            yield f'# {key} = {{ value = …, source = "given" }}  # {FIELDS[field].unit}: {FIELDS[field].meaning}{use}'


def _tables() -> list[str]:
    """Tables of the file, in the order of their fields."""
    return list(dict.fromkeys(field.rpartition(".")[0] for field in (*FIELDS, *LABELS)))


def _curves(figures: Mapping[str, object]) -> Iterator[str]:
    yield ""
    yield "# Share of a peak that is reached, by size of the operation: [[size, share], …]; one pair is one factor."
    for field, unit in CURVES.items():
        mark = "" if field in figures else "# "
        share = _text(figures[field]) if field in figures else "…"
        yield from (f"{mark}[{field}]", f"{mark}size_unit = {_text(unit)}", f"{mark}knots = [[1.0, {share}]]")
        yield f'{mark}source = "given"'


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
