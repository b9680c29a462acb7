"""`glm5 calibrate`: measure this machine and write it as a profile."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import UsageError
from runtime.cli import completion

if TYPE_CHECKING:
    from backends.interface import Backend
    from runtime.porting.calibrate import ServingCost


def calibrate(
    backend: Annotated[
        str, typer.Option(autocompletion=completion.backends, help="What to measure with; `glm5 backends` lists them.")
    ] = "cpu",
    out: Annotated[Path, typer.Option(help="Where to write the profile; measured ops go beside it.")] = Path(
        "my-host.toml"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds: seconds, and rougher.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure matrix products, memory, launches and ops of this machine, and what serving takes beside them; write a
    profile to simulate with."""
    import hw_profiles
    from backends import registry
    from foundation.writing import replacing_together
    from runtime.porting.calibrate import QUICK, Effort, measure, prices, profile

    if out.suffix != ".toml":
        raise UsageError(f"--out {out}: a profile's name ends in .toml, as in my-host.toml")
    tables = out.with_suffix(".prices.json")
    adapter = registry.usable(backend)
    with replacing_together(tables, out) as (beside, temporary):  # the profile last: it says which prices are its own
        found = measure(adapter, QUICK if quick else Effort(), _line if sys.stderr.isatty() and not as_json else None)
        found = dataclasses.replace(found, serving=_serving_cost(adapter))
        described = profile(found, adapter, out.stem, tables.name)
        measured = json.dumps(prices(found, described), indent=1) + "\n"
        described = dataclasses.replace(described, prices_sha256=hw_profiles.prices_sha256(measured))
        beside.write_text(measured, encoding="utf-8")
        temporary.write_text(hw_profiles.dumps(described), encoding="utf-8")
    figures = {path: figure.value for path, figure in described.figures.items()}
    launches = {"dispatch_s": found.dispatch_s, "donated_s": found.donated_s, "spread": found.spread}
    if as_json:
        print(json.dumps({"profile": str(out), "prices": str(tables), "figures": figures, **launches}, indent=2))
        return
    for path, value in figures.items():
        print(f"{path:40}{value:12.4g}  {hw_profiles.FIELDS[path].unit}")
    print(f"dispatch of a compiled step: {found.dispatch_s * 1e6:.0f} us; {found.donated_s * 1e6:.0f} us with a cache")
    for problem in hw_profiles.check(described):
        print(f"implausible: {problem}")
    print(f"rounds differ by {found.spread:.0%}. Wrote {out} and {tables.name}; use it with")
    formats = " --formats f32" if found.dtype == "float32" else ""
    print(f"  glm5 simulate --profile {out} --devices 1 --engine glm5{formats} --model CHECKPOINT")


def _serving_cost(adapter: Backend) -> ServingCost | None:
    try:
        from runtime.api.pace import serving_cost
    except ModuleNotFoundError as error:
        print(
            f"glm5: what serving takes beside the device is not measured: it needs {error.name} "
            "(pip install 'glm5-runtime[serve]')", file=sys.stderr,
        )  # fmt: skip
        return None
    return serving_cost(adapter)


def _line(done: int, total: int) -> None:
    print(f"\rmeasuring {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
