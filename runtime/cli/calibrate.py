"""`glm5 calibrate`: measure this machine and write it as a profile."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import UsageError
from runtime.cli import completion
from runtime.cli.given import given
from runtime.cli.outputs import require_apart

if TYPE_CHECKING:
    from backends.interface import Backend
    from runtime.porting.calibrate import ServingCost


def calibrate(
    context: typer.Context,
    backend: Annotated[
        str, typer.Option(autocompletion=completion.backends, help="What to measure with; `glm5 backends` lists them.")
    ] = "cpu",
    out: Annotated[Path, typer.Option(help="Where to write the profile; measured ops go beside it.")] = Path(
        "my-host.toml"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.models,
            help="Measure this model's ops at its own shapes, too, and steps of a few of its layers where one device "
            "holds them: a preset, a checkpoint directory or a config.json. It need not fit.",
        ),
    ] = None,
    tp: Annotated[int, typer.Option(help="With --model: the shapes of one of so many ranks.")] = 1,
    ep: Annotated[int, typer.Option(help="With --model: groups that share its experts out.")] = 1,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Instead of measuring, read times of operators: what an Ascend package's run.py wrote (--operators "
            "--json), or msmodeling's CSV of a kernel, or a folder of those.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.chips, help="With --from: the chip's profile; what was not measured stays."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds: seconds, and rougher.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure matrix products, memory, launches and ops of this machine, and what serving takes beside them; write a
    profile to simulate with."""
    import hw_profiles
    from backends import registry
    from foundation.writing import replacing_together
    from model.hf_config import load_config
    from model.split import Layout
    from runtime.porting.calibrate import prices
    from runtime.porting.calibrate import profile as described_by
    from runtime.porting.calibrate_calls import ModelRank
    from runtime.porting.calibrate_sizes import QUICK, Effort
    from runtime.porting.calibrate_steps import measure_with_steps

    if out.suffix != ".toml":
        raise UsageError(f"--out {out}: a profile's name ends in .toml, as in my-host.toml")
    said = given(context)
    if (from_file is None) != (profile is None):
        raise UsageError("--from FILE and --profile CHIP go together")
    if from_file is not None:
        if read := said.keys() & {"backend", "quick", "model", "tp", "ep"}:
            options = " and ".join(f"--{name}" for name in sorted(read))
            raise UsageError(f"--from reads what was measured: leave out {options}")
        return _from_file(from_file, str(profile), out, as_json)
    if model is None and said.keys() & {"tp", "ep"}:
        raise UsageError("--tp and --ep say which rank of a model is measured: add --model")
    rank = None
    if model is not None:
        rank = ModelRank(load_config(model), Layout(tp=tp, ep=ep))
    tables = out.with_suffix(".prices.json")
    adapter = registry.usable(backend)
    with replacing_together(tables, out) as (beside, temporary):  # the profile last: it says which prices are its own
        progress = _line if sys.stderr.isatty() and not as_json else None
        effort = QUICK if quick else Effort()
        found = measure_with_steps(adapter, effort, progress, rank)
        found = dataclasses.replace(found, serving=_serving_cost(adapter))
        described = described_by(found, adapter, out.stem, tables.name)
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
    devices = f"--devices {tp}{f' --tp {tp}' if tp > 1 else ''}{f' --ep {ep}' if ep > 1 else ''}"
    print(f"  glm5 simulate --profile {out} {devices} --engine glm5{formats} --model {model or 'CHECKPOINT'}")


def _from_file(measured: Path, chip: str, out: Path, as_json: bool) -> None:
    import hw_profiles
    from foundation.writing import replacing, replacing_together
    from runtime.porting import operator_kernels, operator_times

    beside = out.with_suffix(".prices.json")
    for place in (out, beside):
        require_apart({"out": place, "from_file": measured}, {"out": "--out", "from_file": "--from"})
    base = hw_profiles.load(chip)
    times = operator_times.read(measured, base.number("overhead.kernel_launch_s") or 0.0)
    found = operator_kernels.sorted_rows(times, base)
    described = operator_times.calibrated(base, found.products, measured.name, out.stem)
    curves = {path: curve for path, curve in described.curves.items() if curve is not base.curves.get(path)}
    tables = operator_kernels.prices(found, described, measured.name)
    if not curves and tables is None:
        raise UsageError(
            f"{measured}: {len(times)} operators, none of which prices have a kernel of, and too few products to tell "
            "how fast the chip computes or reads; measure more sizes: --batch and --chunk of glm5 export"
        )
    if tables is None:
        with replacing(out) as temporary:
            temporary.write_text(hw_profiles.dumps(described), encoding="utf-8")
    else:
        text = json.dumps(tables, indent=1) + "\n"
        described = dataclasses.replace(described, prices=beside.name, prices_sha256=hw_profiles.prices_sha256(text))
        with replacing_together(beside, out) as (prices, temporary):  # the profile last: it says which are its own
            prices.write_text(text, encoding="utf-8")
            temporary.write_text(hw_profiles.dumps(described), encoding="utf-8")
    fates = Counter((use.row.name, use.used_for, use.left_out) for use in found.uses)
    kernels = {**tables["kernels"], **tables["collectives"]} if tables else {}
    if as_json:
        knots = {path: [list(knot) for knot in curve.knots] for path, curve in curves.items()}
        rows = [
            {"operator": use.row.name, "phase": use.row.phase, "inputs": [list(shape) for shape, _ in use.row.inputs],
             "used_for": use.used_for or None, "left_out": use.left_out or None}
            for use in found.uses
        ]  # fmt: skip
        counts = {"operators": len(times), "products": len(found.products), "kernels": sorted(kernels)}
        print(json.dumps({"profile": str(out), **counts, **knots, "rows": rows}, indent=2))
        return
    print(f"{measured}: {len(times)} operators, {len(found.products)} matrix products, {len(kernels)} kernels")
    for (name, used_for, left_out), count in sorted(fates.items()):
        print(f"{count:4} x {name:40} {used_for or f'left out: {left_out}'}")
    for path, curve in curves.items():
        for size, share in curve.knots:
            print(f"{path:24}{size:12.4g} {curve.size_unit:6}{share:8.1%}")
    for key, body in kernels.items():
        print(f"{key:32} error of sizes left out: {next(iter(body['error'].values()))[1]:.0%}")
    for problem in hw_profiles.check(described):
        print(f"implausible: {problem}")
    print(
        f"Wrote {out}{f' and {beside.name}' if tables else ''}, {base.name} but for that; use it with --profile {out}"
    )


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
