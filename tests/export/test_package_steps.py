"""Static gears under the one scheduler: whatever their sizes, tokens are those of each request alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UsageError
from runtime.deployment.manifest import Gear, GearUnits
from runtime.execution.local.request import Prompt
from runtime.execution.package.runner import StepBatch
from runtime.execution.package.steps import PackageExecutor
from runtime.execution.serve_all import serve_all
from runtime.serving import Deployment
from runtime.serving.executor import FedRow, refuse
from runtime.serving.pricing import UNPRICED
from tests.serving.helpers import plain_engine
from tests.serving.toy import ToyExecutor, greedy_after

PAGE = 4


class ToyRunner:
    """A package of the toy model, which holds each launch to its gear."""

    def __init__(self, gears: Sequence[Gear], dp: int):
        pages = 1 + max(gear.sequences * gear.context_pages for gear in gears)
        programs = tuple(GearUnits("both", gear, {}) for gear in gears)  # type: ignore[arg-type]
        self.manifest = SimpleNamespace(programs=programs, page_size=PAGE, pool_pages=pages)
        self.folder, self.dp, self.load_s = Path("toy"), dp, 0.0
        self.executor = SimpleNamespace(get=lambda value: value)
        self.toy = ToyExecutor(pages - 1, PAGE, dp)

    def step(self, program: GearUnits, batches: Sequence[StepBatch]) -> list[dict[str, Any]]:
        gear = program.gear
        rows: list[list[FedRow]] = []
        for batch in batches:
            assert batch.tokens.shape == (gear.sequences, gear.tokens)
            assert batch.page_table.shape == (gear.sequences, gear.context_pages)
            rows.append(
                [
                    FedRow([int(t) for t in ids[:n]], int(start), [int(p) for p in table])
                    for ids, start, n, table in zip(*batch, strict=True)
                    if n
                ]
            )
        logits, _ = self.toy.step(rows, [[] for _ in rows], False)
        padded = [np.zeros((gear.sequences, 40), np.float32) for _ in rows]
        for out, found in zip(padded, logits, strict=True):
            out[: len(found)] = np.concatenate(found) if found else 0
        return [{"logits": out} for out in padded]


@given(
    gears=st.lists(
        st.builds(Gear, st.integers(1, 3), st.sampled_from([1, 6, 16]), st.sampled_from([12, 20])), min_size=1
    ),
    dp=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shared=st.integers(0, 9),
)
def test_tokens_are_those_of_each_alone(gears: list[Gear], dp: int, lengths: list[int], shared: int) -> None:
    gears.append(Gear(1, 1, 12))
    runner: Any = ToyRunner(gears, dp)
    executor = PackageExecutor(runner)
    begin = tuple(range(shared))
    prompts = [Prompt((*begin, *range(n, 2 * n)), 1 + n % 9) for n in lengths]
    prompts = [each for each in prompts if len(each.prompt_ids) + each.max_tokens <= executor.largest_context]
    done, _, loop = serve_all(prompts, executor.deployment(), executor, lambda: 0.0)
    assert [list(each.token_ids) for each in done] == [greedy_after(p.prompt_ids, p.max_tokens) for p in prompts]
    for rank in loop.ranks:
        rank.pool.check([])


def test_what_static_gears_cannot_do_is_refused() -> None:
    runner: Any = ToyRunner([Gear(2, 8, 12)], 1)
    executor = PackageExecutor(runner)
    mixed = Deployment(plain_engine("vllm", page_tokens=PAGE, max_running_requests=2), UNPRICED, 96)
    with pytest.raises(UsageError, match="vllm puts prompts and answers into one step, and the package cannot"):
        refuse(mixed, executor)
    many = Deployment(plain_engine("glm5", page_tokens=PAGE, max_running_requests=3), UNPRICED, 96)
    with pytest.raises(UsageError, match="glm5 runs 3 requests at once, and the package 2"):
        refuse(many, executor)
    with pytest.raises(UsageError, match="the package cannot send caches"):
        refuse(executor.deployment(), executor, moves=True)
