"""What a run reports: a JSON line every few steps, and a page of plots made of them. Free of JAX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from foundation.errors import UsageError
from foundation.reading import Unreadable, parse_json, read_lines
from foundation.writing import replacing
from runtime.reports.svg import Mark, Series, legend, plot
from runtime.training.data import TASKS

FILE, PAGE = "metrics.jsonl", "metrics.html"
_COLOURS = ("#1668a8", "#c2571a", "#2a7f3f", "#8a3fa0", "#a58a00", "#555")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}"
    "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(540px,100%),1fr));gap:1.5rem}"
    "section{min-width:0;break-inside:avoid}"
    "h2{font-size:1rem;margin:0}"
    "*{box-sizing:border-box}svg{width:100%;height:auto}.line{fill:none;stroke-width:1.6}.grid{stroke:#ddd}.axis{stroke:#888}.mark{stroke:#999;"
    "stroke-dasharray:4 4}text{font-size:11px;fill:#555}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".legend span{margin-right:1em}.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}"
    + "".join(f".s{i}{{stroke:{c}}}i.s{i}{{background:{c}}}" for i, c in enumerate(_COLOURS))
)


def append(folder: Path, record: dict[str, Any]) -> None:
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def load(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a line cut short by a kill is left out."""
    path, records = folder / FILE, []
    try:
        lines = read_lines(path) if path.exists() else []
    except Unreadable as error:
        raise UsageError(f"{path}: {error}; remove it") from None
    for line in lines:
        try:
            record = parse_json(line)
        except Unreadable:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def truncate(folder: Path, step: int) -> None:
    """Drops the records after `step`: a resumed run makes them again."""
    kept = [record for record in load(folder) if record["step"] <= step]
    with replacing(folder / FILE) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def page(folder: Path, title: str, stages: Sequence[tuple[int, str]]) -> None:
    """Writes the plots of a training run. stages: the step at which each begins, and its name."""
    records = load(folder)
    tasks = {task: [(r["step"], r["task_loss"][task]) for r in records if task in r["task_loss"]] for task in TASKS}
    losses = {key: _curve(records, key) for key in ("loss", "draft_loss", "index_loss")}
    recall = _curve(records, "index_recall")
    plots = [
        _Plot("Loss of the answers, by task", "nats a token", tasks),
        _Plot("Losses", "nats", losses),
        _Plot("Largest attention logit", "logit", {"largest": _curve(records, "logit_max")}),
        _Plot("Expert load, max over mean", "ratio", {"worst layer": _curve(records, "load_ratio")}),
        _Plot("Indexer recall of the dense top-k", "share", {"recall": recall}, percent=True),
    ]
    _write(folder, title, [Mark(step, name) for step, name in stages], plots)


def learning_page(folder: Path, title: str) -> None:
    """Writes the plots of a run of `glm5 rl`."""
    records = load(folder)
    begins = {r["stage"]: r["step"] for r in reversed(records)}
    marks = [Mark(max(0, step - 1), f"stage {stage}") for stage, step in sorted(begins.items())]

    def by_task(key: str) -> dict[str, PlotCurve]:
        tasks = sorted({task for r in records for task in r.get(key, ())})
        return {task: [(r["step"], r[key][task]) for r in records if task in r.get(key, ())] for task in tasks}

    def curves(**keys: str) -> dict[str, PlotCurve]:
        return {name.replace("_", " "): _curve(records, key) for name, key in keys.items()}

    plots = [
        _Plot("Reward of what was drawn, by task", "share", by_task("task_reward"), percent=True),
        _Plot("Held-out questions, greedy", "share", by_task("held_out"), percent=True),
        _Plot("Versions behind, of tokens", "versions", curves(mean="behind", most="behind_most")),
        _Plot("Tokens whose gradient was cut", "share", curves(cut="cut"), percent=True),
        _Plot("Log-probability, learner less generator", "nats", curves(mean="gap", largest="gap_max")),
        _Plot("Entropy", "nats a token", curves(entropy="entropy")),
        _Plot("Seconds of a step", "s", curves(waiting="waited_s", training="trained_s")),
    ]
    _write(folder, title, marks, plots)


PlotCurve = list[tuple[float, float]]


class _Plot(NamedTuple):
    heading: str
    label: str
    curves: dict[str, PlotCurve]
    percent: bool = False


def _curve(records: Sequence[dict[str, Any]], key: str) -> PlotCurve:
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _write(folder: Path, title: str, marks: Sequence[Mark], plots: Sequence[_Plot]) -> None:
    def drawn(each: _Plot) -> str:
        series = [Series(name, points) for name, points in each.curves.items()]
        top = 1.0 if each.percent else None
        picture = plot(series, "step", each.label, marks=marks, percent=each.percent, y_max=top)
        return f"<section><h2>{escape(each.heading)}</h2>{picture}{legend(list(each.curves))}</section>"

    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><main>{''.join(map(drawn, plots))}</main>"
        "</body></html>\n"
    )
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
