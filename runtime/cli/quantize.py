"""`glm5 quantize`: a checkpoint in a chip's number formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from model.formats import SCHEMES_HELP
from runtime.cli import completion


def quantize(
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    formats: Annotated[str | None, typer.Option(autocompletion=completion.schemes, help=f"{SCHEMES_HELP}.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.chips,
            help="Take this accelerator's own formats, or check that it has those given.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Hugging Face checkpoint directory [default: the embedded tiny model].")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="deepseek, compressed-tensors or msmodelslim [default: what the formats are usually in]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint in a chip's number formats, rounded to nearest."""
    if formats is None and profile is None:
        raise UsageError("give --formats, or --profile to take an accelerator's own")

    import hw_profiles
    from model.formats import scheme as named
    from runtime.cli.opening import opened_checkpoint
    from runtime.deployment.choice import chosen_scheme
    from runtime.porting.quantize import quantize as write

    if profile is not None:
        scheme = chosen_scheme(hw_profiles.load(profile), formats)
    else:
        assert formats is not None
        scheme = named(formats)
    if scheme.name == "f32":
        raise UsageError("formats f32: a checkpoint in float32 is the reference, not a chip's; give another")
    source = opened_checkpoint(checkpoint)
    written = write(source, scheme, out, layout)
    if as_json:
        print(
            json.dumps(
                {
                    "out": str(written.path),
                    "formats": scheme.name,
                    "layout": written.layout,
                    "source_bytes": written.source_bytes,
                    "bytes": written.bytes,
                    "matrices": dict(written.matrices),
                    "kept_from_source": written.kept,
                },
                indent=2,
            )
        )
        return
    print(f"{out}: {scheme.name}" + (f" in the layout of {written.layout}" if written.layout else ", plain"))
    for name, count in written.matrices.items():
        print(f"  {count} matrices in {name}")
    if written.kept:
        print(f"  {written.kept} of them with the values and scales of the source")
    saved = written.bytes / written.source_bytes
    print(
        f"  {written.bytes / 1e6:,.1f} MB of tensors, {saved:.0%} of the source's {written.source_bytes / 1e6:,.1f} MB"
    )
    print(f"Run it with: glm5 run --checkpoint {out}")
