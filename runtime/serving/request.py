"""One request: what was asked, how far it has come, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from foundation.errors import UsageError


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its answer. Lengths in tokens, times in seconds of simulated time.

    id: position in the order of sending.
    prefix_hashes: one id per `Workload.block_tokens` block of the prompt, each standing for the block and
        everything before it (Mooncake's `hash_ids`); empty: shares nothing.
    session: the conversation that it is a turn of; its prefix blocks then go on into the answer, which the next turn's
        prompt has.
    measured: counts in the report (False for warm-up).
    sent_at: the client sends it. queued_at: it reaches a scheduler. admitted_at: it first enters a step.
    first_token_at, finished_at: the client sees its first and last token.

    Progress
    emitted: output tokens so far. computed: prompt tokens (and, after a preemption, lost output tokens) in
        the cache. cached: prompt tokens found in the prefix cache at the first admission.
    fetched: of those, the tokens that came from each tier below the devices' memory. fetching, ready_at: the same of
        the latest admission, and when they have come.
    pages: KV pages held, shared ones included. shared: leading prefix blocks held in the prefix cache.
    visible_at: when the scheduler that has it now could first see it.
    kv_ready: the cache arrives from elsewhere, no prefill is needed (disaggregation).
    gone: nobody waits for it any more.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: Sequence[int] = ()
    measured: bool = True
    sent_at: float = 0.0
    queued_at: float = np.nan
    admitted_at: float = np.nan
    first_token_at: float = np.nan
    finished_at: float = np.nan
    emitted: int = 0
    computed: int = 0
    cached: int = 0
    preemptions: int = 0
    pages: int = 0
    shared: int = 0
    visible_at: float = 0.0
    kv_ready: bool = False
    gone: bool = False
    session: int | None = None
    fetched: tuple[int, ...] = ()
    fetching: tuple[int, ...] = ()
    ready_at: float = 0.0

    @property
    def target(self) -> int:
        """Tokens that must be in the cache before the next output token can be made."""
        return self.prompt_tokens + self.emitted

    @property
    def finished(self) -> bool:
        """All output tokens are made."""
        return self.emitted >= self.output_tokens


def check_asked(prompt_tokens: int, max_tokens: int) -> None:
    """Raises `UsageError` for a request of nothing."""
    if prompt_tokens < 1:
        raise UsageError("the prompt has no tokens; give at least one")
    if max_tokens < 1:
        raise UsageError(f"max-tokens must be at least 1, not {max_tokens}")


def check_ids(ids: Iterable[int], vocab: int) -> None:
    """Raises `UsageError` for a token id that a model of so many does not have."""
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise UsageError(f"token id {bad[0]} is out of range: the vocabulary has {vocab} entries")


def check_positions(prompt_tokens: int, max_tokens: int, most: int) -> None:
    """Raises `UsageError` for a prompt and answer that are longer than a model's positions."""
    total = prompt_tokens + max_tokens
    if total > most:
        raise UsageError(
            f"prompt ({prompt_tokens} tokens) + max-tokens ({max_tokens}) = {total} exceeds the model's {most} "
            "positions; shorten one of them"
        )
