"""The project's own engine as a generator of rollouts.

The scheduler of `runtime/serving/` runs answers over the programs of one device. Groups begin while others are at work;
between two steps the weights may change without a restart: an answer then goes on with the cache that the policy before
made, and each token says which version drew it. In number formats other than float32 and bfloat16 the engine computes
as a chip does (`backends/emulation`): that is the gap between a rollout engine and a trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from backends.emulation.backend import EmulatedDevices
from backends.emulation.number_formats import NumberFormats
from backends.interface import Backend
from foundation.errors import UsageError
from model.checkpoint import Group as CheckpointGroup
from model.checkpoint import groups, held_type
from model.config import ModelConfig
from model.formats import CacheFormats, Formats, scheme
from model.tokenizer import Tokenizer
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.programs import Programs
from runtime.serving import Request
from runtime.serving.answer import Answer
from runtime.serving.clock import Wall
from runtime.serving.loop import Loop
from runtime.serving.request import check_positions
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from runtime.serving.worker import ModelWorker, News
from runtime.training.data import Exercise
from runtime.training.rl.config import Generation
from runtime.training.rl.episodes import Choices, Episode, Rollout, RolloutGroup
from runtime.training.rl.replay import RecordingPrograms, RecordingWorker

_CHUNK = 16  # tokens that prompts are padded to
PolicyWeights = Mapping[str, Any]
"""As `model.module.Model.weights` has them."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A group to generate: `size` answers to an exercise, each of `longest` tokens at most, its question's among them.
    seeds: of the generator that a member draws a turn with. delay_s: what a member's environment takes over its answer.
    temperature: 1 draws as the policy says, 0 is greedy."""

    number: int
    exercise: Exercise
    size: int
    longest: int
    seeds: Callable[[int, int], Sequence[int]]
    delay_s: Callable[[int], float] = lambda member: 0.0
    temperature: float = 1.0


@dataclasses.dataclass(slots=True)
class _Work:
    """A member of a group at work. versions, logprobs: of the tokens of this turn. chosen: as of `replay`, of the whole
    episode, -1 where nothing was."""

    asked: Asked
    member: int
    episode: Episode
    versions: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    chosen: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> Rollout:
        found, length = self.episode.done, len(self.episode.ids)
        choices = {name: Choices.of(ids[:, :length]) for name, ids in self.chosen.items()}
        return dataclasses.replace(found, choices=choices)


class RolloutEngine:
    """Generates groups. version: of the policy that draws now. busy_s: seconds that steps took, compiling left out.

    longest: tokens of an episode at most; running: answers at work at once. Raises `UsageError` for what the model
    cannot serve.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: PolicyWeights,
        backend: Backend,
        generation: Generation,
        tokenizer: Tokenizer,
        longest: int,
        running: int,
    ):
        check_positions(longest, 0, cfg.max_positions)
        self._cfg, self._generation, self._tokenizer = cfg, generation, tokenizer
        self._numbers = _numbers(cfg, generation.formats)
        self._backend = EmulatedDevices(self._numbers) if self._numbers else backend
        config = EngineConfig(max_running=running, prefix_cache=False)
        page = config.described.page_tokens
        config = dataclasses.replace(
            config,
            pool_tokens=running * -(-(longest + 1) // page) * page,
            prefill_chunk=max(running * _CHUNK, longest),
            least_batch=-(-running // 4),
            least_chunk=_CHUNK,
            least_context=longest,
        )
        dtype = self._numbers.dtype if self._numbers else generation.formats
        self._dtype = dtype
        given = self._backend, cfg, self._held(weights), config.pages, page, dtype
        records = generation.replay != "none"
        programs = RecordingPrograms(generation.replay, *given) if records else Programs(*given)
        self._engine = LocalEngine(cfg, programs, config)
        self.version = 0
        self.busy_s = 0.0
        self._answers: dict[Request, Answer] = {}
        self._works: dict[int, _Work] = {}
        self._numbered = 0
        self._groups: dict[int, dict[int, Rollout]] = {}
        self._outside: list[tuple[float, int, _Work]] = []
        """A heap: those whose environments are not through before that time on the wall."""
        self._loop = Loop(
            self._engine.deployment,
            block_tokens=page,
            clock=Wall(lambda: programs.compile_s),
            make_worker=lambda role: self._worker(programs),
            done=self._answers.__delitem__,
            tell=self._heard,
        )

    @property
    def compile_s(self) -> float:
        return self._engine.programs.compile_s

    @property
    def idle(self) -> bool:
        """Nothing is asked any more."""
        return not self._groups

    def load(self, weights: PolicyWeights, version: int) -> None:
        """The next policy, from the next step on."""
        self._engine.programs.weights = self._held(weights)
        self.version = version

    @contextlib.contextmanager
    def lent(self, weights: PolicyWeights, version: int) -> Iterator[None]:
        """Another policy for a while, where nothing is asked; then the one that was there again."""
        before = self._engine.programs.weights, self.version
        self.load(weights, version)
        try:
            yield
        finally:
            self._engine.programs.weights, self.version = before

    def begin(self, asked: Asked) -> None:
        """Raises `UsageError` for a question that leaves no room to answer."""
        prompt = Episode(asked.exercise, self._tokenizer)
        if len(prompt.ids) >= asked.longest:
            raise UsageError(
                f"a question of `{asked.exercise.task}` has {len(prompt.ids)} tokens: raise the stage's `length`, "
                f"{asked.longest}, which holds question and answer"
            )
        self._groups[asked.number] = {}
        for member in range(asked.size):
            self._send(_Work(asked, member, prompt.copy()))

    def advance(self, most_s: float = 0.1) -> list[RolloutGroup]:
        """One step of the scheduler, and the groups that are whole by now; where only environments are at work, waits
        for the first, `most_s` at most."""
        if self._loop.next_at is not None:
            began, compiled = time.perf_counter(), self.compile_s
            self._loop.advance()
            self.busy_s += time.perf_counter() - began - (self.compile_s - compiled)
        elif self._outside:
            time.sleep(min(most_s, max(0.0, self._outside[0][0] - time.perf_counter())))
        whole = []
        while self._outside and self._outside[0][0] <= time.perf_counter():
            work = heapq.heappop(self._outside)[2]
            number, found = work.asked.number, self._groups[work.asked.number]
            found[work.member] = work.done
            if len(found) == work.asked.size:
                del self._groups[number]
                whole.append(RolloutGroup(number, tuple(found[member] for member in range(work.asked.size))))
        return whole

    def generate(self, asked: Sequence[Asked]) -> list[RolloutGroup]:
        """All of these, in their order."""
        for each in asked:
            self.begin(each)
        found: dict[int, RolloutGroup] = {}
        while not self.idle:
            found |= {group.number: group for group in self.advance()}
        return [found[each.number] for each in asked]

    def _send(self, work: _Work) -> None:
        """A turn of an episode begins."""
        ids, asked = work.episode.ids, work.asked
        job = Job(
            tuple(ids),
            min(self._generation.max_tokens, asked.longest - len(ids)),
            Sampling(asked.temperature),
            frozenset(self._tokenizer.stop_token_ids),
            logprobs=0,
        )
        self._numbered += 1
        request = Request(self._numbered, len(job.prompt_ids), job.max_tokens)
        self._answers[request] = Answer(job, self._numbered, asked.seeds(work.member, work.episode.turn))
        self._works[self._numbered] = work
        work.versions, work.logprobs = [], []
        self._loop.at(max(self._loop.now, self._loop.clock.now()), 0, self._loop.send, request)

    def _worker(self, programs: Programs) -> ModelWorker:
        given = self._engine.executor, self._answers, {}, 0, self._drew
        if isinstance(programs, RecordingPrograms):
            return RecordingWorker(programs, self._chose, *given)
        return ModelWorker(*given)

    def _chose(self, number: int, start: int, choices: Mapping[str, np.ndarray]) -> None:
        """What is computed a second time, as a turn behind another is, keeps the choices of the first."""
        work = self._works[number]
        for name, ids in choices.items():
            layers, count, width = ids.shape
            if name not in work.chosen:
                work.chosen[name] = np.full((layers, work.asked.longest, width), -1, np.int16)
            into = work.chosen[name][:, start : start + count]
            into[:] = np.where(into < 0, ids, into)

    def _drew(self, number: int, token: int) -> None:
        self._works[number].versions.append(self.version)

    def _heard(self, news: News) -> None:
        for answer, update in news:
            work = self._works[answer.number]
            work.logprobs += [each.logprob for each in update.logprobs]
            if update.finish is None:
                continue
            del self._works[answer.number]
            drawn = answer.tokens[len(answer.job.prompt_ids) :]
            goes_on = work.episode.say(drawn, work.logprobs, work.versions, update.finish)
            if goes_on and len(work.episode.ids) < work.asked.longest:
                self._send(work)
            else:
                due = time.perf_counter() + work.asked.delay_s(work.member)
                heapq.heappush(self._outside, (due, answer.number, work))

    def _held(self, weights: PolicyWeights) -> dict[str, Any]:
        """The main stack's weights as the engine computes with them."""
        numbers, offered = self._numbers, self._backend.capabilities()

        def of(group: CheckpointGroup, arrays: Mapping[str, Any]) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for weight in group.weights:
                array = arrays[weight.name]
                if numbers is not None:
                    array = numbers.weight(weight, np.asarray(array))
                else:
                    array = array.astype(held_type(weight, self._dtype))
                made[weight.name] = jax.tree.map(partial(self._backend.put, order=offered.order(weight)), array)
            return made

        found = groups(self._cfg, mtp=False)
        return {
            "outer": of(found["outer"][0], weights["outer"]),
            "layers": [of(group, arrays) for group, arrays in zip(found["layers"], weights["layers"], strict=True)],
            "mtp": [],
        }


def _numbers(cfg: ModelConfig, formats: str) -> NumberFormats | None:
    """The formats that are emulated; None for a plain type."""
    if formats in ("float32", "bfloat16"):
        return None
    found = scheme(formats)
    return NumberFormats(cfg, Formats(found.dense, found.experts, found.wide, CacheFormats.plain(found.wide)))
