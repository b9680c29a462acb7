"""A service driven directly: what a server has behind it, without the server."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator, Sequence

import numpy as np

from bench.outside import Ask, Seen
from runtime.api.backing import Backing, make_service, opened
from runtime.api.synthetic import Inventor
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job, Service, Update


@contextlib.contextmanager
def service(backing: Backing) -> Iterator[Service]:
    """What `glm5 serve` would serve of it."""
    found = opened(backing)
    inventor = Inventor(found.vocabulary) if backing.tokens == "synthetic" else None
    made = make_service(backing, found, inventor, lambda words: None)
    try:
        yield made
    finally:
        made.close()


def in_closed_loop(made: Service, asks: Sequence[Ask], concurrency: int, ids: tuple[int, int]) -> list[Seen]:
    """As of `outside`, with a call in place of each request."""
    rng = np.random.default_rng(time.time_ns())
    jobs = [
        Job(tuple(rng.integers(*ids, ask.prompt_tokens).tolist()), ask.output_tokens, Sampling(temperature=0.0))
        for ask in asks
    ]
    ended: queue.SimpleQueue[Seen] = queue.SimpleQueue()

    def send(job: Job) -> None:
        sent = time.perf_counter()
        first: list[float] = []

        def deliver(update: Update) -> None:
            now = time.perf_counter()
            first.append(now) if not first else None
            if update.finish is not None:
                ended.put(Seen(sent, first[0], now, job.max_tokens))

        made.submit([job], [deliver])

    left = iter(jobs)
    for job, _ in zip(left, range(concurrency), strict=False):
        send(job)
    seen = []
    while len(seen) < len(jobs):
        seen.append(ended.get())
        if (job := next(left, None)) is not None:
            send(job)
    return seen
