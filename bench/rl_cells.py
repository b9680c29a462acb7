"""The runs behind the tables of docs/rl.md: one cell of a table is one configuration of `glm5 rl` and one seed.

Every run is short, so that five seeds of many cells fit into hours of one core: what they can show is what is large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

SEEDS = range(5)
SUMS = {"thinking": 1.0}
STAGE = {"steps": 32, "groups": 4, "group_size": 16, "length": 24, "rate": 5e-4, "tasks": SUMS}
GENERATION = {"max_tokens": 12}
CORRECTIONS = ("none", "ppo-clip", "tis", "icepop", "double-sided")
RATES = (5e-4, 2e-4)
FORMATS = ("float32", "bfloat16", "fp8", "w4a16")
ROUNDINGS = ("int3", "int2", "w4a16")
DELAY = {"mean_s": 0.3, "tail": 1.5}
OLD = ("arithmetic", "copy", "sentences")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run. labels: where it stands in its table. asks: tasks that its last checkpoint is asked, greedily.
    offline: the integer format that the checkpoint is rounded to before it is asked, "" for none. stages: none where
    nothing is learnt."""

    table: str
    labels: tuple[str, ...]
    seed: int
    stages: tuple[dict[str, Any], ...]
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    delay: dict[str, Any] = dataclasses.field(default_factory=dict)
    asks: tuple[str, ...] = ()
    offline: str = ""
    questions: int = 100

    @property
    def name(self) -> str:
        return "_".join((self.table, *self.labels, str(self.seed))).replace(" ", "-").replace("/", "-")

    @property
    def toml(self) -> str:
        """Its config."""
        tables = {"schedule": self.schedule, "generation": GENERATION | self.generation, "delay": self.delay}
        lines = [f"seed = {self.seed}", "save_every = 1000000", f"questions = {self.questions}"]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {_spelt(value)}" for key, value in table.items())]
        for stage in self.stages:
            lines += ["[[stage]]", *(f"{key} = {_spelt(value)}" for key, value in stage.items())]
        return "\n".join(lines) + "\n"


def _spelt(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_spelt(each)}" for key, each in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def modes(seed: int) -> Iterator[Cell]:
    """Who waits for whom, with an environment that takes its time and without: then in more steps, for a second process
    takes seconds to begin."""
    schedules = {"sync": {"mode": "sync"}, "ahead": {"mode": "ahead"}, "async": {"mode": "async", "staleness": 2}}
    for delayed in ("delays", "none"):
        for mode, schedule in schedules.items():
            delay = DELAY if delayed == "delays" else {}
            stage = STAGE | {"steps": 12 if delay else 60}
            yield Cell("modes", (delayed, mode), seed, (stage,), schedule, delay=delay, questions=20)


def lags(seed: int) -> Iterator[Cell]:
    """Versions behind, by what is done about it. At no lag all corrections are one, so only one is run."""
    cells = [(16, "ppo-clip", RATES[0]), (16, "none", RATES[0]), (0, "ppo-clip", RATES[0])]
    cells += [(16, how, RATES[0]) for how in ("double-sided", "tis", "icepop")] + [(0, "ppo-clip", RATES[1])]
    cells += [(16, how, RATES[1]) for how in CORRECTIONS]
    cells += [(lag, how, rate) for lag in (4, 1) for rate in RATES for how in CORRECTIONS]
    for lag, correction, rate in cells:
        stage = STAGE | {"rate": rate, "objective": {"correction": correction}}
        yield Cell("lags", (str(lag), correction, f"{rate:g}"), seed, (stage,), {"lag": lag})


def admissions(seed: int) -> Iterator[Cell]:
    """Long answers among short ones: which are trained on."""
    tasks = {"thinking": 0.5, "long-copy": 0.5}
    stage = STAGE | {"steps": 16, "length": 72, "tasks": tasks, "group_size": 8}
    for staleness in (1, 2):
        for admission in ("paced", "discard"):
            schedule = {"mode": "async", "staleness": staleness, "admission": admission}
            yield Cell(
                "admissions", (admission, str(staleness)), seed, (stage,), schedule, {"max_tokens": 24}, questions=20
            )


def formats(seed: int) -> Iterator[Cell]:
    """What the engine computes in, by what is done about the gap. Episodes are longer than what an indexer selects."""
    stage = STAGE | {"steps": 6, "length": 48, "tasks": {"long-copy": 1.0}, "group_size": 8}
    cells = [("ppo-clip", "float32", "none")]
    cells += [("ppo-clip", fmt, replay) for fmt in FORMATS[1:] for replay in ("none", "all")]
    cells += [(how, "fp8", replay) for how in ("none", "icepop") for replay in ("none", "all")]
    cells += [(how, "w4a16", replay) for how in ("none", "icepop") for replay in ("none", "all")]
    cells += [("ppo-clip", fmt, "experts") for fmt in FORMATS[1:]]
    for correction, fmt, replay in cells:
        generation = {"formats": fmt, "replay": replay, "max_tokens": 24}
        chosen = stage | {"objective": {"correction": correction}}
        yield Cell("formats", (fmt, correction, replay), seed, (chosen,), {}, generation)


def gaps(seed: int) -> Iterator[Cell]:
    """The same tokens with and without replay (`rl_gaps.py`)."""
    for fmt in FORMATS:
        for replay in ("none", "experts", "all"):
            yield Cell("gaps", (fmt, replay), seed, ())


def stages(seed: int) -> Iterator[Cell]:
    """What a second task does to what the first taught, and to what was known before."""
    sums = STAGE | {"steps": 40}
    copying = STAGE | {"steps": 24, "length": 48, "tasks": {"long-copy": 1.0}}
    asks = ("thinking", "long-copy", *OLD)
    yield Cell("stages", ("sums",), seed, (sums,), {}, {"max_tokens": 24}, asks=asks)
    for distill in (0.0, 0.02, 0.1):
        second = copying | {"objective": {"distill": distill}}
        yield Cell("stages", ("sums, copying", f"{distill:g}"), seed, (sums, second), {}, {"max_tokens": 24}, asks=asks)


def roundings(seed: int) -> Iterator[Cell]:
    """Learnt in few bits, or rounded afterwards: so many steps on right answers, and one of reinforcement."""
    stage = STAGE | {"imitate": 30, "steps": 1, "imitate_rate": 5e-4, "tasks": dict.fromkeys(OLD, 1.0), "length": 32}
    for name in ROUNDINGS:
        for how in ("offline", "learnt"):
            chosen = stage | ({"rounding": name} if how == "learnt" else {})
            yield Cell("roundings", (name, how), seed, (chosen,), asks=OLD, offline=name, questions=20)
    if seed == SEEDS[0]:  # nothing is drawn
        for name in ROUNDINGS:
            yield Cell("roundings", (name, "not taught"), seed, (), asks=OLD, offline=name)


TABLES = (gaps, lags, modes, roundings, admissions, stages, formats)
FIRST = {"gaps": 12, "lags": 3, "formats": 11, "modes": 3, "roundings": 4, "admissions": 2, "stages": 0}
"""Cells of each table that are run, for all seeds, before any other."""


def all_cells(tables: tuple[str, ...]) -> Iterator[Cell]:
    """The most telling first: all seeds of some cells of every table, then of the others."""
    for telling in (True, False):
        for table in TABLES:
            for seed in SEEDS if table.__name__ in tables else ():
                cells, first = list(table(seed)), FIRST[table.__name__]
                yield from cells[:first] if telling else cells[first:]
