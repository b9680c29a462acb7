"""Around every request: its id, the key, what its body may weigh and take, and what became of it in the API's shape."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api.endpoint import Endpoint
from runtime.api.refusal import ApiRefusal

_ANTHROPIC = "/v1/messages"
_LINGER_S, _SILENCE_S = 10.0, 0.5
"""How long the rest of a refused body is taken in all, and how long nothing may come of it."""
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint):
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, endpoint = Headers(scope=scope), self._endpoint
        given = headers.get("x-request-id", "")
        own = {"x-request-id": given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"}
        if scope["path"].startswith(_ANTHROPIC):
            own["request-id"] = own["x-request-id"]
        if endpoint.emulated is not None:
            own["x-glm5-emulated"] = endpoint.emulated.header()

        unread = False

        async def answer(message: Message) -> None:
            nonlocal unread
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(own)
                unread = message["status"] == 413 and "expect" not in headers
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discarded(receive)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._admit(scope["path"], headers)
            bounded = _Bounded(receive, headers, endpoint)
        except ApiRefusal as refusal:
            endpoint.metrics.refused(refusal.status)
            await refused(scope["path"], refusal)(scope, receive, answer)
            return
        await self._app(scope, bounded, answer)

    def _admit(self, path: str, headers: Headers) -> None:
        """Raises `ApiRefusal` without a key."""
        settings = self._endpoint.settings
        if not settings.keys or (settings.open_health and path == "/health"):
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if kind.lower() == "bearer" else ""]
        pairs = [(key.encode(), each.encode()) for key in settings.keys for each in given]
        if not any([hmac.compare_digest(*pair) for pair in pairs]):  # each of them, however the first compares
            message = "no such key: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiRefusal(401, message, code="invalid_api_key")


async def _discarded(receive: Receive) -> None:
    """Takes what a client still sends of a body that is refused: closed on earlier, it may never read why."""
    try:
        async with asyncio.timeout(_LINGER_S):
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class _Bounded:
    """What a client sends, up to a size and within a time."""

    def __init__(self, receive: Receive, headers: Headers, endpoint: Endpoint):
        self._receive, self._most = receive, endpoint.settings.max_body_bytes
        self._until = asyncio.get_running_loop().time() + endpoint.settings.body_s
        self._seconds = endpoint.settings.body_s
        self._bytes, self._whole = 0, False
        packed = headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise ApiRefusal(415, f"the body is {packed[:40]!r}: send it as it is, without content-encoding")
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told[:20]) > self._most:
            raise self._large()

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client has gone
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiRefusal(408, f"the body did not come within {self._seconds:g} s", code="timeout") from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._most:
                raise self._large()
        return message

    def _large(self) -> ApiRefusal:
        return ApiRefusal(413, f"the body is larger than {self._most:,} bytes", code="request_too_large")


def refused(path: str, refusal: ApiRefusal) -> JSONResponse:
    """A refusal in the shape of whoever is asked at a path."""
    theirs = path.startswith(_ANTHROPIC)
    body: dict[str, Any] = refusal.anthropic() if theirs else refusal.openai()
    status = 529 if refusal.status == 429 and theirs else refusal.status
    return JSONResponse(
        body, status, {**refusal.headers(), "connection": "close"} if status in (408, 413, 415) else refusal.headers()
    )
