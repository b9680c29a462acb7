"""A server in a process of its own, and clients that measure it from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
GLM5 = [sys.executable, "-m", "runtime.cli.main"]
_READY = re.compile(r"glm5: serving (\S+) on (\S+), ready")
_LATE = re.compile(r"behind the chips' clock by ([\d,.]+) ms")


def glm5(*words: object) -> str:
    """What a command prints."""
    command = [*GLM5, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True).stdout


@dataclasses.dataclass
class Server:
    """model: its name. late_ms: how far it was behind its clock at worst, known when it has ended."""

    url: str
    model: str
    process: subprocess.Popen[str]
    late_ms: float = 0.0

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mb(self) -> float:
        held = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", held)[0]) / 1e3

    @property
    def files(self) -> int:
        """File descriptors that are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def gauge(self, name: str) -> float:
        """A figure of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return float(re.findall(rf"^{re.escape(name)}{{.*}} (\S+)$", text, re.M)[0])

    def timed(self, name: str) -> tuple[float, float]:
        """Sum and count of a histogram."""
        return self.gauge(f"vllm:{name}_seconds_sum"), self.gauge(f"vllm:{name}_seconds_count")


@contextlib.contextmanager
def served(*words: object) -> Iterator[Server]:
    """`glm5 serve` with these options, on a free port, until SIGTERM."""
    command = [*GLM5, "serve", "--port", "0", *map(str, words)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = _READY.search(line)
        if found is None:
            process.kill()
            raise SystemExit(f"the server did not start: {process.communicate()[1][-2000:]}")
        made = Server(found[2], found[1], process)
        yield made
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        if late := _LATE.search(said):
            made.late_ms = float(late[1].replace(",", ""))
    finally:
        process.kill()
        process.wait()


@dataclasses.dataclass(frozen=True)
class Ask:
    """Tokens of a prompt, and of its answer."""

    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Seen:
    """An answer as its client saw it; seconds of the wall clock."""

    sent_s: float
    first_s: float
    last_s: float
    tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)


def in_closed_loop(
    server: Server, asks: Sequence[Ask], concurrency: int, seed: int, ids: tuple[int, int]
) -> list[Seen]:
    """A closed loop: so many clients, each sending the next of `asks` when its last answer has ended. ids: prompts are
    drawn from these, so that none begins like another."""
    return _Clients(server, asks, np.random.default_rng([seed, os.getpid(), time.time_ns()]), ids).in_turn(concurrency)


def in_open_loop(server: Server, asks: Sequence[Ask], times: Sequence[float], ids: tuple[int, int]) -> list[Seen]:
    """Each request at its time, in seconds from now on, whoever is still served."""
    return _Clients(server, asks, np.random.default_rng(time.time_ns()), ids).at(times)


def body(server: Server, ask: Ask, rng: np.random.Generator, ids: tuple[int, int]) -> bytes:
    """Of a request for a streamed completion of just that many tokens."""
    return json.dumps(
        {
            "model": server.model, "prompt": rng.integers(*ids, ask.prompt_tokens).tolist(), "stream": True,
            "max_tokens": ask.output_tokens, "ignore_eos": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


@dataclasses.dataclass
class _Stream:
    """A request under way: its connection, what has come, and when."""

    ask: Ask
    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    kept: list[bytes] = dataclasses.field(default_factory=list)

    def take(self, part: bytes) -> None:
        if b'"text":"' in part:
            self.last_s = time.perf_counter()
            if b'"text":""' not in part:
                self.first_s = self.first_s or self.last_s
        self.kept.append(part)

    def seen(self) -> Seen:
        """Raises `SystemExit` for an answer that is not what was asked."""
        content = b"".join(self.kept)
        if b" 200 " not in content[:40]:
            raise SystemExit(f"{content[:500]!r}")
        lines = content.split(b"\n")
        usage: Any = next(json.loads(line[6:]) for line in reversed(lines) if b'"usage":{' in line)
        tokens = usage["usage"]["completion_tokens"]
        if tokens != self.ask.output_tokens:
            raise SystemExit(f"an answer has {tokens} tokens, not {self.ask.output_tokens}")
        return Seen(self.sent_s, self.first_s, self.last_s, tokens)


class _Clients:
    """Clients on one thread, over sockets alone: a client library, or an event loop, would take as long over a token as
    the server does, on the same cores. A connection is open before its request's time begins."""

    def __init__(self, server: Server, asks: Sequence[Ask], rng: np.random.Generator, ids: tuple[int, int]):
        url = httpx.URL(server.url)
        self._place = (url.host, url.port)
        self._left = deque((_request(body(server, ask, rng, ids)), ask) for ask in asks)
        self._count = len(self._left)
        self._seen: list[Seen] = []

    def in_turn(self, concurrency: int) -> list[Seen]:
        with selectors.DefaultSelector() as selector:
            for _ in range(min(concurrency, self._count)):
                self._send(selector)
            while selector.get_map():
                for _ in range(self._step(selector, None)):
                    if self._left:
                        self._send(selector)
        return self._seen

    def at(self, times: Sequence[float]) -> list[Seen]:
        began, due = time.perf_counter(), deque(sorted(times))
        with selectors.DefaultSelector() as selector:
            while due or selector.get_map():
                while due and began + due[0] <= time.perf_counter():
                    due.popleft()
                    self._send(selector)
                wait = began + due[0] - time.perf_counter() if due else None
                self._step(selector, None if wait is None else max(0.0, wait))
        return self._seen

    def _send(self, selector: selectors.BaseSelector) -> None:
        content, ask = self._left.popleft()
        made = socket.create_connection(self._place)
        stream = _Stream(ask, time.perf_counter())
        made.sendall(content)
        selector.register(made, selectors.EVENT_READ, stream)

    def _step(self, selector: selectors.BaseSelector, timeout: float | None) -> int:
        """Takes what has come; how many answers have ended."""
        ended = 0
        for key, _ in selector.select(timeout):
            made: Any = key.fileobj
            if part := made.recv(1 << 16):
                key.data.take(part)
                continue
            selector.unregister(made)
            made.close()
            self._seen.append(key.data.seen())
            ended += 1
        return ended


def _request(content: bytes) -> bytes:
    """Of a connection that ends with its answer."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def shown(values: Sequence[float], form: str = ".1f") -> str:
    """Median, and lowest to highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def repeated(ask: Ask, count: int) -> list[Ask]:
    return list(itertools.repeat(ask, count))
