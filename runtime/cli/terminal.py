"""What is printed, at any width and to any reader: `Terminal` for text and tables, `for_its_reader` for pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160  # columns where no terminal says how many there are
BROKEN_PIPE = 141  # the exit code a shell gives a command that SIGPIPE ended


class Terminal(Console):
    """A console that never cuts a figure, and that prints no escape sequence at all under NO_COLOR.

    A table that is too wide has its text columns wrapped between words; where that is not enough, every row
    is written as a record of its own: the first cell, and below it each heading with its value.
    """

    def __init__(self, **options: Any) -> None:
        if os.environ.get("NO_COLOR"):
            options["color_system"] = None
        super().__init__(**options)
        if not (self.is_terminal or "width" in options or "COLUMNS" in os.environ):
            self.width = PIPED_WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        """As `rich.console.Console.print`."""
        for one in objects:
            if isinstance(one, Table) and not _fit(self, one):
                _records(self, one)
            else:
                super().print(one, **options)
        if not objects:
            super().print(**options)


def _fit(console: Console, table: Table) -> bool:
    """Give every column its width; False where the screen is too narrow for that."""
    least, wanted = [], []
    for column in table.columns:
        heading, spans = _span(console, column.header), [_span(console, cell) for cell in column.cells]
        whole = column.justify == "right" or column.no_wrap  # figures, and names that are looked for
        cells = max((span.maximum if whole else span.minimum for span in spans), default=0)
        least.append(max(heading.minimum, column.min_width or 0, cells))
        wanted.append(max(heading.maximum, column.min_width or 0, *(span.maximum for span in spans), 0))
        column.ratio = None
    between = _span(console, table).maximum - sum(wanted)
    spare = console.width - between - sum(least)
    if spare < 0:
        return False
    order = sorted(range(len(wanted)), key=lambda i: wanted[i] - least[i])
    for done, i in enumerate(order):  # what one column does not need is left to the ones that need more
        more = min(wanted[i] - least[i], spare // (len(order) - done))
        table.columns[i].width, table.columns[i].no_wrap, spare = least[i] + more, False, spare - more
    return True


def _span(console: Console, what: Any) -> Measurement:
    """The width of its longest word, and of its longest line."""
    return Measurement.get(console, console.options.update(width=10**6), what)


def _records(console: Console, table: Table) -> None:
    """Every row by itself."""
    cells = [list(column.cells) for column in table.columns]
    headings = [_line(console, column.header) for column in table.columns]
    for row in range(table.row_count):
        console.print(Text.assemble(_line(console, cells[0][row]), style="bold"))
        line = Text("  ")
        for heading, cell in zip(headings[1:], cells[1:], strict=True):
            value = _line(console, cell[row])
            if not value.plain.strip():
                continue
            part = Text(" ").join(text for text in (heading, value) if text.plain)
            if line.plain.strip() and line.cell_len + 2 + part.cell_len > console.width:
                console.print(line)
                line = Text("  ")
            line.append(", " if line.plain.strip() else "").append_text(part)
        console.print(line)


def _line(console: Console, cell: Any) -> Text:
    """A cell on one line."""
    text = cell if isinstance(cell, Text) else console.render_str(str(cell))
    return Text(" ").join(text.split("\n"))


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
