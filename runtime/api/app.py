"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from foundation.reading import Unreadable, parse_json
from model.errors import TokenizerError
from runtime.api.answer import Answering
from runtime.api.ask import Ask, Prepared, encoded, prepared, rendered, unnamed
from runtime.api.dialects.chat import ChatBody, ChatRequest
from runtime.api.dialects.completions import CompletionRequest
from runtime.api.dialects.forms import Items, RequestBody, checked_model, read
from runtime.api.dialects.messages import MessagesRequest
from runtime.api.dialects.responses import ResponsesRequest
from runtime.api.endpoint import Endpoint
from runtime.api.guard import Guard, refused
from runtime.api.refusal import ApiRefusal, wrong
from runtime.api.streams import AnswerStream

_Result = TypeVar("_Result")


class Dialect(Protocol):
    """A request in one of the forms: what it asks for, and how answers to it are written."""

    ask: Ask
    streams: bool

    def whole(self, answering: Answering) -> dict[str, Any]: ...
    def stream(self, answering: Answering) -> Any: ...


class TokenizeBody(RequestBody):
    """As vLLM has it: a prompt, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(RequestBody):
    """As vLLM has it."""

    model: str | None = None
    tokens: Items[int] = Field(max_length=10_000_000)


def made(endpoint: Endpoint) -> ASGIApp:
    """The application that serves an endpoint."""
    routes = _Routes(endpoint)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.answered(ChatRequest, named=False), methods=["POST"]),
            Route("/v1/completions", routes.answered(CompletionRequest, named=False), methods=["POST"]),
            Route("/v1/responses", routes.answered(ResponsesRequest, named=True), methods=["POST"]),
            Route("/v1/messages", routes.answered(MessagesRequest, named=True, pings=True), methods=["POST"]),
            Route("/v1/messages/count_tokens", routes.count_tokens, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.one_model),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
        ],
        exception_handlers={
            ApiRefusal: routes.refused,
            HTTPException: _not_there,
            ClientDisconnect: _gone,
            Exception: _broken,
        },  # type: ignore[dict-item]  # fmt: skip
    )
    guarded = Guard(app, endpoint)
    if not endpoint.settings.origins:
        return guarded
    return CORSMiddleware(  # a browser asks without a key whether it may ask with one
        guarded, allow_origins=endpoint.settings.origins, allow_methods=["*"], allow_headers=["*"],
        expose_headers=["x-request-id", "x-glm5-emulated", "retry-after"],
    )  # fmt: skip


class _Routes:
    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint

    def answered(
        self, dialect: Callable[[Endpoint, Any], Dialect], named: bool, pings: bool = False
    ) -> Callable[[Request], Any]:
        """A route that answers requests of a dialect. named, pings: as of `AnswerStream`."""

        async def route(request: Request) -> Response:
            endpoint, began = self._endpoint, time.monotonic()
            body = await request.body()
            endpoint.refuse_full()
            asked, ready = await _unless_gone(request, endpoint.prepared(_asked, endpoint, dialect, body))
            answering = Answering(endpoint, ready, began)
            answering.submit()
            if asked.streams:
                return AnswerStream(endpoint, answering, asked.stream(answering), named, pings)
            try:
                await _unless_gone(request, answering.whole())
                return JSONResponse(asked.whole(answering))
            finally:
                answering.close()

        return route

    async def count_tokens(self, request: Request) -> Response:
        def count(body: bytes) -> int:
            asked = MessagesRequest(self._endpoint, _parsed(body), counting=True)
            return len(rendered(self._endpoint, asked.ask)[0])

        return JSONResponse({"input_tokens": await self._endpoint.prepared(count, await request.body())})

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse(await self._endpoint.prepared(self._tokens, await request.body()))

    def _tokens(self, data: bytes) -> dict[str, Any]:
        endpoint, raw = self._endpoint, _parsed(data)
        body = read(TokenizeBody, raw)
        checked_model(endpoint.names, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise wrong("give one of prompt and messages", "prompt")
        if body.messages is not None:
            kept = {name: raw[name] for name in ChatBody.model_fields if name in raw}
            (ids,) = rendered(endpoint, ChatRequest(endpoint, kept).ask)
        else:
            (ids,) = encoded(endpoint, [body.prompt or ""], body.add_special_tokens, "prompt")
        found: dict[str, Any] = {"count": len(ids), "max_model_len": endpoint.max_positions, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [endpoint.vocabulary.pieces[token].decode(errors="replace") for token in ids]
        return found

    async def detokenize(self, request: Request) -> Response:
        def text(data: bytes) -> str:
            body = read(DetokenizeBody, _parsed(data))
            checked_model(self._endpoint.names, body.model)
            try:
                return self._endpoint.vocabulary.tokenizer.decode(body.tokens)
            except TokenizerError as error:
                raise unnamed(error, self._endpoint.vocabulary.tokenizer.where, "tokens") from None

        return JSONResponse({"prompt": await self._endpoint.prepared(text, await request.body())})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._endpoint.names]})

    async def one_model(self, request: Request) -> Response:
        if not (name := request.path_params["name"]):
            return await self.models(request)
        return JSONResponse(self._model(checked_model(self._endpoint.names, name)))

    def _model(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": name, "object": "model", "created": self._endpoint.began, "owned_by": "glm5",
            "root": self._endpoint.names[0], "max_model_len": self._endpoint.max_positions,
        }  # fmt: skip
        if self._endpoint.emulated is not None:
            found["emulated"] = self._endpoint.emulated.header()
        return found

    async def health(self, request: Request) -> Response:
        """200 when requests are served; 503 until then, with what is still to be done, while the server closes, and
        where the service has ended."""
        state = "failed" if self._endpoint.failed else self._endpoint.state
        said = {"status": state, **({"progress": self._endpoint.progress} if state in ("starting", "closing") else {})}
        return JSONResponse(said, 200 if state == "ready" else 503)

    async def refused(self, request: Request, error: ApiRefusal) -> Response:
        self._endpoint.metrics.refused(error.status)
        return refused(request.url.path, error)

    async def metrics(self, request: Request) -> Response:
        return Response(self._endpoint.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _asked(endpoint: Endpoint, dialect: Callable[[Endpoint, Any], Dialect], body: bytes) -> tuple[Dialect, Prepared]:
    asked = dialect(endpoint, _parsed(body))
    return asked, prepared(endpoint, asked.ask)


def _parsed(body: bytes) -> Any:
    """What a body holds. Raises `ApiRefusal`."""
    try:
        return parse_json(body.decode())
    except UnicodeDecodeError:
        raise wrong("the body is not UTF-8 text") from None
    except Unreadable as error:
        raise wrong(f"the body is not JSON that is taken: {error}", code="invalid_json") from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of work, given up when the client goes away. Raises `ClientDisconnect`."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiRefusal):
                await each


async def _not_there(request: Request, error: HTTPException) -> Response:
    message = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} has no {request.method}"}
    path = request.url.path
    answer = refused(path, ApiRefusal(error.status_code, message.get(error.status_code, error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # to nobody


async def _broken(request: Request, error: Exception) -> Response:
    """A bug of ours; the traceback goes to the log."""
    answer = refused(request.url.path, ApiRefusal(500, "the server failed: see its log"))
    answer.headers["connection"] = "close"  # as uvicorn does behind a traceback
    return answer
