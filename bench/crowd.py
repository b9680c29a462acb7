"""Many clients at once, few of which behave; and what a server still holds when they have gone."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx
import numpy as np

from bench.outside import Ask, Server, body

_MOST_WAIT_S = 120.0  # for the last to be let go; a server waits a minute for a client that does not read
_Kind = Callable[[Server, random.Random, bytes], Awaitable[str]]


async def reads(server: Server, rng: random.Random, content: bytes) -> str:
    """Reads its answer to the end."""
    reader, writer = await _sent(server, content)
    with contextlib.closing(writer):
        got = await reader.read(-1)
    if b" 200 " not in got[:20]:
        return f"refused with {got[9:12].decode()}"
    if b"data: [DONE]" not in got:
        return "cut off"
    return "ended with an error" if b'"error":' in got else "answered"


async def dies(server: Server, rng: random.Random, content: bytes) -> str:
    """Goes away in the middle, half of the time without a word."""
    reader, writer = await _sent(server, content)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(reader.read(-1), rng.uniform(0, 3))
    if rng.random() < 0.5:
        writer.transport.abort()  # a reset
    writer.close()
    return "died"


async def reads_slowly(server: Server, rng: random.Random, content: bytes) -> str:
    """Takes a few bytes at a time, into a small buffer."""
    reader, writer = await _sent(server, content, buffer=2048)
    until = time.monotonic() + rng.uniform(3, 15)
    with contextlib.closing(writer):
        while time.monotonic() < until:
            if not await reader.read(64):
                return "read slowly to the end"
            await asyncio.sleep(0.05)
    return "read slowly and left"


async def never_reads(server: Server, rng: random.Random, content: bytes) -> str:
    """Asks, and is not heard of again; its connection stays."""
    _, writer = await _sent(server, content, buffer=2048)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(rng.uniform(20, 75))
    writer.transport.abort()
    return "never read"


async def half_open(server: Server, rng: random.Random, content: bytes) -> str:
    """Begins to ask, and stops: in the head or in the body."""
    head = _head(server, content)
    whole = head + content
    cut = rng.choice([0, 9, len(head) - 3, len(head), len(head) + len(content) // 2])
    reader, writer = await _sent(server, b"", raw=whole[:cut])
    with contextlib.closing(writer), contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(reader.read(-1), rng.uniform(1, 15))
    return "half open"


async def sends_much(server: Server, rng: random.Random, content: bytes) -> str:
    """A body of 100 MB, told of beforehand or not; stops when it is refused."""
    told = rng.random() < 0.5
    head = _head(server, bytes(100_000_000) if told else b"")
    if not told:
        head = head.replace(b"content-length: 0", b"transfer-encoding: chunked")
    reader, writer = await _sent(server, b"", raw=head)
    part = bytes(1 << 20) if told else b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        for _ in range(100):
            if reader.at_eof():
                break
            writer.write(part)
            await asyncio.wait_for(writer.drain(), 30)
    got = b""
    with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
        got = await asyncio.wait_for(reader.read(-1), 30)
    return f"sent 100 MB, {got[9:12].decode() or 'closed'}"


async def brings_tools(server: Server, rng: random.Random, content: bytes) -> str:
    """10,000 tools."""
    function = {"description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    tools = [{"type": "function", "function": {**function, "name": f"f{number}"}} for number in range(10_000)]
    chat = {"model": server.model, "messages": [{"role": "user", "content": "x"}], "tools": tools, "max_tokens": 4}
    reader, writer = await _sent(server, json.dumps(chat).encode(), path="/v1/chat/completions")
    with contextlib.closing(writer):
        got = await reader.read(-1)
    return f"brought 10,000 tools, {got[9:12].decode() or 'closed'}"


KINDS: list[tuple[float, _Kind]] = [(50, reads), (25, dies), (12, reads_slowly), (3, never_reads), (10, half_open),
         (0.3, sends_much), (0.3, brings_tools)]  # fmt: skip


def crowd(
    server: Server, seconds: float, streams: int, ids: tuple[int, int], only: Sequence[_Kind] = ()
) -> collections.Counter[str]:
    """So many clients for so long; how they ended. only: of these kinds."""
    kinds = [(weight, kind) for weight, kind in KINDS if not only or kind in only]
    return asyncio.run(_crowd(server, seconds, streams, ids, kinds))


async def _crowd(
    server: Server, seconds: float, streams: int, ids: tuple[int, int], kinds: Sequence[tuple[float, _Kind]]
) -> collections.Counter[str]:
    ended: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        rng, drawn = random.Random(number), np.random.default_rng(number)
        while time.monotonic() < until:
            kind = rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])[0]
            ask = Ask(rng.choice([4, 32, 128]), rng.choice([4, 32, 200]))
            try:
                ended[await kind(server, rng, body(server, ask, drawn, ids))] += 1
            except OSError as error:
                ended[f"{kind.__name__}: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)

    async def watch() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(15)
            with contextlib.suppress(OSError):  # where it has ended
                print(f"{until - time.monotonic():5.0f} s left: {holds(server)}", flush=True)

    await asyncio.gather(watch(), *(one(number) for number in range(streams)))
    return ended


def holds(server: Server) -> str:
    return f"{server.files} files, {server.threads} threads, {server.rss_mb:.0f} MB"


def settled(server: Server) -> dict[str, float]:
    """What is held when all have gone: requests, share of the pages, files, threads, megabytes."""
    until = time.monotonic() + _MOST_WAIT_S
    named = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while True:
        with contextlib.suppress(httpx.TransportError):
            found = {name: server.gauge(name) for name in named}
            if not any(found.values()) or time.monotonic() > until:
                break
        time.sleep(1)
    time.sleep(2)  # connections close behind their answers
    return {**found, "files": server.files, "threads": server.threads, "MB": server.rss_mb}


async def _sent(
    server: Server,
    content: bytes,
    buffer: int | None = None,
    raw: bytes | None = None,
    path: str = "/v1/completions",
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = httpx.URL(server.url)
    made = socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=made, limit=1 << (11 if buffer else 20))
    writer.write(_head(server, content, path) + content if raw is None else raw)
    await writer.drain()
    return reader, writer


def _head(server: Server, content: bytes, path: str = "/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    ).encode()
