"""How many held-out questions a checkpoint answers exactly, asked through the engine on any backend.

    glm5 eval --checkpoint DIR --backend cpu

An answer counts when the generated text, up to the token that ends the turn, is the right one: for `tools` when it
parses as one call with the right name and arguments. Decoding is greedy. The questions are those of the generator
(`data.py`), in the checkpoint's own tokenizer and template; so only a checkpoint of `glm5 train` can know the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import Backend
from foundation.errors import UsageError
from foundation.limits import within
from model.checkpoint import Checkpoint, Put
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from runtime.training.data import HARDER, MOST_QUESTIONS, TASKS, Exercise, Generator

SEED, SAMPLES = 1, 100


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Right answers of those asked. `wrong` holds a few (prompt's end, answer wanted, answer given)."""

    asked: int
    right: int
    wrong: tuple[tuple[str, str, str], ...] = ()

    @property
    def exact_match(self) -> float:
        return self.right / self.asked


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores by task. `accept_length`: mean tokens a verification step gave, None without drafts. `recall_distance`:
    the fewest tokens between a fact of `recall` and the answer to its question, None where it was not asked."""

    tasks: dict[str, TaskScore]
    accept_length: float | None
    recall_distance: int | None

    def as_json(self) -> dict[str, Any]:
        return {
            "tasks": {
                name: {"asked": score.asked, "right": score.right, "exact_match": score.exact_match}
                for name, score in self.tasks.items()
            },
            "accept_length": self.accept_length,
            "recall_distance_tokens": self.recall_distance,
        }


class RandomIndexer(Checkpoint):
    """The checkpoint with indexers of random weights of the same size: what selection is worth."""

    def load(self, dtype: str = "float32", keep_fp8: bool = False, put: Put = lambda w, a: a, mtp: bool = True) -> Any:
        rng = np.random.default_rng(0)

        def swap(weight: Any, array: np.ndarray) -> Any:
            if weight.component == "indexer":
                size = float(np.std(array.astype(np.float32)))
                array = (size * rng.standard_normal(array.shape)).astype(array.dtype)
            return put(weight, array)

        return super().load(dtype, False, swap, mtp)


def engine_config(drafts: int = 0) -> EngineConfig:
    """Few, large shapes: a question set compiles two programs (three with drafts)."""
    return EngineConfig(
        pool_tokens=16 * 512, prefill_chunk=16 * 256, drafts=drafts, least_batch=16, least_chunk=256, least_context=256
    )


def evaluate(
    path: str | Path,
    backend: Backend,
    samples: int = SAMPLES,
    tasks: Sequence[str] = TASKS,
    drafts: int = 0,
    dtype: str | None = None,
    keep_fp8: bool = False,
    random_indexer: bool = False,
) -> Evaluation:
    """Asks the checkpoint at `path` `samples` questions of each of `tasks` on a backend.

    Raises `UsageError` for an unknown task, `TokenizerError` for a checkpoint without tokenizer or chat template.
    """
    within("questions a task:", samples, MOST_QUESTIONS)
    opened = RandomIndexer(path) if random_indexer else Checkpoint(path)
    engine = load_engine(opened, backend, engine_config(drafts), dtype, keep_fp8)
    return ask(engine, opened.path, samples, tasks)


def ask(engine: LocalEngine, path: Path, samples: int = SAMPLES, tasks: Sequence[str] = TASKS) -> Evaluation:
    """Asks an engine that serves the checkpoint at `path` (its tokenizer and template are used)."""
    if unknown := [task for task in tasks if task not in (*TASKS, *HARDER)]:
        raise UsageError(f"there is no task {unknown[0]!r}; there are {', '.join((*TASKS, *HARDER))}")
    if samples < 1:
        raise UsageError(f"ask at least 1 question a task, not {samples}")
    tokenizer = Tokenizer.load(path)
    generator = Generator(tokenizer, ChatTemplate.load(path))
    stops = frozenset(tokenizer.stop_token_ids)
    scores: dict[str, TaskScore] = {}
    given, steps, distance = 0, 0.0, None
    for task in tasks:
        questions = generator.questions(task, samples, SEED)
        requests = [
            Prompt(tuple(tokenizer.encode(q.prompt)), len(tokenizer.encode(q.answer)) + 4, stop_ids=stops)
            for q in questions
        ]
        completions = engine.generate(requests)
        for completion in completions:
            if completion.accept_length:
                given += len(completion.token_ids) - 1
                steps += (len(completion.token_ids) - 1) / completion.accept_length
        said = [tokenizer.decode([t for t in c.token_ids if t not in stops]) for c in completions]
        wrong = [
            (q.prompt[-60:], q.answer, text) for q, text in zip(questions, said, strict=True) if not q.is_right(text)
        ]
        scores[task] = TaskScore(samples, samples - len(wrong), tuple(wrong[:5]))
        if task == "recall":
            distance = min(_distance(tokenizer, question) for question in questions)
    return Evaluation(scores, given / steps if steps else None, distance)


def _distance(tokenizer: Tokenizer, question: Exercise) -> int:
    """Tokens from a fact to where its answer begins."""
    return len(tokenizer.encode(question.prompt)) - len(tokenizer.encode(question.prompt[: question.fact_at]))
