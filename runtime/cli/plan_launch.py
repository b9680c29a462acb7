"""`glm5 plan launch`: a plan as the command lines of a serving engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from runtime.cli import completion


def plan_launch(
    plan: Annotated[Path, typer.Argument(help="A plan, as `glm5 plan --out` writes it.")],
    engine: Annotated[
        str | None, typer.Option(help="sglang, vllm or vllm-ascend [default: the engine of each pool].")
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="Release of the engine [default: the one that the plan's engine describes].")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.models,
            help="The model it is for, where that neither ships nor lies beside the plan.",
        ),
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="Checkpoint to load [default: the published one in the plan's formats].")
    ] = None,
    hosts: Annotated[
        str | None, typer.Option(help="Addresses of the plan's nodes in order, comma-separated [default: $NODE0, ...].")
    ] = None,
    host_tier: Annotated[
        bool, typer.Option(help="Keep evicted KV pages in host memory, twice the device pool.")
    ] = False,
    sources: Annotated[bool, typer.Option(help="Print where each flag was read.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a script a node and their files to this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the commands that deploy a plan: one a node, or more where replicas share one.

    What an engine cannot be told is a `# note:`; what it cannot do is refused. Expert placements are files beside the
    commands: --out writes them.
    """
    from runtime.deployment.plan import Plan
    from runtime.planning.launch import launch

    if out is not None and not out.is_dir():
        raise UsageError(f"{out}: there is no such directory to write to")
    found = Plan.read(plan)
    names = [name.strip() for name in hosts.split(",")] if hosts else []
    if not all(names):
        raise UsageError(f"--hosts {hosts}: an address is empty; write them as a,b,c")
    cfg = found.config(model, plan)
    made = launch(found, cfg, engine, release=release, model=model_path, hosts=names, host_tier=host_tier)
    written = made.write(out, sources) if out is not None else []
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
    elif written:
        for path in written:
            typer.echo(path)
    else:
        typer.echo(made.text(sources), nl=False)
        if made.files:
            typer.echo(f"\n# files read above, written by --out DIR: {', '.join(made.files)}")
