"""Small plots as SVG text. Colours are the page's CSS classes (`s0`, `s1`, …), so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

Points = Sequence[tuple[float, float]]
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 14.0, 12.0, 40.0
_ROW, _CHARACTER = 15.0, 7.0  # of the words of marks: a row's height, and a character's width or less


@dataclass(frozen=True)
class Series:
    """One curve. `style`: a line, a staircase (the value holds until the next point), or dots of a `radius`."""

    name: str
    points: Points
    style: Literal["line", "stairs", "dots"] = "line"
    fill: bool = False
    radius: float = 3.0


@dataclass(frozen=True)
class Mark:
    """A dashed vertical line at `x`, with a word above the curves; beyond the points it is not drawn."""

    x: float
    text: str


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else [0.0]
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    count = math.ceil(high / step - 1e-9) - first
    return [round((first + i) * step, 12) for i in range(count + 1)]


def number(value: float) -> str:
    """A tick's text: at most four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    width: int = 560,
    height: int = 260,
    y_max: float | None = None,
    percent: bool = False,
    marks: Sequence[Mark] = (),
    from_zero: bool = True,
) -> str:
    """An SVG of curves over linear axes; y starts at 0. Points that are not finite are left out.

    from_zero: x starts at 0, else near its least value. percent: y values are shares. Where nothing is left to
    draw, a box that says so.
    """
    kept = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    flat = [point for each in kept for point in each.points]
    label = escape(f"{y_label} over {x_label}", quote=True)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    if not flat:
        return f'{head}<text class="none" x="{width / 2}" y="{height / 2}">nothing was measured</text></svg>'
    least, most = min(x for x, _ in flat), max(x for x, _ in flat)
    least = 0.0 if from_zero or most <= least else least - 0.04 * (most - least)
    most = most + 0.02 * (most - least) or 1.0
    xs = [x for x in ticks(least, most) if least <= x <= most]
    ys = ticks(0.0, y_max or max(y for _, y in flat) or 1.0, about=4)
    right = width - _RIGHT
    spread = (right - _LEFT) / (most - least)
    words = _words(
        [(_LEFT + (m.x - least) * spread, m.text) for m in marks if least <= m.x <= most], (_LEFT + right) / 2
    )
    top = _TOP + _ROW * max(
        (row for _, _, row in words), default=0
    )  # the words are above the curves: nothing lies over one
    height = round(height + top - _TOP)
    bottom = height - _BOTTOM
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'

    def at(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + (x - least) * spread, 1), round(bottom - (y / ys[-1]) * (bottom - top), 1)

    out = [head]
    for y in ys:
        _, v = at(least, y)
        text = f"{y:.0%}" if percent else number(y)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{v}" y2="{v}"/>')
        out.append(f'<text class="tick end" x="{_LEFT - 7}" y="{v + 4}">{text}</text>')
    for x in xs:
        u, _ = at(x, 0)
        out.append(f'<text class="tick mid" x="{u}" y="{bottom + 17}">{number(x)}</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text class="label mid" x="{(_LEFT + right) / 2}" y="{height - 4}">{escape(x_label)}</text>')
    for i, each in enumerate(kept):
        out += _curve(each, i, at, bottom)
    for u, text, row in words:
        v = top - _ROW * row
        out.append(f'<line class="mark" x1="{u:.1f}" x2="{u:.1f}" y1="{v:.1f}" y2="{bottom}"/>')
        if text:
            side, near = ("end", u - 5) if u > (_LEFT + right) / 2 else ("start", u + 5)
            out.append(f'<text class="tick {side}" x="{near:.1f}" y="{v + 10:.1f}">{escape(text)}</text>')
    return "".join([*out, "</svg>"])


def _words(marks: Sequence[tuple[float, str]], middle: float) -> list[tuple[float, str, int]]:
    """Marks as (place, word, row), rows counted from 1 at the curves upwards: the lowest in which a word, left of its
    line beyond the middle and right of it before, meets no other; those that others reach over come first, so that
    their lines end below the others' words. 0 without a word."""
    taken: list[list[tuple[float, float]]] = []
    found = [(place, text, 0) for place, text in marks if not text]
    named = sorted((place, text) for place, text in marks if text)
    for place, text in [m for m in named if m[0] > middle] + [m for m in reversed(named) if m[0] <= middle]:
        wide = 10 + _CHARACTER * len(text)
        begin, end = (place - wide, place) if place > middle else (place, place + wide)
        row = next((i for i, spans in enumerate(taken) if all(end <= b or e <= begin for b, e in spans)), len(taken))
        if row == len(taken):
            taken.append([])
        taken[row].append((begin, end))
        found.append((place, text, row + 1))
    return found


def _curve(series: Series, index: int, at, bottom: float) -> list[str]:  # type: ignore[no-untyped-def]
    places = [at(x, y) for x, y in series.points]
    if not places:
        return []
    if series.style == "dots":
        dots = "".join(f'<circle cx="{u}" cy="{v}" r="{series.radius:g}"/>' for u, v in places)
        return [f'<g class="dots s{index}">{dots}</g>']
    if series.style == "stairs":
        corners = [(b[0], a[1]) for a, b in zip(places, places[1:], strict=False)]
        places = [p for pair in zip(places, [*corners, places[-1]], strict=True) for p in pair]
    path = " ".join(f"{u},{v}" for u, v in places)
    out = [f'<polyline class="line s{index}" points="{path}"><title>{escape(series.name)}</title></polyline>']
    if series.fill:
        area = f"{places[0][0]},{bottom} {path} {places[-1][0]},{bottom}"
        out.insert(0, f'<polygon class="area s{index}" points="{area}"/>')
    return out


def legend(names: Sequence[str]) -> str:
    """A line of coloured names, in the order of a plot's series."""
    items = "".join(f'<span><i class="s{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{items}</div>'


def stacked(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar cut into parts: (name, size, text of its tooltip and legend), with the legend below.

    Sizes that are not positive are left out.
    """
    kept = [(name, size, text) for name, size, text in parts if math.isfinite(size) and size > 0]
    total = sum(size for _, size, _ in kept)
    if not total:
        return '<p class="quiet">nothing was measured</p>'
    cells = ""
    for i, (name, size, text) in enumerate(kept):
        tooltip = escape(f"{name}: {text}", quote=True)
        cells += f'<b class="s{i % 10}" style="width:{100 * size / total:.3f}%" title="{tooltip}"></b>'
    items = "".join(
        f'<span><i class="s{i % 10}"></i>{escape(name)} <em>{escape(text)}</em></span>'
        for i, (name, _, text) in enumerate(kept)
    )
    return f'<div class="stack">{cells}</div><div class="legend">{items}</div>'
