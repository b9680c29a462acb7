"""Runs a config's stages, and leaves a checkpoint.

A run folder holds the config it was given, the last good state, metrics and their plots, and at the end of every
stage a checkpoint. A batch is a function of the seed and the step, and the state is all that a step reads besides, so
a run that is killed at any step and resumed makes the same steps again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from foundation.errors import UsageError
from foundation.writing import replacing
from runtime.training import export, metrics, state, steps
from runtime.training.config import TrainConfig, TrainingStage
from runtime.training.data import TASKS, TrainingBatch
from runtime.training.forward import index_recall
from runtime.training.state import State

CHECKPOINT, _CONFIG = "checkpoint", "config.toml"
StepReport = Callable[[int, dict[str, Any]], None]  # (steps done, the step's record)


def train(
    config: TrainConfig,
    folder: Path,
    source: Path,
    resume: bool = False,
    report: StepReport = lambda step, record: None,
) -> Path:
    """Trains in `folder`; the checkpoint's path. `source` is the config's file, for the record.

    Raises `UsageError` where the folder holds a run already (unless resumed), none to resume, or one of another config,
    and where the disk does not take what is written; the last good state then stays.
    """
    if resume and not any((folder / name).exists() for name in (state.FILE, _CONFIG)):
        raise UsageError(f"--resume: {folder} holds no run; leave it out to begin one there")
    made = export.make_tokenizer(config)
    generator = export.make_generator(config, made)
    model = steps.initial_model(export.raw_config(config, made), config.seed)
    optimizers = steps.Optimizers(config, model)
    now, done = optimizers.begin(model), 0
    if (folder / state.FILE).exists():
        if not resume:
            raise UsageError(f"{folder} holds a run already; --resume continues it, another --out begins one")
        now, done = state.read(folder, now, config.hash)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _CONFIG) as temporary:
            shutil.copyfile(source, temporary)
        metrics.truncate(folder, done)
        run = _Run(config, folder, generator.batch, optimizers, report)
        if done >= config.steps:  # perhaps killed between the last state and its checkpoint
            export.write(folder / CHECKPOINT, config, now.model, made, source.name)
        while done < config.steps:
            now, done = run.stage(now, done)
            export.write(folder / CHECKPOINT, config, now.model, made, source.name)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; --resume goes on from the last state"
        ) from None
    return folder / CHECKPOINT


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        batch: Callable[..., TrainingBatch],
        optimizers: steps.Optimizers,
        report: StepReport,
    ):
        self.config, self.folder, self.report = config, folder, report
        self._batch, self._optimizers = batch, optimizers
        self._recall = jax.jit(index_recall)
        begins = np.cumsum([0, *(stage.steps for stage in config.stages)])
        self._begins = [(int(at), stage.attention) for at, stage in zip(begins, config.stages, strict=False)]

    def _make(self, step: int) -> TrainingBatch:
        stage = self.config.at(step)
        return self._batch(step, stage.rows, stage.length, stage.mix)

    def stage(self, now: State, done: int) -> tuple[State, int]:
        """From step `done` to the end of its stage."""
        stage, begin = self.config.at(done), done
        end = next(at for at in np.cumsum([s.steps for s in self.config.stages]) if at > done)
        step = steps.compile_step(stage, self._optimizers)
        window: list[tuple[TrainingBatch, dict[str, Any]]] = []
        batch, since = self._make(done), time.perf_counter()
        while done < end:
            now, parts = step(now, batch.tokens, batch.weights)
            window.append((batch, parts))
            done += 1
            if done < end:
                batch = self._make(done)  # while the device computes
            saves = done % self.config.save_every == 0 or done == end
            if done % self.config.log_every == 0 or saves:  # a resumed run begins with an empty window
                record = self._record(stage, done, window)
                elapsed = time.perf_counter() - since
                record["tokens_per_s"] = len(window) * stage.rows * stage.length / elapsed
                if stage.length > _topk(self.config):
                    record["index_recall"] = float(self._recall(now.model, window[-1][0].tokens[:4]))
                metrics.append(self.folder, record)
                self.report(done, record)
                window, since = [], time.perf_counter()
            elif begin == done - 1:
                self.report(done, {})
            if saves:
                state.write(self.folder, now, done, self.config.hash)
                metrics.page(self.folder, f"Training run {self.folder.name}", self._begins)
        return now, done

    def _record(
        self, stage: TrainingStage, step: int, window: list[tuple[TrainingBatch, dict[str, Any]]]
    ) -> dict[str, Any]:
        """What the steps of a window say: means, but the largest logit of all, and loads summed over the window."""
        parts = [{k: v for k, v in p.items()} for _, p in window]
        tasks = np.concatenate([batch.tasks for batch, _ in window])
        loss, count = (np.concatenate([np.asarray(p[key]) for p in parts]) for key in ("row_loss", "row_count"))
        loads = {name: np.sum([np.asarray(p["loads"][name]) for p in parts], axis=0) for name in parts[0]["loads"]}
        mean = {key: float(np.mean([p[key] for p in parts])) for key in ("loss", "draft_loss", "index_loss")}
        if not np.isfinite(mean["loss"]):
            raise UsageError(f"the loss is {mean['loss']} at step {step}: lower the learning rates")
        return {
            "step": step,
            "stage": stage.attention,
            **mean,
            "task_loss": {
                task: float(loss[tasks == i].sum() / max(1, count[tasks == i].sum()))
                for i, task in enumerate(TASKS)
                if (tasks == i).any()
            },
            "logit_max": float(max(np.asarray(p["logit_max"]) for p in parts)),
            "load_ratio": max((float(load.max() / load.mean()) for load in loads.values()), default=1.0),
            "load_ratios": {name: round(float(load.max() / load.mean()), 3) for name, load in loads.items()},
        }


def _topk(config: TrainConfig) -> int:
    assert config.model.indexer is not None
    return config.model.indexer.topk
