"""The scheduler as a service when something breaks: who hears of it, and who does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foundation.errors import CapacityError
from runtime.serving.clock import Paced
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job, ServiceClosed, Update
from tests.serving.live import (
    Client,
    OnlyMultiples,
    ask,
    assert_nothing_is_held,
    deployment,
    prompt,
    reference,
    service,
    simple,
    toy,
)


def test_a_step_that_fails_ends_its_jobs_and_no_others() -> None:
    served, executor = simple(settings={"max_running_requests": 2})
    executor.fails_at = 4
    job = Job(prompt(9), 8, Sampling())
    failed, too, after = ask(served, [job, Job(prompt(11), 8, Sampling()), Job(prompt(10), 8, Sampling())])
    for client in (failed, too):
        assert client.last.finish == "error" and client.last.error is not None
        assert "the toy broke" in client.last.error and "\n" not in client.last.error
    assert after.tokens == reference(Job(prompt(10), 8, Sampling()))
    again = ask(served, [job])[0]
    assert again.tokens == reference(job) and again.last.cached_tokens == 0  # what was cached is lost
    assert_nothing_is_held(served)


def test_a_fault_of_the_scheduler_ends_what_is_there_and_the_service_goes_on() -> None:
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def end() -> Any:
        raise AssertionError("a bug")

    served._loop.groups[0][0].end = end  # type: ignore[method-assign]
    failed = ask(served, [job, job])
    assert all(client.last.finish == "error" and "a bug" in str(client.last.error) for client in failed)
    assert ask(served, [job])[0].tokens == reference(job)
    assert_nothing_is_held(served)


def test_a_service_that_is_beyond_repair_says_so_to_everybody() -> None:
    """No empty scheduler can be made in the place of one that failed: nobody is left waiting for it."""
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def end() -> Any:
        raise AssertionError("a bug")

    served._loop.groups[0][0].end = end  # type: ignore[method-assign]
    served._new_loop = end  # type: ignore[method-assign]
    assert not served.counts().failed
    failed = ask(served, [job, job])
    assert all((client.last.finish, client.last.fault) == ("error", "server") for client in failed)
    served._thread.join(20)
    assert served.counts().failed and served.counts().running == served.counts().waiting == 0
    with pytest.raises(ServiceClosed):
        served.submit([job], [Client()])
    assert served.drain(0)
    served.warmed_up()
    served.close()


@pytest.mark.parametrize(
    "raised, fault", [(RuntimeError, "server"), (MemoryError, "memory"), (CapacityError, "memory")]
)
def test_a_step_that_has_no_memory_is_another_fault(raised: type[Exception], fault: str) -> None:
    served, executor = simple()
    step = executor.step

    def fails(*rows: Any) -> Any:
        executor.step = step  # type: ignore[method-assign]
        raise raised

    executor.step = fails  # type: ignore[method-assign]
    client = ask(served, [Job(prompt(9), 8, Sampling())])[0]
    assert (client.last.finish, client.last.fault) == ("error", fault) and client.last.error
    assert_nothing_is_held(served)


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_one_job_brings_along_ends_no_other(drafts: int) -> None:
    """A mask of fewer tokens than the model has, and one that is no mask."""
    served, _ = simple(drafts=drafts)

    class Short(OnlyMultiples):
        vocab = 20

    class Wrong(OnlyMultiples):
        def allowed(self) -> np.ndarray | None:
            return np.ones((2, 3))

    job = Job(prompt(9), 8, Sampling())
    fine, short, wrong = ask(
        served,
        [
            job,
            Job(prompt(9), 8, Sampling(), constraint=Short(1)),
            Job(prompt(9), 8, Sampling(), constraint=Wrong(1)),
        ],
    )
    assert fine.tokens == reference(job)
    assert len(short.tokens) == 8 and max(short.tokens) < 20
    assert wrong.last.finish == "error" and "no token could be chosen" in str(wrong.last.error)
    assert_nothing_is_held(served)


def test_a_client_that_cannot_be_told_is_dropped() -> None:
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def raises(update: Update) -> None:
        raise BrokenPipeError("gone")

    other = Client()
    served.submit([job, job], [raises, other])
    assert other.wait().tokens == reference(job)
    assert_nothing_is_held(served)


def test_close_ends_what_is_left() -> None:
    asked = deployment(max_running_requests=1)
    served = service(asked, [toy(asked)], Paced(1000.0))  # steps that would take minutes
    clients = [Client(), Client()]
    served.submit([Job(prompt(9), 8, Sampling())] * 2, clients)
    assert not served.drain(0.01)
    served.close()
    assert [client.wait().last.finish for client in clients] == ["aborted", "aborted"]
    assert served.counts().kv_share == 0.0
