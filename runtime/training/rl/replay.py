"""Choices that the engine made, recorded with the tokens and made again in training (routing replay, R3, and the same
for the indexers' selections).

A router or an indexer that computes in another number format, or in another order of additions, chooses another expert
or position for some tokens, and a discrete choice that differs moves a log-probability by more than any rounding. What
is replayed is which experts and positions; how they are weighed is computed by the policy that learns, so that routers
still learn. A selection replays as a set. Where nothing was recorded (a last token, padding) the learner chooses.

    experts     of every layer that routes, best first, [layers,tokens,top_k]
    selections  of every layer with an indexer of its own, [layers,tokens,topk]; none where all positions are attended
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from backends.loaded import StepMade
from model import choosing, graph, ops
from model.config import ModelConfig
from model.graph import Batch, Mode
from runtime.execution.local.programs import Programs, ProgramShape
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.worker import ModelWorker
from runtime.training.rl.config import Replay

_OPS = {"experts": "glm.route", "selections": "glm.select_topk"}
RECORDED: Mapping[Replay, tuple[str, ...]] = {"none": (), "experts": ("experts",), "all": ("experts", "selections")}

OnChoice = Callable[[int, int, Mapping[str, np.ndarray]], None]
"""Told what was chosen for tokens of an answer: its number, the position of the first, int32 [layers,tokens,width]."""


def widths(cfg: ModelConfig, replay: Replay, length: int) -> dict[str, tuple[int, int]]:
    """(layers, width) of what is replayed in episodes of `length` tokens."""
    found = {}
    if cfg.moe is not None:
        found["experts"] = sum(kind.ffn == "moe" for kind in cfg.layers), cfg.moe.top_k
    if cfg.indexer is not None and length > cfg.indexer.topk:
        found["selections"] = sum(kind.indexer == "full" for kind in cfg.layers), cfg.indexer.topk
    return {name: found[name] for name in RECORDED[replay] if name in found}


class RecordingPrograms(Programs):
    """Programs that also say what was chosen. launches: since it was last emptied, tokens of each row [b], and choices
    [layers,b,t,width]."""

    def __init__(self, replay: Replay, *given: Any):
        super().__init__(*given)
        self.replay: Replay = replay
        self.apart = False  # what was chosen is looked at behind every launch
        self.launches: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def launch(
        self, batch: Batch, mode: Mode, choices: Any = None, previous: Any = None, logprobs: Any = None
    ) -> StepMade:
        with self._room():
            name = f"step, {self.replay} recorded"
            (out, ids), chosen = self._run(name, self._recorded, batch, mode, self.weights, self.caches, batch)
            self.caches = out.caches
            got = {
                name: np.stack([self.backend.get(ids).reshape(*batch.tokens.shape, -1) for ids in each])
                for name, each in chosen.items()
                if each
            }
            self.launches.append((batch.length, got))
            return StepMade(out.logits, ids, out.hidden)

    def _recorded(
        self, shape: ProgramShape, weights: Any, caches: Any, batch: Batch
    ) -> tuple[tuple[graph.StepOutput, Any], dict[str, list[Any]]]:
        chosen: dict[str, list[Any]] = {name: [] for name in RECORDED[self.replay]}

        def keep(name: str, op: Any, *operands: Any, **attributes: Any) -> Any:
            made = op(*operands, **attributes)
            chosen[name].append(made[0] if isinstance(made, tuple) else made)  # as it is: a backend settles its form
            return made

        bound = {"experts": ops.route, "selections": ops.select_topk}
        lowerings = {_OPS[name]: partial(keep, name, bound[name]) for name in chosen}
        run = ops.substitute(
            lambda weights, caches, batch: graph.step(self.cfg, weights, caches, batch, shape.mode), lowerings
        )
        out = run(weights, caches, batch)
        return (out, choosing.greedy(out.logits)), chosen


class RecordingWorker(ModelWorker):
    """Tells what was chosen for which answer's tokens."""

    def __init__(self, programs: RecordingPrograms, on_choice: OnChoice, *given: Any):
        super().__init__(*given)
        self._programs, self._on_choice = programs, on_choice

    def _run(self, plans: list[StepPlan], ranks: list[Rank]) -> list[np.ndarray]:
        rows = list(self._rows(plans[0], ranks[0]))  # of the one rank that programs on one device have
        self._programs.launches.clear()
        made = super()._run(plans, ranks)
        fed = (
            (place, int(tokens), chosen)
            for lengths, chosen in self._programs.launches
            for place, tokens in enumerate(lengths)
            if tokens  # others are padding
        )
        for (number, start, count), (place, tokens, chosen) in zip(rows, fed, strict=True):
            assert count == tokens
            self._on_choice(number, start, {name: each[:, place, :count] for name, each in chosen.items()})
        return made

    def _rows(self, plan: StepPlan, rank: Rank) -> Iterator[tuple[int, int, int]]:
        """(answer, first position, tokens) in the order that launches take them."""
        for request, new, before in plan.chunks:
            yield self.answers[request].number, before, new
        for request in rank.running if plan.decode else ():
            answer = self.answers[request]
            yield answer.number, len(answer.tokens) - 1, 1
