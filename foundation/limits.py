"""Counts that a person or a file gives: the most of each that is taken stands where the thing is described."""

from __future__ import annotations

from foundation.errors import Failure, UsageError


def within(what: str, count: float, most: float, error: type[Failure] = UsageError) -> None:
    """Raises `error`, with both numbers, for more of a thing than is taken: each takes memory or time."""
    if count > most:
        raise error(f"{what} {_said(count)} is more than the {_said(most)} that are taken")


def _said(count: float) -> str:
    if not isinstance(count, int):
        return f"{count:g}"
    if abs(count) < 10**30:
        return f"{count:,}"
    return f"{float(count):.3g}" if abs(count) < 10**300 else f"about 10^{int(count.bit_length() * 0.30103)}"
