"""The bar of a verb that makes steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def steps_bar(total: int, said: Callable[[dict[str, Any]], str]) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Yields what is told of steps done and of the record of the last. It begins with the first step: what is refused
    leaves no bar."""
    from rich import progress as bars

    from runtime.cli.terminal import Terminal

    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), *times)
    progress = bars.Progress(*columns, console=Terminal(stderr=True))
    bar = progress.add_task("running", total=total)

    def report(step: int, record: dict[str, Any]) -> None:
        progress.start()
        progress.update(bar, completed=step, description=said(record) if record else "running")

    try:
        yield report
    finally:
        if progress.live.is_started:
            progress.stop()
