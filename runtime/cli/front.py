"""What clients of `glm5 serve` meet, whatever answers them: the address, the names, the settings, and what the terminal
says. Picklable, for the child of a run over several processes."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable

from runtime.api.backing import Backing, Opened, make_service, opened
from runtime.api.endpoint import Endpoint
from runtime.api.server import HttpServer, bound, is_loopback
from runtime.api.settings import Settings
from runtime.api.synthetic import Inventor
from runtime.cli.compile_cache import open_compile_cache
from runtime.serving.service import Service

TellProgress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Front:
    """names: what requests may call the model; by default its own."""

    host: str
    port: int
    names: tuple[str, ...]
    settings: Settings
    compile_cache: str | None

    def serve_alone(self, backing: Backing) -> None:
        """Serves until a signal. Raises a `Failure` for whatever cannot be served."""
        with bound(self.host, self.port) as listening:
            found = opened(backing)

            def make(inventor: Inventor | None, progress: TellProgress) -> Service:
                if inventor is None:  # made-up tokens need nothing compiled
                    open_compile_cache(self.compile_cache)
                return make_service(backing, found, inventor, progress)

            self.serve(listening, found, make)

    def serve(
        self, listening: socket.socket, found: Opened, make: Callable[[Inventor | None, TellProgress], Service]
    ) -> None:
        """make: gives the service, as of `make_service`, while the server already says that it is not ready."""
        for note in found.notes:
            say(note)
        if not self.settings.keys and not is_loopback(self.host):
            say(f"warning: anyone who reaches {self.host} may use this server; give --api-key")
        endpoint = Endpoint(
            self.names or (found.name,),
            found.vocabulary,
            found.limits.positions,
            self.settings,
            found.recommended,
            found.emulated,
        )
        shown = f"[{self.host}]" if ":" in self.host else self.host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        began = time.monotonic()

        def progress(words: str) -> None:
            endpoint.progress = words
            say(words)

        def ready() -> None:
            print(
                f"glm5: serving {endpoint.names[0]} on {url}, ready after {time.monotonic() - began:.1f} s", flush=True
            )
            if endpoint.emulated is not None:
                print(f"glm5: emulated: {endpoint.emulated.header()}", flush=True)

        server = HttpServer(endpoint, lambda: make(endpoint.inventor, progress), ready)
        server.serve_on(listening)
        say(_ended(endpoint))
        if server.loading:  # and cannot be asked to stop
            sys.stdout.flush()
            os._exit(0)


def _ended(endpoint: Endpoint) -> str:
    counts = endpoint.last_counts
    if endpoint.emulated is None or counts is None:
        return "ended"
    late = f"this machine was behind the chips' clock by {1000 * counts.most_late_s:,.1f} ms at most"
    return f"ended; {late} (--time-scale {endpoint.emulated.time_scale:g})"


def say(words: str) -> None:
    print(f"glm5: {words}", file=sys.stderr, flush=True)
