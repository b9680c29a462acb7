"""`glm5 train`: a small GLM-5 from scratch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError


def train(
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of model, optimizer and stages [default: the embedded model's].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: state, metrics, plots, checkpoint.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last state.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line a record instead of a bar.")] = False,
) -> None:
    """Train a small GLM-5 on generated text, with Muon Split and sparse attention."""
    need_extra()
    from runtime.cli.progress import steps_bar
    from runtime.training import config as configs
    from runtime.training.trainer import train as run

    source = config or configs.DEFAULT
    read = configs.read(source)
    if as_json:
        run(read, out, source, resume, lambda step, record: print(json.dumps(record), flush=True) if record else None)
        return
    with steps_bar(read.steps, lambda record: f"{record['stage']}, loss {record['loss']:.3f}") as report:
        checkpoint = run(read, out, source, resume, report)
    print(f"checkpoint: {checkpoint}\nplots:      {out / 'metrics.html'}")


def need_extra() -> None:
    """Raises `UsageError` where what training imports is not installed."""
    if missing := [name for name in ("flax", "optax") if importlib.util.find_spec(name) is None]:
        raise UsageError(f'training needs {missing[0]}: pip install "glm5-runtime[train]"')
