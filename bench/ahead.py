"""Steps that are launched ahead, served and predicted, on a device that is made up.

    python -m bench.ahead [--rounds N] [--device-ms D ...]

The whole server answers, and a client of its own process times it, as `runtime.api.pace` has them; programs compute
nothing and take a set time, on a device that does one after another beside the host. What the server's own work takes
is measured as `glm5 calibrate` does, with programs of .7 ms; answers are then predicted with others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np

from backends.cpu import CpuBackend
from backends.interface import Capabilities
from backends.loaded import StepMade
from model.checkpoint import Checkpoint
from model.graph import Batch, Mode
from runtime.api import pace
from runtime.deployment.engines import load
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.executor import LocalExecutor
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.porting.calibrate_steps import EmptyPrograms
from runtime.serving.pricing import step_seconds, step_shape

SHORT_S, PROMPT_S = 0.7e-3, 5e-3
STREAMS = (1, 4, 8)


class Apart(CpuBackend):
    """The host as a device that works apart."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), apart=True)


class Timed(EmptyPrograms):
    """Programs that take so many seconds of a device that does one after another."""

    answers_s: float = SHORT_S
    _free_at = 0.0

    def launch(self, batch: Batch, mode: Mode, *rest: Any, **named: Any) -> StepMade:
        made = super().launch(batch, mode, *rest, **named)
        takes_s = self.answers_s if batch.tokens.shape[1] == 1 else PROMPT_S
        self._free_at = max(self._free_at, time.perf_counter()) + takes_s
        self._ends = {**getattr(self, "_ends", {}), id(made.ids): (self._free_at, made.ids)}
        return made

    def fetch(self, buffer: Any) -> np.ndarray:
        found = super().fetch(buffer)
        ends_at, _ = self._ends.pop(id(buffer), (0.0, None))
        time.sleep(max(0.0, ends_at - time.perf_counter()))
        return found


def made(answers_s: float) -> LocalEngine:
    engine = load_engine(Checkpoint(embedded_checkpoint()), Apart(), EngineConfig())
    old, config = engine.programs, engine.config
    engine.programs = Timed(old.backend, old.cfg, old.weights, old.pages, old.page_size, old.dtype)
    engine.programs.answers_s = answers_s
    engine.executor = LocalExecutor(engine.programs, config.least_batch, config.least_chunk, config.least_context)
    return engine


def served_s(engine: LocalEngine, rounds: int) -> dict[int, list[float]]:
    """Seconds from token to token, of each round, by requests at once."""
    found: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    with pace._asked(engine) as ask:
        ask(max(STREAMS), 0)
        for _ in range(rounds):
            for streams, kept in found.items():
                last = max(ask(streams, 0).came)
                if len(last) > 1:  # else the client had to wait until all was there
                    kept.append(pace._gap_s(last))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device-ms", type=float, nargs="+", default=[0.3, 1.5, 3.0, 8.0])
    options = parser.parse_args(arguments)
    with mock.patch.object(pace, "load_engine", lambda *_: made(SHORT_S)):
        cost = pace.serving_cost(Apart(), options.rounds)
    engine = load("glm5", {"ahead_step_seconds": cost.ahead_s, "row_host_seconds": cost.row_s})
    print(f"host: {cost.step_s * 1e3:.2f} ms a step and {cost.row_s * 1e3:.2f} a row")
    for device_ms in options.device_ms:
        for streams, seen in served_s(made(device_ms * 1e-3), options.rounds).items():
            shape = step_shape(engine, np.full(streams, 100))
            told, took = step_seconds(engine, device_ms * 1e-3, shape), statistics.median(seen)
            print(
                f"device {device_ms:g} ms, {streams} at once: predicted {told * 1e3:.2f}, served {took * 1e3:.2f} "
                f"({min(seen) * 1e3:.2f} to {max(seen) * 1e3:.2f}): {told / took:.2f}"
            )


if __name__ == "__main__":
    main()
