"""What a server serves: a service, the text in front of it, and whether it is ready."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from runtime.api.grammar import Grammars
from runtime.api.metrics import Metrics
from runtime.api.refusal import ApiRefusal, closing, full
from runtime.api.settings import Emulated, Settings
from runtime.api.synthetic import Inventor
from runtime.api.vocabulary import Vocabulary
from runtime.serving.service import Counts, Service, Update

_Result = TypeVar("_Result")
_MOST_PREPARED = 64  # requests whose prompts are made at once, beyond those that may wait
_THREADS = 8  # that make them; a chat template's process serves one at a time


class Endpoint:
    """names: what requests may call the model, its own first. max_positions: of prompt and answer together.
    recommended: the sampling that the checkpoint asks for.

    Not ready until `serve` is called; `closing` from `close` on.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        vocabulary: Vocabulary,
        max_positions: int,
        settings: Settings = Settings(),
        recommended: Mapping[str, Any] | None = None,
        emulated: Emulated | None = None,
    ):
        self.names, self.vocabulary, self.max_positions = names, vocabulary, max_positions
        self.settings, self.recommended, self.emulated = settings, dict(recommended or {}), emulated
        self.grammars = Grammars(vocabulary)
        self.inventor = Inventor(vocabulary) if emulated is not None and emulated.tokens == "synthetic" else None
        self.metrics = Metrics(names[0], self._counts, emulated)
        self.state: Literal["starting", "ready", "closing"] = "starting"
        self.progress = "loading"
        self.began = int(time.time())
        self.mailbox = Mailbox()
        self.last_counts: Counts | None = None  # when the service was ended
        self._service: Service | None = None
        self._preparing = 0
        self._threads = ThreadPoolExecutor(_THREADS, "glm5-api")
        self._grammar_threads = ThreadPoolExecutor(2, "glm5-grammar")

    @property
    def service(self) -> Service:
        """Raises `ApiRefusal` while there is none, or none any more."""
        if self.state == "closing":
            raise closing()
        if self.failed:
            raise ApiRefusal(503, "the service has failed: see the server's log", code="failed")
        if self._service is None:
            raise ApiRefusal(503, f"the server is not ready yet: {self.progress}", code="not_ready")
        return self._service

    @property
    def failed(self) -> bool:
        """The service has ended by itself."""
        counts = self._counts()
        return counts is not None and counts.failed

    def serve(self, service: Service) -> None:
        """From here on requests are taken."""
        self._service = service
        if self.state == "starting":
            self.state = "ready"

    def abort(self, job: int) -> None:
        if self._service is not None:
            self._service.abort(job)

    def refuse_full(self) -> None:
        """Raises `ApiRefusal` where another request would have to wait and may not: before any work on it."""
        most = self.settings.max_queue
        if self.service.counts().waiting >= most or self._preparing >= most + _MOST_PREPARED:
            raise full()

    async def prepared(self, work: Callable[..., _Result], *given: Any) -> _Result:
        """The result of work on a request, done on another thread."""
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)
        finally:
            self._preparing -= 1

    def compiled(self, work: Callable[..., _Result], *given: Any) -> _Result:
        """The result of work on a grammar, which has threads of its own. Not for the event loop."""
        made: Future[_Result] = self._grammar_threads.submit(work, *given)
        return made.result()

    def close(self) -> None:
        """Takes no more requests; what is there goes on."""
        self.state = "closing"

    def drain(self, seconds: float) -> None:
        """Lets what is there go on for so long, then ends it. Blocks."""
        self.close()
        if self._service is not None:
            self._service.drain(seconds)
            self._service.close()

    def end(self) -> None:
        """Ends the service and the threads. Blocks."""
        self.close()
        if self._service is not None:
            self.last_counts = self._service.counts()
            self._service.close()
        for threads in (self._threads, self._grammar_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _counts(self) -> Counts | None:
        return None if self._service is None else self._service.counts()


_Put = Callable[[int, Update], None]


class Mailbox:
    """Hands what the service's thread tells over to an event loop: all that came since the loop last looked at once."""

    def __init__(self) -> None:
        self._letters: deque[tuple[_Put, int, Update]] = deque()
        self._told = False

    def slot(self, loop: asyncio.AbstractEventLoop, put: _Put, index: int) -> Callable[[Update], None]:
        """What to give a service: for each update `put(index, update)` is called on the loop."""

        def deliver(update: Update) -> None:
            self._letters.append((put, index, update))
            if not self._told:
                self._told = True
                try:
                    loop.call_soon_threadsafe(self._empty)
                except RuntimeError:  # the loop has ended, and with it whoever listened
                    self._letters.clear()

        return deliver

    def _empty(self) -> None:
        self._told = False
        while self._letters:
            put, index, update = self._letters.popleft()
            put(index, update)
