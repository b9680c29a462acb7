"""Plots: the words of marks lie neither over curves nor over each other."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from runtime.reports.svg import Mark, Series, plot

CURVES = [Series("high", [(x, 1.0) for x in range(101)]), Series("low", [(x, x / 100) for x in range(101)])]


def boxes(drawn: ET.Element) -> list[tuple[float, float, float, float]]:
    """Left, right, top and bottom of the words of marks, at 0.6 of a letter's height a character."""
    found = []
    for word in drawn.findall("text"):
        if not (word.text or "").startswith("stage"):
            continue
        wide, x, y = 6.6 * len(word.text or ""), float(word.attrib["x"]), float(word.attrib["y"])
        left = x - wide if "end" in word.attrib["class"] else x
        found.append((left, left + wide, y - 9, y + 2))
    return found


@pytest.mark.parametrize(
    "places", [[0, 30, 60], [0, 2, 4, 6], [94, 96, 98, 100], [0, 20, 35, 49, 51, 52, 80], [50] * 5]
)
def test_words_of_marks_lie_over_nothing(places: list[float]) -> None:
    marks = [Mark(x, f"stage {number}") for number, x in enumerate(places)]
    drawn = ET.fromstring(plot(CURVES, "step", "share", marks=marks, y_max=1.0))
    points = [p.split(",") for line in drawn.findall("polyline") for p in line.attrib["points"].split()]
    highest = min(float(y) for _, y in points)
    words = boxes(drawn)
    assert len(words) == len(places)
    assert all(bottom <= highest for *_, bottom in words) and all(top >= 0 for _, _, top, _ in words)
    assert all(left >= 0 and right <= 560 for left, right, *_ in words)
    for a, b in combinations(words, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], (a, b)


def test_marks_without_words_and_beyond_the_points_take_no_room() -> None:
    beyond = [Mark(x, "stage") for x in (-1.0, 1e9, float("nan"), float("inf"))]
    bare = plot(CURVES, "step", "share", marks=[*(Mark(x, "") for x in range(60)), *beyond])
    assert "stage" not in bare
    assert ET.fromstring(bare).attrib["viewBox"] == "0 0 560 260"
