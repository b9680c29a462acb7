"""Who generates. `Here` does so in this process, as it is waited for; `Apart` has a process of its own for it, at work
while this one trains.

A policy goes to the other process through one file, replaced whole, that names its version; what it is told and what it
tells are lines of JSON. A process that was lost is replaced, and what it was at work on is asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from foundation.errors import UsageError
from foundation.reading import Unreadable, parse_json
from runtime.deployment.document import validated
from runtime.training.rl.config import RlConfig
from runtime.training.rl.episodes import Questions, RolloutGroup
from runtime.training.rl.rollouts import Asked, RolloutEngine
from runtime.training.state import write_arrays

POLICY, LOG = "policy.safetensors", "rollouts.log"
Arrays = Mapping[str, Any]
"""A policy: its parameters by name, as of `params.named`."""


class GeneratorLost(RuntimeError):
    """The process that generates has ended by itself."""


class RolloutSource(Protocol):
    """Makes the groups of a stage by number. busy_s: seconds that it drew tokens for so far."""

    @property
    def busy_s(self) -> float: ...

    def publish(self, policy: Arrays, version: int) -> None:
        """The policy that is generated with from now on."""
        ...

    def begin(self, stage: int, numbers: Iterable[int]) -> None: ...

    def wait(self) -> list[RolloutGroup]:
        """Groups that are whole, one at least. Raises `GeneratorLost`."""
        ...

    def close(self) -> None: ...


def asked(config: RlConfig, questions: Questions, stage: int, number: int) -> Asked:
    """What a group of a stage asks of an engine."""
    of = config.stages[stage]
    return Asked(
        number,
        questions.of(stage, number, of.tasks),
        of.group_size,
        of.length,
        seeds=lambda member, turn: questions.draw_seed(stage, number, member, turn),
        delay_s=lambda member: questions.delay_s(stage, number, member, config.delay),
    )


def nested(policy: Arrays) -> dict[str, Any]:
    """Parameters by name as an engine's weights: "layers.0.q_b" at ["layers"][0]["q_b"]. The MTP layer is left out."""
    found: dict[str, Any] = {"outer": {}, "layers": {}}
    for name, array in policy.items():
        place, *rest = name.split(".")
        if place == "outer":
            found["outer"][rest[0]] = array
        elif place == "layers":
            found["layers"].setdefault(int(rest[0]), {})[rest[1]] = array
    return {"outer": found["outer"], "layers": [found["layers"][i] for i in sorted(found["layers"])]}


class Here:
    """Generates with `engine`, while it is waited for."""

    def __init__(self, engine: RolloutEngine, config: RlConfig, questions: Questions):
        self.engine, self._config, self._questions = engine, config, questions

    @property
    def busy_s(self) -> float:
        return self.engine.busy_s

    def publish(self, policy: Arrays, version: int) -> None:
        self.engine.load(nested(policy), version)

    def begin(self, stage: int, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.engine.begin(asked(self._config, self._questions, stage, number))

    def wait(self) -> list[RolloutGroup]:
        while True:
            if whole := self.engine.advance():
                return whole

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Told:
    """A line of the other process."""

    group: RolloutGroup | None = None
    busy_s: float = 0.0


class Apart:
    """Has a process generate. folder: of the run, which holds its config. checkpoint: whose tokenizer and shape."""

    def __init__(self, folder: Path, checkpoint: Path, backend: str):
        self._folder, self._checkpoint, self._backend = folder, checkpoint, backend
        self.busy_s = self._before_s = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def publish(self, policy: Arrays, version: int) -> None:
        arrays = {name: np.asarray(array) for name, array in policy.items()}
        write_arrays(self._folder / POLICY, arrays, {"version": str(version)})
        if self._process is not None:
            self._tell({"policy": version})

    def begin(self, stage: int, numbers: Iterable[int]) -> None:
        if self._process is None:
            self._start()
        self._tell({"stage": stage, "begin": list(numbers)})

    def wait(self) -> list[RolloutGroup]:
        while True:
            line = self._lines.get()
            if line is None:
                self._end()
                raise GeneratorLost
            told = _told(line)
            self.busy_s = self._before_s + told.busy_s
            if told.group is not None:
                return [told.group]

    def close(self) -> None:
        self._end()

    def _start(self) -> None:
        command = [sys.executable, "-m", "runtime.training.rl.process", str(self._folder), str(self._checkpoint)]
        with (self._folder / LOG).open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, self._backend],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            )  # fmt: skip
        self._lines = queue.Queue()
        self._before_s = self.busy_s
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()

    def _tell(self, what: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which `wait` finds
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # of what was still to be told
                    pipe.close()


def _pump(pipe: Any, into: queue.Queue[str | None]) -> None:
    for line in pipe:
        into.put(line)
    into.put(None)


def _told(line: str) -> _Told:
    try:
        return validated(_Told, parse_json(line), UsageError, "the generating process")
    except Unreadable as error:
        raise UsageError(f"the generating process said what is no JSON ({error})") from None


def told(group: RolloutGroup | None, engine: RolloutEngine) -> str:
    """A line for `Apart`."""
    return json.dumps(dataclasses.asdict(_Told(group, engine.busy_s)))
