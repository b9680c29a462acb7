"""Which of the cases that prove one mechanism the fast suite runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, slow but for those kept; a case that is kept must be one of them."""
    cases = list(cases)
    assert all(each in cases for each in kept), kept
    return [case if case in kept else slow(case) for case in cases]


def slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
