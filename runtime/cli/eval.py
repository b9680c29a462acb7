"""`glm5 eval`: exact matches on held-out questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from runtime.cli import completion


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint directory of `glm5 train` [default: the embedded tiny model].")
    ] = None,
    backend: Annotated[
        str, typer.Option(autocompletion=completion.backends, help="Where to run; `glm5 backends` lists them.")
    ] = "cpu",
    samples: Annotated[int, typer.Option(min=1, help="Questions a task.")] = 100,
    task: Annotated[list[str] | None, typer.Option(help="Only this task (may be repeated).")] = None,
    mtp: Annotated[int, typer.Option(min=0, max=16, help="Draft this many tokens a step with the MTP layer.")] = 0,
    random_indexer: Annotated[
        bool, typer.Option("--random-indexer", help="Give the indexers random weights: what selection is worth.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [default: the backend's preference].")] = None,
    keep_fp8: Annotated[bool, typer.Option("--keep-fp8", help="Keep FP8 weights in FP8.")] = False,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="Print a few wrong answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a trained checkpoint questions that its training held out, and count the exact answers."""
    if show_wrong and as_json:
        raise UsageError("--show-wrong prints for a person: leave it out, or leave out --json")
    if random_indexer and keep_fp8:
        raise UsageError("--keep-fp8 does not go with --random-indexer, whose weights are in --dtype: leave it out")

    from backends import registry
    from runtime.cli.opening import opened_checkpoint
    from runtime.training.data import TASKS
    from runtime.training.evaluate import evaluate as run

    device = registry.usable(backend)
    path = opened_checkpoint(checkpoint).path
    found = run(path, device, samples, task or TASKS, mtp, dtype, keep_fp8, random_indexer)
    if as_json:
        print(json.dumps({"backend": backend, "random_indexer": random_indexer, **found.as_json()}, indent=2))
        return
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("task", "right", "asked", "exact match"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, score in found.tasks.items():
        table.add_row(name, str(score.right), str(score.asked), f"{score.exact_match:.1%}")
    console = Terminal()
    console.print(table)
    if found.recall_distance is not None:
        console.print(f"facts to recall were at least {found.recall_distance} tokens back")
    if found.accept_length is not None:
        console.print(f"{found.accept_length:.2f} tokens a verification step with {mtp} drafts")
    for name, score in found.tasks.items() if show_wrong else ():
        for prompt, wanted, given in score.wrong:
            console.print(f"{name}: …{prompt!r} wanted {wanted!r}, given {given!r}", markup=False, soft_wrap=True)
