"""The sockets of a server, its signals, and how it ends: with every stream ended properly."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from foundation.errors import UsageError
from runtime.api.app import made
from runtime.api.endpoint import Endpoint
from runtime.serving.service import Service

_BEHIND_S = 5.0  # for answers that were ended to be written


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `UsageError`."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"cannot listen on {host} port {port}: ports are 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = "it is in use; give another --port"
        raise UsageError(f"cannot listen on {host} port {port}: {why}") from None
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


class HttpServer(uvicorn.Server):
    """Serves an endpoint until a signal; then its answers go on for `drain_s`, and what is left is ended.

    make: gives the service, on a thread of its own, while the server already says that it is not ready. ready: told
    when it is. `run` raises what `make` raises.
    """

    def __init__(self, endpoint: Endpoint, make: Callable[[], Service], ready: Callable[[], None] = lambda: None):
        settings = endpoint.settings
        self._endpoint, self._make, self._ready = endpoint, make, ready
        self._failure: BaseException | None = None
        self._loader = threading.Thread(target=self._load, name="glm5-load", daemon=True)
        self._drainer: threading.Thread | None = None
        super().__init__(
            uvicorn.Config(
                made(endpoint), loop="asyncio", http=_timed(settings.header_s), ws="none", lifespan="off",
                log_config=None, log_level="warning", access_log=False, server_header=False,
                timeout_keep_alive=int(settings.idle_s),
                timeout_graceful_shutdown=int(settings.drain_s + _BEHIND_S) + 1,
            )
        )  # fmt: skip

    def serve_on(self, listening: socket.socket) -> None:
        """Blocks until the server has ended. Raises what `make` raises."""
        self._loader.start()
        try:
            waker = signal.set_wakeup_fd(-1)  # `interrupt` would end the process at once
        except ValueError:  # not the main thread: no signals here
            waker = None
        try:
            super().run([listening])
        finally:
            if waker is not None:
                signal.set_wakeup_fd(waker)
            listening.close()
            self._endpoint.close()
            if self._drainer is not None:
                self._drainer.join()
        if self._failure is not None:
            raise self._failure
        self._endpoint.end()

    @property
    def loading(self) -> bool:
        """Whether the service is still being made."""
        return self._loader.is_alive()

    def _load(self) -> None:
        try:
            service = self._make()
        except BaseException as error:
            self._failure, self.should_exit = error, True
            return
        if self._endpoint.state == "closing":
            service.close()
            return
        self._endpoint.serve(service)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        self.leave(at_once=self.should_exit)

    def leave(self, at_once: bool = False) -> None:
        """What a signal does; from any thread."""
        self._endpoint.close()
        seconds = 0.0 if at_once else self._endpoint.settings.drain_s
        drainer = threading.Thread(target=self._drain, args=(seconds,), name="glm5-drain", daemon=True)
        drainer.start()  # before the server is told to exit, which waits for it
        self._drainer, self.should_exit = drainer, True

    def _drain(self, seconds: float) -> None:
        self._endpoint.drain(seconds)


def _timed(header_s: float) -> type[asyncio.Protocol]:
    """A connection whose client has so many seconds to send the head of a request, from its first byte on, or from when
    it connects."""

    class Timed(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._head is None and not self._asked():
                self._await_head()
            super().data_received(data)
            if self._asked():
                self._forget_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            super().connection_lost(exc)

        def _asked(self) -> bool:
            """Whether a request is being answered."""
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            self._head = self.loop.call_later(header_s, self._late)

        def _forget_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _late(self) -> None:
            self._head = None
            if not self._asked() and not self.transport.is_closing():
                self.transport.close()

    return Timed
