"""The tables of docs/rl.md: runs what is not there yet, and prints what is.

    python -m bench.rl_tables --results DIR [--table NAME ...] [--minutes N] [--collect FILE]
    python -m bench.rl_tables --results bench/results/rl_2026-11-29.json --print-only

A cell's result is a JSON file in DIR; a sweep that was cut short goes on where it was. Cells run one after another in
this process (`rl_cells.py` has them), so what was compiled for one serves the next; seconds of CPU are this process's
and its children's. Wall times are worth what the machine was free for: modes are run in turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from backends import compiled
from backends.registry import usable
from bench.rl_cells import TABLES, Cell, all_cells
from bench.rl_gaps import CORRECTIONS, gap
from foundation.errors import UsageError
from foundation.writing import replacing
from model import qat
from model.checkpoint import Checkpoint
from model.module import Model
from runtime.execution.local.load import embedded_checkpoint
from runtime.training import metrics
from runtime.training.rl import config as configs
from runtime.training.rl.config import Generation
from runtime.training.rl.episodes import Questions
from runtime.training.rl.rollouts import Asked, RolloutEngine
from runtime.training.rl.trainer import train

BACKEND = "cpu"
LONGEST, MOST_TOKENS, RUNNING = 72, 24, 64
"""Of what a checkpoint is asked at the end."""


def run(cell: Cell) -> dict[str, Any]:
    """What came of a cell, and what it took. A run that fails says how."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    found: dict[str, Any] = {"table": cell.table, "labels": cell.labels, "seed": cell.seed, "config": cell.toml}
    with tempfile.TemporaryDirectory() as temporary:
        folder, source = Path(temporary) / "run", Path(temporary) / "rl.toml"
        checkpoint = embedded_checkpoint()
        try:
            if cell.table == "gaps":
                formats, replay = cell.labels
                found |= gap(formats, replay, cell.seed)  # type: ignore[arg-type]
            if cell.stages:
                source.write_text(cell.toml)
                checkpoint = train(configs.read(source), Checkpoint(checkpoint), usable(BACKEND), folder, source)
            if cell.asks:
                found["asked"] = ask(checkpoint, cell)
        except UsageError as error:
            found["failed"] = str(error)
        found |= summary(metrics.load(folder)) if cell.stages else {}
    return found | {"cell_wall_s": time.perf_counter() - wall, "cell_cpu_s": sum(os.times()[:4]) - cpu}


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's metrics. Sums and means leave out cold starts, and of times the first step, which compiles."""
    steps = [each for each in records if "waited_s" in each]
    held = [(each["step"], each["held_out"]) for each in records if "held_out" in each]
    if not steps:
        return {"held_out": held}
    later = steps[1:] or steps
    times = {key: sum(each[key] for each in later) for key in ("waited_s", "trained_s", "generated_s")}
    means = {key: statistics.mean(each[key] for each in steps) for key in ("behind", "gap", "cut", "entropy", "mixed")}
    tasks = sorted({task for each in steps for task in each["task_reward"]})
    return {
        "held_out": held,
        "steps": len(steps),
        **times,
        **means,
        "gap_max": max(each["gap_max"] for each in steps),
        "behind_most": max(each["behind_most"] for each in steps),
        "thrown_away": steps[-1]["thrown_away"],
        "last_reward": statistics.mean(each["reward"] for each in steps[-5:]),
        "answer_tokens": np.mean([each["answer_tokens"] for each in steps], axis=0).tolist(),
        "tokens_an_answer": sum(each["drawn_tokens"] for each in steps) / sum(each["answers"] for each in steps),
        "task_reward": {
            task: statistics.mean(each["task_reward"][task] for each in steps if task in each["task_reward"])
            for task in tasks
        },
    }


def ask(checkpoint: Path, cell: Cell) -> dict[str, float]:
    """Share of held-out questions that a checkpoint answers right, greedily, in float32."""
    model, questions = Model.load(checkpoint), Questions.load(checkpoint, cell.seed)
    seen = qat.rounding(cell.offline) if cell.offline else lambda weight, array: array  # as a quantiser writes it
    engine = RolloutEngine(
        model.config, model.seen(seen), usable(BACKEND), Generation("float32", MOST_TOKENS),
        questions.generator.tokenizer, LONGEST, RUNNING,
    )  # fmt: skip
    found = {}
    for task in cell.asks:
        exercises = questions.generator.questions(task, 100)
        groups = engine.generate(
            [Asked(i, each, 1, LONGEST, lambda *_: (0,), temperature=0.0) for i, each in enumerate(exercises)]
        )
        found[task] = float(np.mean([group.rewards[0] for group in groups]))
    return found


# --- tables


def spread(values: Iterable[float], scale: float = 1.0, digits: int = 0) -> str:
    """Median and range; the number of runs where it is not all of them."""
    found = sorted(scale * each for each in values)
    if not found:
        return "not run"
    middle = f"{statistics.median(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({found[0]:.{digits}f} to {found[-1]:.{digits}f})"


def last(task: str) -> Callable[[dict[str, Any]], float]:
    return lambda each: each["held_out"][-1][1][task]


def asked(task: str) -> Callable[[dict[str, Any]], float]:
    return lambda each: each["asked"][task]


def cut_by(correction: str) -> Callable[[dict[str, Any]], float]:
    return lambda each: each["cut"][correction]


Column = tuple[str, Callable[[dict[str, Any]], float], float, int]
COLUMNS: dict[str, tuple[Column, ...]] = {
    "modes": (
        ("wall, s a step", lambda each: (each["waited_s"] + each["trained_s"]) / (each["steps"] - 1), 1, 2),
        ("learner waits, %", lambda each: each["waited_s"] / (each["waited_s"] + each["trained_s"]), 100, 0),
        ("versions behind", lambda each: each["behind"], 1, 2),
        ("CPU of the run, s", lambda each: each["cell_cpu_s"], 1, 0),
    ),
    "lags": (
        ("held-out at the end, %", last("thinking"), 100, 0),
        ("reward of the last 5 steps, %", lambda each: each["last_reward"], 100, 0),
        ("tokens cut, %", lambda each: each["cut"], 100, 1),
        ("mean gap, nats", lambda each: each["gap"], 1, 3),
    ),
    "admissions": (
        ("tokens of an answer trained on", lambda each: each["tokens_an_answer"], 1, 1),
        ("median", lambda each: each["answer_tokens"][1], 1, 1),
        ("90th percentile", lambda each: each["answer_tokens"][2], 1, 1),
        ("groups thrown away", lambda each: each["thrown_away"], 1, 0),
        ("versions behind", lambda each: each["behind"], 1, 2),
    ),
    "formats": (
        ("mean gap, 1e-3 nats", lambda each: each["gap"], 1000, 2),
        ("largest gap, nats", lambda each: each["gap_max"], 1, 2),
        ("long-copy at the end, %", last("long-copy"), 100, 0),
        ("tokens cut, %", lambda each: each["cut"], 100, 2),
    ),
    "gaps": (
        ("mean gap, 1e-3 nats", lambda each: each["gap"], 1000, 3),
        ("99th percentile", lambda each: each["gap_99"], 1000, 2),
        ("largest, nats", lambda each: each["gap_max"], 1, 2),
        *((f"{how} cuts, %", cut_by(how), 100, 2) for how in CORRECTIONS),
    ),
    "stages": tuple(
        (f"{task}, %", asked(task), 100, 0) for task in ("thinking", "long-copy", "arithmetic", "copy", "sentences")
    ),
    "roundings": tuple((f"{task}, %", asked(task), 100, 0) for task in ("arithmetic", "copy", "sentences")),
}


def tables(results: list[dict[str, Any]], wanted: Iterable[str]) -> str:
    """In Markdown, those of which something was run: median and range over the seeds."""
    parts = []
    for name in wanted:
        columns, rows = COLUMNS[name], dict[tuple[str, ...], list[dict[str, Any]]]()
        for each in results:
            if each["table"] == name:
                rows.setdefault(tuple(each["labels"]), []).append(each)
        if not rows:
            continue
        head = ["", "runs", "failed", *(column[0] for column in columns)]
        lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for labels, runs in sorted(rows.items(), key=lambda row: _order(row[0])):
            whole = [each for each in runs if "failed" not in each]
            cells = [spread(map(of, whole), scale, digits) for _, of, scale, digits in columns]
            lines.append(
                f"| {', '.join(labels)} | {len(runs)} | {len(runs) - len(whole) or ''} | {' | '.join(cells)} |"
            )
        parts.append(f"### {name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _order(labels: tuple[str, ...]) -> list[tuple[float, str]]:
    return [(float(each), "") if each.replace(".", "").replace("e-", "").isdigit() else (-1.0, each) for each in labels]


def read(place: Path) -> list[dict[str, Any]]:
    """Of a folder with a file a cell, or of one file with all."""
    if place.is_file():
        return json.loads(place.read_text())
    return [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]


def main() -> None:
    names = tuple(each.__name__ for each in TABLES)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="a folder of JSON, a file a cell; or one, to print")
    parser.add_argument("--table", choices=names, action="append", help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell begins after that long")
    parser.add_argument("--print-only", action="store_true", help="run nothing")
    parser.add_argument("--collect", type=Path, help="all results in one file")
    given = parser.parse_args()
    wanted, end = tuple(given.table or names), time.monotonic() + 60 * given.minutes
    if not given.print_only:
        compiled.keep_in(given.results / "compiled")
    for cell in [] if given.print_only else all_cells(wanted):
        place = given.results / f"{cell.name}.json"
        if place.exists() and json.loads(place.read_text())["config"] == cell.toml:
            continue
        if time.monotonic() > end:
            break
        found = run(cell)
        with replacing(place) as temporary:
            temporary.write_text(json.dumps(found))
        print(f"{cell.name}: {found['cell_cpu_s']:.0f} s of CPU, {found['cell_wall_s']:.0f} s", flush=True)
    results = read(given.results)
    if given.collect:
        given.collect.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    print(tables(results, wanted))


if __name__ == "__main__":
    main()
