"""The loop of `glm5 rl` on this machine against its play: idle shares and versions behind, side by side.

    python -m bench.rl_link [--runs 3] [--steps 24] [--delay-s 0.5] [--json FILE]

Three things are measured first, none of them in the run that is compared: an engine alone (seconds of a step by answers
at work, how long answers are), a run without delays (seconds of a training step and of publishing, and how much slower
the engine is beside it), and how long loading weights takes. Then runs with an environment's delays, each with a seed
of its own, are compared with the play of the same groups and the same delays. Idle is a side's time in which it neither
computes nor moves weights. The first steps compile and are left out, and the last, which examines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.registry import usable
from model.checkpoint import Checkpoint
from model.module import Model
from runtime.execution.local.load import embedded_checkpoint
from runtime.planning.rl.load import RolloutLoad, RolloutTurn
from runtime.planning.rl.play import Publishing, RlSchedule, play
from runtime.planning.rl.played import Played
from runtime.planning.rl.replica import RolloutSide
from runtime.serving import Histogram
from runtime.training.params import named
from runtime.training.rl import config as configs
from runtime.training.rl.episodes import Questions
from runtime.training.rl.generators import asked, nested
from runtime.training.rl.rollouts import RolloutEngine
from runtime.training.rl.trainer import train

RUN_UP = 8
"""Steps in which programs are compiled."""
CONFIG = """
seed = {seed}
save_every = 100000
questions = 1

[schedule]
mode = "async"
staleness = {staleness}

[generation]
max_tokens = 24

[delay]
mean_s = {delay_s}
tail = {tail}

[[stage]]
steps = {steps}
groups = {groups}
group_size = {size}
rate = 1e-6
tasks = {{ thinking = 1.0 }}
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Shares of time, of one run or one play."""

    trainer_idle: float
    rollout_idle: float
    behind: float
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run, after its first steps: shares, and seconds of a step's parts."""

    shares: Measured
    trained_s: float
    published_s: float
    generated_s: float


class MeasuredPrices:
    """Seconds of an engine's steps, as they were measured by answers in them, times a factor."""

    mixed, prompt_tokens = False, 1 << 20

    def __init__(self, prompts: dict[int, float], tokens: dict[int, float], factor: float = 1.0):
        self._tables = [(sorted(each), [each[rows] for rows in sorted(each)]) for each in (prompts, tokens)]
        self._factor = factor

    def decode_seconds(self, rows: int, context: float) -> float:
        return float(np.interp(rows, *self._tables[1])) * self._factor

    def prompt_seconds(self, chunks: Sequence[tuple[int, int]], rows: int, context: float) -> float:
        return float(np.interp(len(chunks), *self._tables[0])) * self._factor

    def times(self, factor: float) -> MeasuredPrices:
        found = MeasuredPrices({0: 0.0}, {0: 0.0}, self._factor * factor)
        found._tables = self._tables
        return found


class _Watched(RolloutEngine):
    """Counts the tokens that a step draws."""

    drawn = 0

    def _drew(self, number: int, token: int) -> None:
        type(self).drawn += 1
        super()._drew(number, token)


def engine_alone(config: configs.RlConfig, checkpoint: Checkpoint) -> tuple[MeasuredPrices, Histogram, float]:
    """(prices, lengths of questions and answers, seconds to load weights) of an engine with nothing beside it."""
    questions = Questions.load(checkpoint.path, config.seed)
    weights = nested(named(Model.load(checkpoint.path, mtp=checkpoint.has_mtp)))
    arguments = usable("cpu"), config.generation, questions.generator.tokenizer, config.length, config.running
    engine = _Watched(checkpoint.config, weights, *arguments)
    prompts: dict[int, list[float]] = {}
    tokens: dict[int, list[float]] = {}
    lengths: list[tuple[int, int, float]] = []
    number, size = 10_000, config.stages[0].group_size
    most = max(1, config.running // size)
    counts = sorted({1, max(1, most // 4), max(1, most // 2), most})
    for lap in range(4):  # the first compiles
        for count in counts:
            begun = range(number, number + count)
            number += count
            for each in begun:
                engine.begin(dataclasses.replace(asked(config, questions, 0, each), delay_s=lambda member: 0.0))
            first = True
            while not engine.idle:
                before, busy = _Watched.drawn, engine.busy_s
                for group in engine.advance():
                    for each in group.rollouts:
                        made = int(np.sum(each.made))
                        lengths.append((len(each.ids) - made, made, 1.0))
                made, took = _Watched.drawn - before, engine.busy_s - busy
                if made and lap:
                    (prompts if first else tokens).setdefault(made, []).append(took)
                first = first and not made
    began = time.perf_counter()
    for version in range(4):
        engine.load(weights, version)
    loaded = (time.perf_counter() - began) / 4
    prices = MeasuredPrices(
        {rows: statistics.median(each) for rows, each in prompts.items()},
        {rows: statistics.median(each) for rows, each in tokens.items()},
    )
    return prices, Histogram(tuple(lengths)), loaded


def ran(text: str, checkpoint: Checkpoint) -> Ran:
    """Runs a config's text in a folder of its own."""
    times: list[float] = []
    records: list[dict[str, Any]] = []

    def report(step: int, record: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        records.append(record)

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "link.toml"
        source.write_text(text)
        train(configs.read(source), checkpoint, usable("cpu"), Path(folder) / "run", source, report=report)
    inside = records[RUN_UP:-1]
    seconds = times[-2] - times[RUN_UP - 1]
    waited, trained = (sum(each[key] for each in inside) for key in ("waited_s", "trained_s"))
    generated = sum(each["generated_s"] for each in inside)
    count = len(inside)
    behind = sum(each["behind"] * each["drawn_tokens"] for each in inside) / sum(e["drawn_tokens"] for e in inside)
    return Ran(
        Measured(waited / seconds, 1 - generated / seconds, behind, seconds / count),
        trained / count,
        (seconds - waited - trained) / count,
        generated / count,
    )


@dataclasses.dataclass(frozen=True)
class GivenDelays(RolloutLoad):
    """With the delays that the run's environments had."""

    questions: Any = None
    delayed: Any = None

    def group(self, number: int, seed: int = 0) -> tuple[tuple[RolloutTurn, ...], ...]:
        return tuple(
            (dataclasses.replace(turns[0], delay_s=self.questions.delay_s(0, number, member, self.delayed)),)
            for member, turns in enumerate(super().group(number, seed))
        )


def played(
    config: configs.RlConfig,
    checkpoint: Checkpoint,
    lengths: Histogram,
    prices: MeasuredPrices,
    trained_s: float,
    sync: Publishing,
) -> Played:
    """The same steps on the virtual clock."""
    stage = config.stages[0]
    questions = Questions.load(checkpoint.path, config.seed)
    load = GivenDelays(
        stage.groups, stage.group_size, lengths, None, most=config.length, questions=questions, delayed=config.delay
    )
    pool = config.running * (config.length + 64)
    side = RolloutSide(1, 1, pool, config.running, prices, reuse=False)
    schedule = RlSchedule(config.schedule.behind, config.schedule.admission)
    steps = stage.steps - RUN_UP - 1
    return play(load, side, lambda tokens: trained_s, sync, schedule, steps, RUN_UP, seed=config.seed)


def _of_play(got: Played) -> Measured:
    idle = 1 - got.rollout_busy_s / got.seconds  # the run counts loading as idle, too
    return Measured(got.trainer_idle, idle, got.mean_behind, got.step_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--delay-s", type=float, default=0.5)
    parser.add_argument("--tail", type=float, default=1.5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    checkpoint = Checkpoint(embedded_checkpoint())

    def text(seed: int, delay_s: float) -> str:
        return CONFIG.format(
            seed=seed, delay_s=delay_s, tail=given.tail, steps=given.steps + RUN_UP + 1, groups=given.groups,
            size=given.size, staleness=given.staleness,
        )  # fmt: skip

    def read(said: str) -> configs.RlConfig:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(said)
            file.flush()
            return configs.read(file.name)

    quiet = read(text(1000, 0.0))
    prices, lengths, loaded = engine_alone(quiet, checkpoint)
    calibration = ran(text(1000, 0.0), checkpoint)
    trained, sync = calibration.trained_s, Publishing(calibration.published_s, loaded)
    alone = played(quiet, checkpoint, lengths, prices, trained, sync)
    slower = calibration.generated_s / (alone.rollout_busy_s / len(alone.steps))
    prices = prices.times(slower)
    print(
        f"calibration: a training step {trained * 1e3:.0f} ms, publishing {calibration.published_s * 1e3:.0f} ms, "
        f"loading {loaded * 1e3:.0f} ms, engine {slower:.2f} x as slow beside it; "
        f"load of the machine {os.getloadavg()[0]:.1f}"
    )
    rows = [("calibration", calibration.shares, _of_play(played(quiet, checkpoint, lengths, prices, trained, sync)))]
    for seed in range(given.runs):
        said = text(seed, given.delay_s)
        got = ran(said, checkpoint)
        config = read(said)
        rows.append((f"seed {seed}", got.shares, _of_play(played(config, checkpoint, lengths, prices, trained, sync))))
        _print(rows[-1:])
    print("medians over seeds, run and play:")
    _print([rows[0], ("median", _median([run for _, run, _ in rows[1:]]), _median([got for *_, got in rows[1:]]))])
    if given.json:
        content = [{"name": n, "run": dataclasses.asdict(a), "play": dataclasses.asdict(b)} for n, a, b in rows]
        given.json.write_text(json.dumps(content, indent=1))


def _median(found: Sequence[Measured]) -> Measured:
    return Measured(*(statistics.median(column) for column in zip(*map(dataclasses.astuple, found), strict=True)))


def _print(rows: Sequence[tuple[str, Measured, Measured]]) -> None:
    for name, run, of_play in rows:
        pairs = zip(dataclasses.asdict(run).items(), dataclasses.astuple(of_play), strict=True)
        print(f"{name:12}", "  ".join(f"{key} {a:.3f} {b:.3f} ({b / a - 1:+.0%})" for (key, a), b in pairs), flush=True)


if __name__ == "__main__":
    main()
