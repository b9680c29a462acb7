"""`glm5 rl`: reinforcement learning from rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli import completion
from runtime.cli.train import need_extra


def rl(
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of stages, objective and schedule [default: sums, thinking on].")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint directory of `glm5 train` [default: the embedded tiny model].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: state, metrics, plots, checkpoint.")] = Path("rl-run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last state.")] = False,
    backend: Annotated[
        str, typer.Option(autocompletion=completion.backends, help="Where to generate; `glm5 backends` lists them.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line a step instead of a bar.")] = False,
) -> None:
    """Learn from what the model itself answers: rollouts by the engine, verified rewards, in step or asynchronously."""
    need_extra()
    from backends import registry
    from runtime.cli.opening import opened_checkpoint
    from runtime.cli.progress import steps_bar
    from runtime.training.rl import config as configs
    from runtime.training.rl.trainer import train as run

    source = config or configs.DEFAULT
    read = configs.read(source)
    device = registry.usable(backend)
    opened = opened_checkpoint(checkpoint)
    if as_json:
        run(read, opened, device, out, source, resume, lambda step, record: print(json.dumps(record), flush=True))
        return

    def said(record: dict[str, Any]) -> str:
        if "reward" not in record:
            return f"imitating, loss {record['loss']:.3f}"
        return f"reward {record['reward']:.3f}"

    with steps_bar(read.steps, said) as report:
        path = run(read, opened, device, out, source, resume, report)
    print(f"checkpoint: {path}\nplots:      {out / 'metrics.html'}")
