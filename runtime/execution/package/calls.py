"""How large a graph of functions is once its calls are written out, as compilers do."""

from __future__ import annotations

from collections.abc import Mapping

MOST_OPERATIONS = 1_000_000  # a step of the largest models is a hundredth of it


def why_not(sizes: Mapping[str, int], calls: Mapping[str, Mapping[str, int]]) -> str | None:
    """Why a graph is not opened, if so: a function that calls itself, or calls that double at each of many levels.

    sizes: operations of each function. calls: how often each calls which other; those without an entry are no
    functions of the graph.
    """
    whole: dict[str, int] = {}
    while len(whole) < len(sizes):
        ready = [name for name in sizes if name not in whole and all(c in whole for c in calls[name] if c in sizes)]
        if not ready:
            return f"function {min(set(sizes) - set(whole))[:80]!r} calls itself"
        for name in ready:
            whole[name] = sizes[name] + sum(n * whole[called] for called, n in calls[name].items() if called in sizes)
            if whole[name] > MOST_OPERATIONS:
                return f"function {name[:80]!r} is more than {MOST_OPERATIONS:,} operations with the calls in it"
    return None
