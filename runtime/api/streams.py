"""A stream of events that a client reads: signs of life in silence, and an end whatever happens to the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from runtime.api.answer import Answering
from runtime.api.endpoint import Endpoint

# Streams end when their answers do, also while the server shuts down: `server` sees to that.
AppStatus.disable_automatic_graceful_drain()


class AnswerStream(EventSourceResponse):
    """named: events are named by their `type`. pings: signs of life are events too, which only clients of a form that
    has them let be; others get comments."""

    def __init__(
        self,
        endpoint: Endpoint,
        answering: Answering,
        chunks: AsyncIterator[dict[str, Any] | str],
        named: bool,
        pings: bool,
    ):
        self._answering = answering
        super().__init__(
            _written(chunks, named), sep="\n", ping=endpoint.settings.ping_s,
            ping_message_factory=_ping if pings else _comment, send_timeout=endpoint.settings.send_s,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (SendTimeoutError, ClientDisconnect):
            pass  # of a client that does not read; its connection is closed, since the answer is not whole
        finally:
            self._answering.close()


async def _written(chunks: AsyncIterator[dict[str, Any] | str], named: bool) -> AsyncIterator[ServerSentEvent]:
    async for chunk in chunks:
        if isinstance(chunk, str):
            yield ServerSentEvent(data=chunk)
        else:
            text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
            yield ServerSentEvent(data=text, event=chunk["type"] if named else None)


def _ping() -> ServerSentEvent:
    return ServerSentEvent(data='{"type":"ping"}', event="ping")


def _comment() -> ServerSentEvent:
    return ServerSentEvent(comment="ping")
