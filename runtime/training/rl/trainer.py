"""The loop: generate, train, publish; what it leaves in its folder, and how it goes on after a kill.

A run folder holds the config, the last good state, metrics with their plots, and at the end of every stage a
checkpoint. In `sync` mode a step is a function of the state before it, so a run that is killed anywhere and resumed
ends in the same files as one that was not. In the other modes what was being generated is asked anew, under numbers
that no step before had: nothing is trained twice.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from backends.interface import Backend
from foundation.errors import UsageError
from foundation.writing import replacing
from model.checkpoint import Checkpoint
from model.module import Model
from runtime.serving.pacing import Pacer
from runtime.training import metrics, state
from runtime.training.export import write_tuned
from runtime.training.params import Params, named
from runtime.training.rl import learner, replay
from runtime.training.rl.config import FILE, Generation, PolicyObjective, RlConfig
from runtime.training.rl.episodes import Questions, RolloutGroup
from runtime.training.rl.generators import Apart, GeneratorLost, Here, RolloutSource, nested
from runtime.training.rl.learner import LearnerState
from runtime.training.rl.objective import LearnerBatch, batch, row_length
from runtime.training.rl.rollouts import Asked, RolloutEngine
from runtime.training.trainer import StepReport

CHECKPOINT = "checkpoint"
MOST_LOST = 3
"""Processes that end one after another before a group comes from one."""
_IMITATES = PolicyObjective(correction="none")


class _Saved(NamedTuple):
    """A state file's fields. begun: groups of the stage that have begun, so that no number is given twice."""

    model: Model
    moments: Any
    teacher: Params
    past: tuple[Params, ...]
    begun: np.ndarray


def train(
    config: RlConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    folder: Path,
    source: Path,
    resume: bool = False,
    report: StepReport = lambda step, record: None,
) -> Path:
    """Trains the checkpoint in `folder`; the path of what came of it. `source`: the config's file.

    Raises `UsageError` where the folder holds a run already (unless resumed), none to resume, or one of another config.
    """
    there = (folder / state.FILE).exists()
    if resume and not there and not (folder / FILE).exists():
        raise UsageError(f"--resume: {folder} holds no run; leave it out to begin one there")
    if there and not resume:
        raise UsageError(f"{folder} holds a run already; --resume continues it, another --out begins one")
    model = Model.load(checkpoint.path, mtp=checkpoint.has_mtp)
    if model.config.indexer is None:
        raise UsageError(f"{checkpoint.path}: learning is for models with an indexer (`glm_moe_dsa`)")
    questions = Questions.load(checkpoint.path, config.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as temporary:
            shutil.copyfile(source, temporary)
        run = _Run(config, checkpoint, backend, folder, questions, model, report)
        try:
            return run.go()
        finally:
            run.close()
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; --resume goes on from the last state"
        ) from None


class _Run:
    def __init__(
        self,
        config: RlConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        folder: Path,
        questions: Questions,
        model: Model,
        report: StepReport,
    ):
        self.config, self.checkpoint, self.folder, self.questions, self.report = (
            config, checkpoint, folder, questions, report,
        )  # fmt: skip
        self._backend = backend
        self._done = state.step_of(folder)
        if self._done > config.steps:
            raise UsageError(f"{folder} holds a run of another config; give its config, or another --out")
        number, _ = config.at(min(self._done, config.steps - 1))
        self._now, self._begun = self._begin(model, number), 0
        if (folder / state.FILE).exists():
            saved, self._done = state.read(folder, self._saved, config.hash)
            self._now = LearnerState(saved.model, saved.moments, saved.teacher, saved.past)
            self._begun = int(saved.begun)
        metrics.truncate(folder, self._done)
        self._exam: RolloutEngine | None = None
        self._source: RolloutSource | None = None
        self._lost = 0

    @property
    def _saved(self) -> _Saved:
        now = self._now
        return _Saved(now.model, now.moments, now.teacher, now.past, np.asarray(self._begun, np.int64))

    def _begin(self, model: Model, number: int) -> LearnerState:
        return learner.begin(model, self.config.stages[number], self.config.schedule.lag)

    # --- generation

    def _engine(self, generation: Generation, running: int) -> RolloutEngine:
        return RolloutEngine(
            self._now.model.config,
            nested(named(self._now.model)),
            self._backend,
            generation,
            self.questions.generator.tokenizer,
            self.config.length,
            running,
        )

    @property
    def _generates(self) -> RolloutSource:
        if self._source is None:
            self._source = self._make_source()
        return self._source

    def _make_source(self) -> RolloutSource:
        if self.config.schedule.mode == "sync":
            return Here(self._engine(self.config.generation, self.config.running), self.config, self.questions)
        return Apart(self.folder, self.checkpoint.path, self._backend.name)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    def _publish(self, made: int) -> None:
        """The policy to generate with. made: steps that the stage has made on what was generated."""
        params = {**named(self._now.model), **learner.behind(self._now)}
        self._generates.publish(params, self._done - min(made, self.config.schedule.lag))

    def _collect(self, stage: int, pacer: Pacer, first: int, whole: dict[int, RolloutGroup]) -> None:
        """Waits until some groups more are whole."""
        try:
            found = self._generates.wait()
        except GeneratorLost:
            self._lost += 1
            if self._lost == MOST_LOST:
                raise UsageError(
                    f"the process that generates ended {MOST_LOST} times in a row: see {self.folder / 'rollouts.log'}"
                ) from None
            self._generates.begin(stage, [first + number for number in pacer.again()])
            return
        self._lost = 0
        for group in found:
            pacer.finish(group.number - first)
            whole[group.number - first] = group

    # --- stages

    def go(self) -> Path:
        """All that is left; the checkpoint."""
        number, within = self.config.at(self._done)
        if not self._done and not metrics.load(self.folder):  # what it knows before it learns
            metrics.append(self.folder, {"step": 0, "stage": 1, "held_out": self._examine(number)})
        while number < len(self.config.stages):
            self._stage(number, within)
            number, within = number + 1, 0
            self._write_checkpoint()
        if not (self.folder / CHECKPOINT).exists():  # killed between the last state and its checkpoint
            self._write_checkpoint()
        return self.folder / CHECKPOINT

    def _write_checkpoint(self) -> None:
        write_tuned(self.folder / CHECKPOINT, self._now.model, self.checkpoint.path)

    def _stage(self, number: int, within: int) -> None:
        stage = self.config.stages[number]
        if within < stage.imitate:
            self._imitate(number, within)
            within = stage.imitate
        how, size, schedule = stage.objective, stage.groups, self.config.schedule
        optimizer = learner.adam(learner.rates(stage), stage)
        pacer = Pacer(size, (stage.all_steps - within) * size, schedule.behind, schedule.admission)
        replayed = replay.widths(self._now.model.config, self.config.generation.replay, stage.length)
        first, steps = self._begun, dict[int, Any]()
        whole: dict[int, RolloutGroup] = {}
        self._publish(within - stage.imitate)
        while not pacer.done:
            began, busy = time.perf_counter(), self._generates.busy_s
            self._start(number, pacer, first)
            while (taken := pacer.take()) is None:
                self._collect(number, pacer, first, whole)
                self._start(number, pacer, first)
            groups = [whole.pop(each) for each in taken.groups]
            waited, compiled = time.perf_counter() - began, 0.0
            length = row_length(groups, stage.length)
            given = batch(groups, length, how.scale, replayed)
            if length not in steps:
                steps[length], compiled = self._compiled(number, how, optimizer, given)
            at = time.perf_counter()
            self._now, said = steps[length](self._now, given)
            record = {
                "stage": number + 1,
                **{key: float(value) for key, value in said.items()},
                **_told(groups, self._done),
                "thrown_away": pacer.thrown_away,
                "waited_s": waited,
                "trained_s": time.perf_counter() - at,
                "compiled_s": compiled,
            }
            self._done += 1
            within += 1
            if not pacer.done:
                self._publish(within - stage.imitate)
            record["generated_s"] = self._generates.busy_s - busy
            self._move_on()
            self._record(number, record)

    def _start(self, number: int, pacer: Pacer, first: int) -> None:
        if fresh := pacer.begin():
            self._generates.begin(number, [first + each for each in fresh])
            self._begun = first + fresh.stop

    def _move_on(self) -> None:
        """Where the next step is of another sort, the state that it begins with: moments are anew, and after a cold
        start the teacher stays."""
        number, within = self.config.at(self._done)
        if number == len(self.config.stages):
            return
        if within == 0:
            self._now, self._begun = self._begin(self._now.model, number), 0
        elif within == self.config.stages[number].imitate:
            self._now = self._begin(self._now.model, number)._replace(teacher=self._now.teacher)

    def _compiled(self, number: int, how: PolicyObjective, optimizer: Any, given: LearnerBatch) -> tuple[Any, float]:
        began = time.perf_counter()
        step = (
            learner.compile_step(how, optimizer, self.config.stages[number].rounding).lower(self._now, given).compile()
        )  # type: ignore[attr-defined]
        return step, time.perf_counter() - began

    def _imitate(self, number: int, within: int) -> None:
        stage, step = self.config.stages[number], None
        optimizer = learner.adam(optax.constant_schedule(stage.imitate_rate), stage)
        while within < stage.imitate:
            rows = range(within * stage.groups * stage.group_size, (within + 1) * stage.groups * stage.group_size)
            right = [self.questions.right(self.questions.of(number, row, stage.tasks, imitated=True)) for row in rows]
            groups = [RolloutGroup(row, (each,)) for row, each in zip(rows, right, strict=True)]
            given = batch(groups, stage.length, False)._replace(advantages=np.ones(len(groups), np.float32))
            if step is None:
                step, _ = self._compiled(number, _IMITATES, optimizer, given)
            self._now, said = step(self._now, given)
            within += 1
            self._done += 1
            self._move_on()
            self._record(number, {"stage": number + 1, "imitates": True, "loss": float(said["loss"])})

    # --- records

    def _record(self, number: int, record: dict[str, Any]) -> None:
        if not np.isfinite(record["loss"]):
            raise UsageError(f"the loss is {record['loss']} at step {self._done}: lower the stage's rate")
        config, record = self.config, {"step": self._done, **record}
        last = config.at(self._done)[1] == 0
        if last or (config.eval_every and self._done % config.eval_every == 0):
            record["held_out"] = self._examine(number)
        metrics.append(self.folder, record)
        self.report(self._done, record)
        if last or self._done % config.save_every == 0:
            state.write(self.folder, self._saved, self._done, config.hash)
            metrics.learning_page(self.folder, f"Learning run {self.folder.name}")

    def _examine(self, number: int) -> dict[str, float]:
        """Share of held-out questions answered right, greedily, in float32."""
        stage, found = self.config.stages[number], {}
        with self._examiner.lent(nested(named(self._now.model)), self._done):
            for task in sorted(task for task, share in stage.tasks.items() if share > 0):
                questions = self.questions.generator.questions(task, self.config.questions)
                groups = self._examiner.generate(
                    [
                        Asked(i, question, 1, stage.length, lambda member, turn: (0,), temperature=0.0)
                        for i, question in enumerate(questions)
                    ]
                )
                found[task] = float(np.mean([group.rewards[0] for group in groups]))
        return found

    @property
    def _examiner(self) -> RolloutEngine:
        """An engine that has nothing to do and computes in float32: the one that generates, where it is such a one."""
        if isinstance(self._generates, Here) and self.config.generation.formats == "float32":
            return self._generates.engine
        if self._exam is None:
            generation = Generation("float32", self.config.generation.max_tokens)
            self._exam = self._engine(generation, min(64, self.config.questions))
        return self._exam


def _told(groups: list[RolloutGroup], step: int) -> dict[str, Any]:
    """What a batch says of itself."""
    rollouts = [each for group in groups for each in group.rollouts]
    drawn = np.concatenate([np.array(each.versions)[np.array(each.made)] for each in rollouts])
    by_task: dict[str, list[float]] = {}
    for each in rollouts:
        by_task.setdefault(each.task, []).append(each.reward)
    return {
        "reward": float(np.mean([each.reward for each in rollouts])),
        "task_reward": {task: float(np.mean(found)) for task, found in sorted(by_task.items())},
        "mixed": float(np.mean([len(set(group.rewards)) > 1 for group in groups])),
        "behind": float(np.mean(step - drawn)),
        "behind_most": int(np.max(step - drawn)),
        "answers": len(rollouts),
        "drawn_tokens": len(drawn),
        "answer_tokens": np.percentile([sum(each.made) for each in rollouts], (10, 50, 90)).tolist(),
        "cut_short": float(np.mean([each.finish == "length" for each in rollouts])),
    }
