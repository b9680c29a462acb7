"""Work on what strangers made, in a child process that may be ended: it has limits on memory, on CPU seconds and on
seconds by the clock, opens no files for writing, and starts again when it is asked next.

A request and its answer are JSON objects, each behind its length. A child answers one at a time; threads wait for each
other. It ends with the process that started it, at once, whatever it does: it has asked the kernel for a signal when
the other end of a pipe is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

MEMORY_BYTES = 3 << 29  # 1.6 GB of addresses: the interpreter and its libraries take 0.2 GB of them
MESSAGE_BYTES = 1 << 28  # of a request, and of an answer
MOST_CPU_SECONDS = 15.0  # of a request, however long
CLOCK = 12.0  # seconds by the clock for each CPU second, and one more: for what waits, on a machine that others use too
_START_SECONDS = 60  # of our own code, on a machine that does other things too
_WATCH_SECONDS = 1.0  # between two looks at the clock
_REQUEST, _ANSWER = struct.Struct(">Id"), struct.Struct(">I")  # length of what follows; CPU seconds
_PART_BYTES = 1 << 16
_ROOT = Path(__file__).parents[1]
# -I: neither the directory nor PYTHON.. variables decide what is imported.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import {0}; {0}.main(int(sys.argv[2]))"
_KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")  # of the environment: a child needs none of its secrets
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# As `json.dumps` and `json.loads` do, less what they ask themselves at each call. A circle ends in `RecursionError`.
dumps, loads = json.JSONEncoder(check_circular=False).encode, json.JSONDecoder().decode

_TOO_MUCH = f"takes more than the {MEMORY_BYTES / 1e9:.1f} GB of memory that it is given"

Why = Literal["time", "memory", "ended", "refused"]


class ChildFailure(Exception):
    """What a child was asked and did not do: one line that does not name the file.

    why: "time" or "memory": more than it is given. "ended": its process crashed. "refused": its own answer.
    """

    def __init__(self, why: Why, what: str):
        super().__init__(what)
        self.why = why


class _Late(Exception):
    """No answer came in time."""


class _Gone(Exception):
    """None will come."""


class Child:
    """A process that runs `main` of a module of ours, from when it is first asked."""

    def __init__(self, module: str, cpu_seconds: float = 5.0):
        self._module, self.cpu_seconds = module, cpu_seconds
        self.lock = threading.RLock()  # for who asks several times in a row
        self.asked = 0  # how often, since it started
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = self._lifeline = -1  # pipes
        self._answers = select.poll()
        self._until = 0.0  # by the clock, for what is waited for
        self._owner = 0
        atexit.register(self.end)

    def ask(self, request: dict[str, Any], seconds_a_byte: float = 0.0) -> dict[str, Any]:
        """The answer to a request, which may take the longer, the longer it is.

        Raises `ChildFailure`; the process has then ended, unless it refused. A request that is no JSON raises as `json`
        does.
        """
        data = dumps(request).encode()
        cpu_seconds = min(self.cpu_seconds + seconds_a_byte * len(data), MOST_CPU_SECONDS)
        if len(data) > MESSAGE_BYTES:
            raise ChildFailure("memory", f"takes a text of more than {MESSAGE_BYTES >> 20} MiB")
        with self.lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            self.asked += 1
            self._until = time.monotonic() + CLOCK * cpu_seconds + 1
            try:
                self._write(_REQUEST.pack(len(data), cpu_seconds) + data)
                answer = self._read()
            except _Late:
                self.end()
                raise _too_long(cpu_seconds) from None
            except (_Gone, OSError):
                code = self.end(patience_seconds=2)
                if code == -signal.SIGPROF:
                    raise _too_long(cpu_seconds) from None
                ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise ChildFailure("ended", f"ends the process that works on it ({ended})") from None
            except BaseException:  # an interrupt, between a request and its answer
                self.end()
                raise
            if (failed := answer.get("failed")) is None:
                return answer
            if answer.get("memory"):
                self.end()
                raise ChildFailure("memory", failed)
            raise ChildFailure("refused", failed)

    def end(self, patience_seconds: float = 0.0) -> int:
        """Ends the process, if there is one, and returns its exit code as `Popen` has it."""
        with self.lock:
            process, self._process, self.asked = self._process, None, 0
            if process is None:
                return 0
            if self._owner == os.getpid():  # and not one that has been forked from that
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_seconds)
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            os.close(self._lifeline)
            return process.returncode or 0

    def _start(self) -> None:
        self.end()
        there, self._lifeline = os.pipe()
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        command = [sys.executable, "-I", "-c", _BOOT.format(self._module), str(_ROOT), str(there)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere,
                pass_fds=[there], cwd="/", env={**kept, **_ENVIRONMENT},
            )  # fmt: skip
        except OSError as error:
            os.close(self._lifeline)
            raise ChildFailure("ended", f"a process of its own could not be started ({error.strerror})") from None
        finally:
            os.close(there)
        self._owner = os.getpid()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._answers = select.poll()  # one for all answers: what a short request costs is calls to the kernel
        self._answers.register(self._from, select.POLLIN)
        try:
            self._until = time.monotonic() + _START_SECONDS
            self._read()
        except BaseException as error:
            self.end()
            if isinstance(error, _Late | _Gone | OSError):
                raise ChildFailure("ended", "the process that it needs does not start") from None
            raise

    def _write(self, data: bytes) -> None:
        written = self._written(data)
        if written == len(data):
            return
        left, room = memoryview(data)[written:], select.poll()
        room.register(self._to, select.POLLOUT)
        while left:
            self._await(room)
            left = left[self._written(left) :]

    def _written(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._to, data)
        except BlockingIOError:
            return 0

    def _read(self) -> dict[str, Any]:
        def some() -> bytes:
            self._await(self._answers)
            if not (part := os.read(self._from, _PART_BYTES)):
                raise _Gone
            return part

        data, _ = _message(_ANSWER, some)
        try:
            answer = loads(data.decode())
        except (ValueError, RecursionError):
            raise _Gone from None
        if not isinstance(answer, dict):
            raise _Gone
        return answer

    def _await(self, poll: select.poll) -> None:
        """Until a pipe is ready. Raises `_Late` where it is not in time; what passes while this process itself is
        stopped (Ctrl-Z), and the other with it, does not count."""
        while True:
            asked = max(0.0, min(self._until - time.monotonic(), _WATCH_SECONDS))
            before = time.monotonic()
            if poll.poll(asked * 1000):
                return
            stopped = time.monotonic() - before - asked
            if stopped > _WATCH_SECONDS:
                self._until += stopped
            if time.monotonic() >= self._until:
                raise _Late


def _too_long(cpu_seconds: float) -> ChildFailure:
    return ChildFailure("time", f"takes more than the {round(cpu_seconds, 1):g} s that it is given")


# --- in the child --------------------------------------------------------------------------------


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], lifeline: int) -> NoReturn:
    """Answers requests until the parent is gone. What `answer` raises is a refusal: its text, in a line.

    lifeline: what to read of a pipe whose other end only the parent has.
    """
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # where libraries may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)  # SIGIO, which ends this process, when the parent is gone
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _put(answers, b"{}")
    while True:
        request, (cpu_seconds,) = _message(_REQUEST, _some)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        # SIGPROF, which ends this process, when it has used them. It is not taken back: waiting uses none
        data = None
        try:
            data = dumps(answer(loads(request.decode()))).encode()
        except MemoryError:
            pass  # what took it is let go of behind this block
        except BaseException as error:  # a panic of a library in Rust is not an `Exception`
            data = json.dumps({"failed": one_line(error)}).encode()
        if data is None or len(data) > MESSAGE_BYTES:
            data = json.dumps({"failed": _TOO_MUCH, "memory": True}).encode()
        _put(answers, data)


def one_line(error: BaseException) -> str:
    """What an error says, in a line that a terminal can show."""
    text = " ".join(str(error)[:2000].split())
    shown = "".join(each if each.isprintable() else "?" for each in text)
    return (shown[:300] + "..." if len(shown) > 300 else shown) or type(error).__name__


def _put(pipe: int, data: bytes) -> None:
    framed = _ANSWER.pack(len(data)) + data
    written = os.write(pipe, framed)
    while written < len(framed):
        written += os.write(pipe, memoryview(framed)[written:])


def _some() -> bytes:
    part = os.read(0, _PART_BYTES)
    if not part:
        os._exit(0)  # the parent is gone
    return part


# --- on both sides -------------------------------------------------------------------------------


def _message(header: struct.Struct, some: Callable[[], bytes]) -> tuple[bytes | bytearray, tuple[Any, ...]]:
    """A message, and what its header says beside its length. some: the bytes that come next, at least one. Raises
    `_Gone` for one that is too long."""
    found: bytes | bytearray = some()
    while len(found) < header.size:
        found += some()
    length, *said = header.unpack_from(found)
    if length > MESSAGE_BYTES:
        raise _Gone
    if len(found) < header.size + length:  # a short one comes at once, and is not copied
        found = bytearray(found)
        while len(found) < header.size + length:
            found += some()
    return found[header.size :], tuple(said)
