"""One plan over several processes, each started by hand or by a launcher with `--coordinator` and `--process I/N`.

What a person starts is a supervisor, free of JAX. The part that joins the others runs in a child process, because
JAX's runtime ends a process from within, with a trace of its own, where another one is lost: the supervisor makes
one line of that. A child whose supervisor is gone ends, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from backends.errors import BackendUnavailable
from foundation.errors import Failure, UsageError, first_line
from runtime.execution.cluster.joining import Address, gather, given_secret, knock

if TYPE_CHECKING:
    from backends.interface import Backend
    from backends.spmd.processes import Processes
    from runtime.deployment.plan import Plan

JOIN_SECONDS = 120
"""How long a process waits for the others to start."""


class ProcessLost(Failure):
    """A process of a run over several has ended before its time."""


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """Which of the processes this one is, and where process 0 listens."""

    coordinator: str
    index: int
    count: int

    @classmethod
    def parse(cls, coordinator: str | None, process: str | None) -> ProcessPlace:
        """From the words of the command line. Raises `UsageError`."""
        if coordinator is None or process is None:
            raise UsageError("--coordinator and --process go together: where process 0 listens, and which this is")
        host, _, port = coordinator.rpartition(":")
        if not host or not 0 < _whole(port) < 65536:
            raise UsageError(f"--coordinator takes HOST:PORT, not {coordinator!r}")
        index, _, count = process.partition("/")
        if not 0 <= _whole(index) < _whole(count):
            raise UsageError(f"--process takes I/N with I from 0 to N - 1, not {process!r}")
        return cls(coordinator, _whole(index), _whole(count))

    def check(self, plan: Plan) -> None:
        """Raises `UsageError` where the plan's devices cannot be dealt out."""
        if len(plan.devices) % self.count:
            raise UsageError(
                f"--process {self.index}/{self.count}: the plan's {len(plan.devices)} devices are not divisible by "
                f"{self.count} processes"
            )

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def require_spread(backend: str, plan: Path | None) -> None:
    """Raises `UsageError` where several processes are asked for, and there is no plan or the backend cannot."""
    from backends import registry

    if plan is None:
        raise UsageError("--coordinator needs --plan")
    if not registry.get(backend).spreads:
        raise UsageError(f"--coordinator: backend {backend} does not run over several processes; cpu and cuda do")


def _whole(text: str) -> int:
    """A whole number of a command line, -1 for what is none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else -1


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What a process that has been let in goes on with. key: of this run alone. meet: to be called when it has met all
    others."""

    key: bytes
    meet: Callable[[], None]


# How what XLA raises begins, which may be a ValueError as well as its own: a peer is gone, or a device is.
_OF_RUNTIME = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|UNAVAILABLE|UNKNOWN): ")
_BUG = 1  # exit code of a child that has printed a traceback


def supervise(place: ProcessPlace, work: Callable[[Ticket], None], drains: bool = False) -> None:
    """Meets the other processes, runs `work`, which is pickled, in a child process, and raises here what it raises
    there if that is expected. drains: SIGTERM and Ctrl-C are for process 0's `work`, which ends in its own time; a
    second one ends any other process.

    Raises `UsageError` where not all processes come, or something else stands in the place of one, and `ProcessLost`
    where the child ended otherwise: another process is gone.
    """
    secret = given_secret(place.coordinator)
    if place.index:
        key = knock(place.coordinator, place.index, place.count, secret, JOIN_SECONDS)
    else:
        key = gather(place.coordinator, place.count, secret, JOIN_SECONDS)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_child, name="glm5-process", args=(place, sender, key, work))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the child's for good: it ends with this process
    child.start()
    if drains:
        _pass_on(place, child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    sender.close()
    said: Failure | None = None
    with contextlib.suppress(EOFError):
        try:
            if not receiver.poll(2 * JOIN_SECONDS):  # of which JAX's runtime, from inside, keeps to one
                raise UsageError(
                    f"{place} has not met all others at {place.coordinator} within {2 * JOIN_SECONDS:g} s, though all "
                    "were let in; something else may have taken the place of one"
                )
            said = receiver.recv()
            if said is None:
                child.join()
                said = receiver.recv()
        except BaseException as error:
            if not isinstance(error, EOFError):
                child.kill()
                child.join()
            raise
    child.join()
    if said is not None:
        raise said
    if child.exitcode == _BUG:
        sys.exit(_BUG)
    if child.exitcode:
        raise _lost(place, f"exit code {child.exitcode}" if child.exitcode > 0 else f"signal {-child.exitcode}")


def _pass_on(place: ProcessPlace, child: BaseProcess) -> None:
    told = 0

    def heard(number: int, frame: object) -> None:
        nonlocal told
        told += 1
        if place.index == 0:
            child.terminate()
        elif told > 1:
            child.kill()
        else:
            os.write(2, f"glm5: {place} ends when process 0 does; once more ends it now\n".encode())

    signal.set_wakeup_fd(-1)  # `interrupt` would end the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, heard)


def _lost(place: ProcessPlace, reason: str) -> ProcessLost:
    return ProcessLost(f"{place} ends, because another process was lost or its device failed ({reason})")


def _child(place: ProcessPlace, sender: Connection, key: bytes, work: Callable[[Ticket], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What the distributed runtime and gloo print is not for the reader; answers are process 0's to give.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(nowhere if place.index else os.dup(1), "w")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        work(Ticket(key, lambda: sender.send(None)))
        leave()
        code = 0
    except Failure as error:
        sender.send(error)
        code = 2
    except Exception as error:
        code = 2
        if _OF_RUNTIME.match(str(error)):
            sender.send(_lost(place, first_line(error)))
        else:
            traceback.print_exc()
            code = _BUG
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not the exit of the distributed runtime, which waits for all


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(_BUG)


def connect(
    place: ProcessPlace, ticket: Ticket, backend: Backend, dtype: str | None, plan: Plan, asked: object
) -> Processes:
    """Joins the other processes; in the child only. asked: what all must have been asked for alike, with a `repr`.

    Raises `UsageError` where not all processes join, or one was asked for something else.
    """
    import jax

    from backends.spmd.processes import Processes, agree, join
    from backends.xla import XlaBackend

    assert isinstance(backend, XlaBackend)
    where = (place.coordinator, str(Address.of(place.coordinator)), place.index, place.count)
    try:
        devices = join(backend.platform, *where, len(plan.devices), JOIN_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"{place} found not all others at {place.coordinator} within {JOIN_SECONDS:g} s ({first_line(error)})"
        ) from None
    if reason := backend.unavailable():
        raise BackendUnavailable(f"backend {backend.name} cannot be used here: {reason} (see `glm5 backends`)")
    offered = backend.capabilities()
    dtype = dtype or offered.preferred_dtype
    if dtype not in offered.dtypes:
        raise UsageError(f"backend {backend.name} computes in {', '.join(sorted(offered.dtypes))}, not in {dtype}")
    keeps = offered.fp8_weights, sorted(offered.cache_rows)  # which decides what is in memory, and what moves
    different = agree(hashlib.sha256(repr((plan.hash, dtype, keeps, asked)).encode()).digest(), ticket.key)
    ticket.meet()
    if different is not None:
        leave()  # before this one ends: JAX would end those that have not said so yet
        raise UsageError(
            f"process {different} was started with another plan, checkpoint, prompt or option than process 0, or its "
            "devices keep other formats"
        )
    return Processes(backend, devices, dtype)


def leave() -> None:
    """Waits until all processes are done."""
    import jax

    jax.distributed.shutdown()
