"""The seam between the simulator and whoever knows what a step costs.

The simulator says what one step computes (`BatchShape`); a `StepPricer` says how long that takes.
Nothing here knows the model or the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from runtime.deployment.engines import Engine

BOUNDS = ("compute", "memory", "network", "overhead")
EVIDENCE_GRADES = ("measured", "fitted", "datasheet", "assumed")
"""Evidence grades, strongest first; a result carries the weakest of what went into it."""

NO_CONTEXTS = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class BatchShape:
    """What one engine step computes on one rank (one copy of the attention weights).

    decode_contexts: [n] int64, cache length each decode sequence attends to, in tokens, its own
        `query_tokens` of this step included.
    query_tokens: tokens each decode sequence computes: 1, or 1 + drafts under speculation. The price
        of a step with `query_tokens > 1` includes the drafting.
    prefill_chunks: (new tokens, tokens already in the cache before them) per prompt chunk.
    decode_rows: sequences the decode kernels run on, graph padding included; at least n.
    begun: requests that begin in this step.
    padding: prompt tokens computed beside those of the chunks, to fill a program's shape.
    graphed: the step replays a captured graph instead of launching each kernel from the host. pieces: it replays
        graphs of what lies between attention.
    ahead: it was launched before the host had read the one before.
    """

    decode_contexts: np.ndarray = field(default_factory=lambda: NO_CONTEXTS)
    query_tokens: int = 1
    prefill_chunks: list[tuple[int, int]] = field(default_factory=list)
    decode_rows: int = 0
    graphed: bool = False
    pieces: bool = False
    padding: int = 0
    begun: int = 0
    ahead: bool = False

    @property
    def decode_count(self) -> int:
        """Sequences that decode in this step."""
        return len(self.decode_contexts)

    @property
    def rows(self) -> int:
        """Sequences that the step computes something of."""
        return self.decode_count + len(self.prefill_chunks)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed in this step."""
        return sum(new for new, _ in self.prefill_chunks)

    @property
    def tokens(self) -> int:
        """Tokens computed in this step, padding left out."""
        return self.decode_count * self.query_tokens + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class PricedPart:
    """Of one step: the seconds of an op that are bound by the same, how they are known, and from where, in words."""

    op: str
    bound: str
    seconds: float
    evidence: str
    sources: frozenset[str] = frozenset()


@dataclass(slots=True)
class StepPrice:
    """What one step costs on the device, and why.

    seconds: device time of the step; the engine's host time is added by the simulator.
    by_op: op name -> seconds, summing to `seconds`.
    by_bound: one of `BOUNDS` -> seconds, summing to `seconds`.
    extrapolated: an input lay outside the range its price was fitted on.
    evidence: weakest grade that went in, one of `EVIDENCE_GRADES`.
    assumed: figures that nobody gave, and what was taken for them, in words.
    parts: the same seconds by op and bound, with their sources.
    errors: relative error of each entry of `by_op`, in its order (90th percentile, as a share).
    """

    seconds: float
    by_op: dict[str, float] = field(default_factory=dict)
    by_bound: dict[str, float] = field(default_factory=dict)
    extrapolated: bool = False
    evidence: str = "assumed"
    errors: list[float] = field(default_factory=list)
    assumed: frozenset[str] = frozenset()
    parts: list[PricedPart] = field(default_factory=list)


class StepPricer(Protocol):
    """Prices steps. Must be deterministic: same shape, same price."""

    def price(self, shape: BatchShape) -> StepPrice:
        """The full price; called on a sample of the steps."""
        ...

    def seconds(self, shape: BatchShape) -> float:
        """`price(shape).seconds`, cheaply (tens of microseconds); called for nearly every step."""
        ...


IDLE_S = 0.01
"""Seconds without a step behind which a machine is at rest: what its next step takes longer grows up to there, and
little beyond (one host, steps of .5 to 5 ms: .1 ms behind 2 ms, 1.1 behind 10, 1.2 to 1.5 behind 50 and 250)."""
WARM_S = 0.15
"""Seconds of work after a rest until steps take what they take (the same host behind half a second without: steps of
.85 ms took .2 longer at first, .1 after 70 ms, nothing after 120). Behind a shorter rest that warms less."""


def step_shape(
    engine: Engine,
    contexts: np.ndarray,
    query_tokens: int = 1,
    chunks: Sequence[tuple[int, int]] = (),
    begun: int = 0,
    follows: bool = True,
) -> BatchShape:
    """What an engine computes in a step with these sequences and chunks, and how it launches that. Arguments are as of
    `BatchShape`. follows: the step before was one of all these sequences."""
    count, prompts = len(contexts), sum(new for new, _ in chunks)
    rows, graphed = (count, False) if chunks else engine.decode_rows(count)
    pieces = not graphed and engine.in_pieces(count, prompts, count * query_tokens + prompts)
    padding = engine.prompt_padding([new for new, _ in chunks]) if chunks else 0
    ahead = bool(engine.ahead_step_seconds and count and follows) and not chunks and query_tokens == 1
    return BatchShape(contexts, query_tokens, list(chunks), rows, graphed, pieces, padding, begun, ahead)


def step_seconds(engine: Engine, device_seconds: float, shape: BatchShape) -> float:
    """Duration of a step: the device's work, and the host's for its rows and the requests that begin."""
    return engine.step_seconds(device_seconds, shape.graphed, shape.pieces, shape.rows, shape.begun, shape.ahead)


class _Unpriced:
    def price(self, shape: BatchShape) -> StepPrice:
        return StepPrice(0.0)

    def seconds(self, shape: BatchShape) -> float:
        return 0.0


UNPRICED = _Unpriced()
"""Where steps take what they take."""
