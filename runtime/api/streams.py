"""A stream of events that a client reads: signs of life in silence, and an end whatever happens to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.api.answer import Answering
from runtime.api.endpoint import Endpoint

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_COMMENT = b": ping\n\n"
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # to clients that cut text into lines


class AnswerStream(Response):
    """Server-sent events. All that is there to be told goes out in one write, for a write costs more than an event.

    named: events are named by their `type`. pings: signs of life are events too, which only clients of a form that
    has them let be; others get comments.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        endpoint: Endpoint,
        answering: Answering,
        chunks: AsyncGenerator[dict[str, Any] | str, None],
        named: bool,
        pings: bool,
    ):
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "connection": "keep-alive", "x-accel-buffering": "no"})
        self._answering, self._chunks, self._named = answering, chunks, named
        self._ping_s, self._send_s = endpoint.settings.ping_s, endpoint.settings.send_s
        self._ping = _PING if pings else _COMMENT
        self._held: list[bytes] = []
        self._writing, self._ended = asyncio.Lock(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._answering.before_waiting = self._flush
        tasks = [asyncio.ensure_future(each) for each in (self._written(), self._pinged(), _gone(receive))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(TimeoutError):  # of a client that does not read; its connection is closed,
                for task in done:  # since the answer is not whole
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._answering.close()

    async def _written(self) -> None:
        await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                self._held.append(_event(chunk, self._named))
        await self._flush(more=False)

    async def _flush(self, more: bool = True) -> None:
        if self._held or not more:
            body = b"".join(self._held)
            self._held.clear()
            await self._put(body, more)

    async def _pinged(self) -> None:
        while True:
            await asyncio.sleep(self._ping_s)
            await self._put(self._ping)

    async def _put(self, body: bytes, more: bool = True) -> None:
        """Raises `TimeoutError` for a client that does not read."""
        async with asyncio.timeout(self._send_s), self._writing:
            if not self._ended:  # nothing comes behind the end
                self._ended = not more
                await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def _gone(receive: Receive) -> None:
    """Ends when the client has."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any] | str, named: bool) -> bytes:
    if isinstance(chunk, str):
        return f"data: {chunk}\n\n".encode()
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"event: {chunk['type']}\ndata: {text}\n\n".encode() if named else f"data: {text}\n\n".encode()
