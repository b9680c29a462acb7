"""What is printed to a reader that may go away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

BROKEN_PIPE = 141  # the exit code a shell gives a command that SIGPIPE ended


@contextmanager
def for_its_reader() -> Iterator[None]:
    """While open, a reader that goes away, as `head` does, ends the command: quietly, and with `BROKEN_PIPE`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Read(stream) if stream else stream for stream in streams)
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = streams


class _Read:
    """A text stream whose reader may go away."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        """Nothing more can be written, at the end of the process either, where Python flushes."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        raise SystemExit(BROKEN_PIPE)
