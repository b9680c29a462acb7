"""What process 0 tells the others: the same calls, in the same order, with the same numbers."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import CapacityError
from runtime.execution.cluster.led import Leader, LedExecutor, follow
from runtime.serving.executor import Abilities, ByRank, FedRow, Logits, TokenChoice


class Recorder:
    """An executor that writes down what it is asked; whose caches hold what was read of them."""

    name = "a recorder"
    can = Abilities(8, 16, 2, drafts=1, moves=True)

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails = False

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        self.calls.append(("step", prompts, answers, every))
        if self.fails:
            raise CapacityError("too much, in every process")
        return [], []

    def draft(self, prompts: list[list[list[int]]], answers: list[list[list[int]]]) -> tuple[Any, Any]:
        self.calls.append(("draft", prompts, answers))
        return [], []

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        self.calls.append(("read", rank, list(pages)))
        return f"rows {len(self.calls)} of {rank}"

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        self.calls.append(("write", rank, list(pages), contents))

    def reset(self) -> None:
        self.calls.append(("reset",))


class Pair:
    """A leader and one follower on a thread, each with two executors. dropped: messages in all."""

    def __init__(self, silence_s: float = 60.0):
        self.messages: queue.Queue[list[np.ndarray]] = queue.Queue()
        self.said: list[np.ndarray] = []
        self.mine, self.theirs = [Recorder(), Recorder()], [Recorder(), Recorder()]
        self.leader = Leader(self._send, silence_s)
        self.led = [LedExecutor(self.leader, number, each) for number, each in enumerate(self.mine)]
        self._follower = threading.Thread(target=follow, args=(self.theirs, lambda _: self.messages.get()))
        self._follower.start()

    def _send(self, arrays: list[np.ndarray]) -> list[Any]:
        self.said += arrays
        self.messages.put(arrays)
        return arrays

    def end(self) -> None:
        self.leader.end()
        self._follower.join(10)
        assert not self._follower.is_alive()


ids = st.integers(0, 2**31 - 1)
shares = st.floats(0, 1, width=32)
choices = st.builds(
    TokenChoice, st.floats(0, 2.0**99, width=32), shares, ids, shares, shares, st.none() | st.integers(0, 20)
)
rows = st.builds(FedRow, st.lists(ids, min_size=1, max_size=4), ids, st.lists(ids, max_size=4), st.none() | choices)
by_rank = st.lists(st.lists(rows, max_size=3), min_size=2, max_size=2)


@given(steps=st.lists(st.tuples(st.integers(0, 1), by_rank, by_rank, st.booleans()), max_size=6))
def test_all_make_the_same_calls(steps: list[tuple[int, ByRank, ByRank, bool]]) -> None:
    pair = Pair()
    for number, prompts, answers, every in steps:
        pair.led[number].step(prompts, answers, every)
        pair.led[number].draft([[list(row.tokens) for row in rank] for rank in prompts], [[], []])
    pair.led[0].reset()
    pair.end()
    assert [each.calls for each in pair.theirs] == [each.calls for each in pair.mine]
    assert sum(len(each.calls) for each in pair.mine) == 2 * len(steps) + 1


def test_what_moves_is_what_each_has_read() -> None:
    """From one server to another, and not over the wire; what is given up is forgotten before the next call."""
    pair = Pair()
    kept, lost = pair.led[0].read(1, [3, 5]), pair.led[0].read(0, [7])
    pair.led[1].write(0, [2, 4], kept)
    del lost
    gc.collect()
    pair.led[1].reset()
    pair.end()
    assert [each.calls for each in pair.theirs] == [each.calls for each in pair.mine]
    assert pair.theirs[1].calls[0] == ("write", 0, [2, 4], "rows 1 of 1")
    assert len(pair.said) == 6  # two reads, a write, what was given up, a reset, the end
    del kept


def test_what_fails_alike_is_told_by_process_0_alone() -> None:
    pair = Pair()
    for each in (*pair.mine, *pair.theirs):
        each.fails = True
    with pytest.raises(CapacityError, match="in every process"):
        pair.led[0].step([[], []], [[], []], True)
    pair.led[0].reset()
    pair.end()
    assert pair.theirs[0].calls == pair.mine[0].calls and pair.theirs[0].calls[-1] == ("reset",)


def test_silence_is_broken_and_the_end_is_said_once() -> None:
    pair = Pair(silence_s=0.02)
    deadline = time.monotonic() + 20
    while len(pair.said) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    pair.end()
    pair.leader.end()
    assert len(pair.said) > 2 and sum(bool(each[0] == pair.said[-1][0]) for each in pair.said) == 1


@pytest.mark.parametrize("message", [[], [0], [99, 0], [0, 7], [0, 0, 1, 5], [4, -9], [2, 0, 1]])
def test_what_is_no_message_is_refused(message: list[int]) -> None:
    with pytest.raises(ValueError, match="sends what is no message"):
        follow([Recorder()], lambda _: [np.array(message, np.int32)])
