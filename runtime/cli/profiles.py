"""`glm5 profiles`: list, show, check, compare and begin the accelerators of `hw_profiles/`.

`app` is a typer sub-application. An expected error is one line on stderr and exit code 2.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from foundation.errors import Failure
from foundation.writing import replacing
from hw_profiles import (
    FIELDS,
    NEEDED,
    ChipFormats,
    Curve,
    Figure,
    Profile,
    ProfileError,
    check,
    load,
    names,
    new_profile,
    parse_override,
    weakest,
)
from runtime.cli import completion
from runtime.cli.terminal import Terminal

app = typer.Typer(help="Accelerator profiles: list, show, check, compare, begin one.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ProfileName = Annotated[
    str, typer.Argument(autocompletion=completion.chips, help="A shipped profile's name, or the path of a TOML file.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a figure: field=value. Repeatable.")]

# Columns of `list`: JSON key, heading, field, what a unit of the column is worth.
_COLUMNS = (
    ("bf16_flops_per_s", "bf16\nTFLOP/s", "chip.peak.bf16_flops_per_s", 1e12),
    ("fp8_flops_per_s", "fp8\nTFLOP/s", "chip.peak.fp8_flops_per_s", 1e12),
    ("int8_flops_per_s", "int8\nTOP/s", "chip.peak.int8_flops_per_s", 1e12),
    ("memory_bytes", "memory\nGB", "chip.memory.capacity_bytes", 1e9),
    ("memory_bytes_per_s", "memory\nTB/s", "chip.memory.bandwidth_bytes_per_s", 1e12),
    ("scale_up_bytes_per_s", "scale-up\nGB/s", "link.scale_up.bandwidth_bytes_per_s", 1e9),
)


_ASKED = dict(zip(NEEDED, ("--bf16 FLOP/s", "--memory bytes", "--bandwidth bytes/s"), strict=True))
"""The options of `new` for what every answer needs."""


@app.command("list")
def list_profiles(as_json: Json = False) -> None:
    """One row an accelerator. Rates are dense, bandwidths per device and direction; "-" is unknown."""
    with _expected_errors():
        profiles = [load(name) for name in names()]
    if as_json:
        return _print_json({"profiles": [_summary(profile) for profile in profiles]})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("vendor")
    for _, heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weakest\ngrade")
    for profile in profiles:
        cells = [_cell(profile.get(field), scale) for _, _, field, scale in _COLUMNS]
        table.add_row(profile.name, profile.vendor, *cells, _row_grade(profile))
    Terminal().print(table)


@app.command()
def show(name: ProfileName, overrides: Set = None, as_json: Json = False) -> None:
    """Every figure of one profile with its source, date, grade and note, and what is absent."""
    with _expected_errors():
        profile = load(name, dict(parse_override(text) for text in overrides or ()))
    if as_json:
        return _print_json(_everything(profile))
    console = Terminal()
    console.print(f"[bold]{profile.name}[/]  {escape(profile.vendor)}, {profile.family}, {profile.kind}")
    console.print(escape(profile.description) + "\n")
    sources: dict[str, int] = {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("field", no_wrap=True)
    for heading in ("value", "range"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("grade", "date", "src"):
        table.add_column(heading, no_wrap=True)
    table.add_column("note", ratio=1)
    for field, text in profile.labels.items():
        table.add_row(field, escape(text))
    for field, value, span, item in _rows(profile):
        number = sources.setdefault(item.source, len(sources) + 1)
        table.add_row(field, value, span, item.grade, item.date, str(number), escape(item.note))
    console.print(table)
    console.print("\n[bold]sources[/]")
    for source, number in sources.items():
        console.print(f"{number:3d}  {escape(source)}", soft_wrap=True)
    console.print("\n[bold]absent[/]  " + (", ".join(profile.absent) or "nothing"))


@app.command("check")
def check_file(name: ProfileName, as_json: Json = False) -> None:
    """Say what is wrong with a profile, a line each, and exit with 2; or print OK."""
    problems: list[str] = []
    try:
        problems = check(load(name))
    except ProfileError as error:
        problems = list(error.problems)
    if as_json:
        _print_json({"profile": name, "ok": not problems, "problems": problems})
    elif problems:
        typer.echo("\n".join(problems), err=True)
    else:
        typer.echo(f"OK {name}")
    if problems:
        raise typer.Exit(2)


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The TOML file to write.")],
    bf16: Annotated[float | None, typer.Option(help="Dense bf16 rate of the matmul unit, FLOP/s.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of a device, bytes.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Memory bandwidth, bytes/s.")] = None,
    figures: Annotated[
        list[str] | None, typer.Option("--set", help="Any other figure: field=value. Repeatable.")
    ] = None,
    formats: Annotated[str, typer.Option(help="Weight formats it computes in, with commas between.")] = "bf16",
    kv: Annotated[str, typer.Option(help="Formats it keeps a KV cache in, with commas between.")] = "bf16",
    name: Annotated[str | None, typer.Option(help="Name of the chip [default: the file's].")] = None,
    vendor: Annotated[str, typer.Option(help="Who makes it.")] = "own",
    source: Annotated[str, typer.Option(help="Where the figures come from.")] = "given by hand",
    grade: Annotated[
        str, typer.Option(help="How good they are: measured, A, B, C or user (see profiles show).")
    ] = "user",
) -> None:
    """Write a commented profile of a chip, from the figures that you have; the rest stays to be filled in."""
    with _expected_errors():
        given = {
            field: value for field, value in zip(NEEDED, (bf16, memory, bandwidth), strict=True) if value is not None
        }
        given |= dict(parse_override(text) for text in figures or ())
        text = new_profile(
            name or file.stem.lower(), vendor, given, formats.split(","), kv.split(","), source, grade,
            missing="give " + " and ".join(_ASKED[field] for field in NEEDED if field not in given),
        )  # fmt: skip
        if file.suffix != ".toml":
            raise ProfileError(f"{file}: a profile's file ends in .toml")
        if file.exists():
            raise ProfileError(f"{file}: is there already; name another file")
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {file}; `glm5 profiles check {file}` checks it, `--profile {file}` uses it")


@app.command()
def diff(first: ProfileName, second: ProfileName, as_json: Json = False) -> None:
    """The figures of two profiles side by side, with the ratio second / first."""
    with _expected_errors():
        a, b = load(first), load(second)
    fields = [field for field in FIELDS if a.get(field) or b.get(field)]
    if as_json:
        rows = [_comparison(field, a.get(field), b.get(field)) for field in fields]
        return _print_json({"a": a.name, "b": b.name, "fields": rows})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("field", no_wrap=True)
    for heading in (a.name, b.name, "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for field in fields:
        left, right = a.get(field), b.get(field)
        ratio = f"{right.value / left.value:.3g}" if left and right else "-"
        table.add_row(field, _graded(left), _graded(right), ratio)
    Terminal().print(table)


@contextmanager
def _expected_errors() -> Iterator[None]:
    try:
        yield
    except Failure as error:
        typer.echo(f"glm5: {error}", err=True)
        raise typer.Exit(2) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _cell(figure: Figure | None, scale: float) -> str:
    return f"{figure.value / scale:.4g}" if figure else "-"


def _row_grade(profile: Profile) -> str:
    """The weakest grade among the figures that `list` prints."""
    return weakest(figure.grade for _, _, field, _ in _COLUMNS if (figure := profile.get(field)))


def _graded(figure: Figure | None) -> str:
    return f"{_human(figure.value, figure.unit)} {figure.grade}" if figure else "-"


def _human(value: float, unit: str) -> str:
    """4.8e12, "bytes/s" -> "4.8 TB/s"; 2.6e-06, "s" -> "2.6 us". Decimal prefixes."""
    if unit == "s":
        return f"{value * 1e6:.4g} us"
    if unit in ("devices", "links"):
        return f"{value:g}"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit.replace('bytes', 'B')}"
    return f"{value:.4g} {unit}"


def _rows(profile: Profile) -> Iterator[tuple[str, str, str, Figure | Curve | ChipFormats]]:
    """(field, value, range, where it comes from) in the order a person reads."""
    for field, figure in profile.figures.items():
        span = " to ".join(_human(value, figure.unit) for value in figure.range or ())
        yield field, _human(figure.value, figure.unit), span, figure
    for field, curve in profile.curves.items():
        yield field, _knots(curve), "", curve
    formats = profile.formats
    yield "formats.weights", "\n".join(formats.weights), "", formats
    yield "formats.kv", "\n".join(formats.kv), "", formats


def _knots(curve: Curve) -> str:
    if len(curve.knots) == 1:
        return f"{curve.knots[0][1]:g} at any size"
    return "\n".join(f"{share:g} at {_human(size, curve.size_unit)}" for size, share in curve.knots)


def _summary(profile: Profile) -> dict[str, Any]:
    row: dict[str, Any] = {"name": profile.name, "vendor": profile.vendor, "kind": profile.kind}
    for key, _, field, _ in _COLUMNS:
        figure = profile.get(field)
        row[key] = figure.value if figure else None
    return row | {"weakest_grade": _row_grade(profile)}


def _everything(profile: Profile) -> dict[str, Any]:
    def about(item: Any) -> dict[str, Any]:
        return {key: getattr(item, key) for key in ("source", "date", "grade", "note")}

    figures = {
        field: {"value": figure.value, "unit": figure.unit, "range": figure.range, **about(figure)}
        for field, figure in profile.figures.items()
    }
    curves = {
        field: {"size_unit": curve.size_unit, "knots": curve.knots, **about(curve)}
        for field, curve in profile.curves.items()
    }
    formats = profile.formats
    return {
        "name": profile.name,
        "vendor": profile.vendor,
        "family": profile.family,
        "kind": profile.kind,
        "description": profile.description,
        "package_devices": profile.package_devices,
        "prices": profile.prices,
        "weakest_grade": profile.weakest_grade,
        "figures": figures,
        "curves": curves,
        "labels": dict(profile.labels),
        "formats": {"weights": formats.weights, "kv": formats.kv, **about(formats)},
        "absent": profile.absent,
    }


def _comparison(field: str, a: Figure | None, b: Figure | None) -> dict[str, Any]:
    return {
        "field": field,
        "unit": FIELDS[field].unit,
        "a": a.value if a else None,
        "b": b.value if b else None,
        "ratio": b.value / a.value if a and b else None,
    }
