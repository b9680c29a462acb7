"""The nouns: `Figure` (one sourced number), `Curve` (efficiency over size), `ChipFormats`, `Profile`.

All are frozen. A profile is a flat map from dotted field (see `fields.py`) to figure, so that a field has
one spelling in the TOML, in code, on the command line and in error messages.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hw_profiles.errors import MissingFigure
from hw_profiles.fields import CURVES, FIELDS, ChipKind, suggest

PROFILES = Path(__file__).parent / "profiles"

Grade = Literal["measured", "A", "B", "C", "user"]
SET = "--set"
"""The source of a figure that was set by hand."""
GRADES: tuple[Grade, ...] = ("measured", "A", "B", "C", "user")
"""Strongest first. measured: on the machine at hand; A: vendor datasheet or paper; B: measured by a third
party or found in a vendor engineer's code; C: community, disputed or carried over from another chip;
user: typed on the command line."""

Evidence = Literal["measured", "datasheet", "assumed"]
_EVIDENCE: dict[Grade, Evidence] = {
    "measured": "measured",
    "A": "datasheet",
    "B": "datasheet",
    "C": "assumed",
    "user": "assumed",
}


def weakest(grades: Iterable[Grade]) -> Grade:
    """The weakest of some grades; "measured" for none."""
    return GRADES[max((GRADES.index(grade) for grade in grades), default=0)]


@dataclass(frozen=True)
class Figure:
    """One number and where it comes from.

    `value` is in `unit` (SI base units). `range` is the (low, high) of disagreeing sources, which `note`
    lists. `date` (YYYY, YYYY-MM or YYYY-MM-DD) is when the source was published or, undated, read. `replaces`: what
    stood here before `--set`.
    """

    value: float
    unit: str
    source: str
    date: str
    grade: Grade
    note: str = ""
    range: tuple[float, float] | None = None
    replaces: float | None = field(default=None, compare=False)

    @property
    def evidence(self) -> Evidence:
        """The grade in the words an answer uses: "measured", "datasheet" or "assumed"."""
        return _EVIDENCE[self.grade]


@dataclass(frozen=True)
class Curve:
    """The share of a peak that is reached, by size of the operation.

    `knots` are (size, efficiency) with sizes increasing, in `size_unit`; efficiency is in (0, 1].
    """

    knots: tuple[tuple[float, float], ...]
    size_unit: str
    source: str
    date: str
    grade: Grade
    note: str = ""

    def at(self, size: float) -> float:
        """Efficiency at `size`: linear in log(size) between knots, constant outside them."""
        if size <= self.knots[0][0]:
            return self.knots[0][1]
        for (low, at_low), (high, at_high) in zip(self.knots, self.knots[1:], strict=False):
            if size < high:
                share = math.log(size / low) / math.log(high / low)
                return at_low + share * (at_high - at_low)
        return self.knots[-1][1]

    @property
    def evidence(self) -> Evidence:
        """The grade in the words an answer uses: "measured", "datasheet" or "assumed"."""
        return _EVIDENCE[self.grade]


@dataclass(frozen=True)
class ChipFormats:
    """Number formats that run with the chip's own arithmetic: `weights` (schemes) and `kv` (cache)."""

    weights: tuple[str, ...]
    kv: tuple[str, ...]
    source: str
    date: str
    grade: Grade
    note: str = ""


@dataclass(frozen=True)
class Profile:
    """One accelerator (or host), as data.

    `figures`, `curves` and `labels` are keyed by dotted field; an unknown number is simply not there.
    `package_devices` is 2 where one package holds two devices to the software and this profile sums them
    (ascend-910c). `prices` is a coefficients file, relative to the TOML at `path`; `prices_sha256` that of its text,
    where it must be the very file that the profile was written with.
    """

    name: str
    vendor: str
    family: str
    kind: ChipKind
    description: str
    formats: ChipFormats
    figures: Mapping[str, Figure]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    package_devices: int = 1
    prices: str | None = None
    prices_sha256: str | None = None
    path: Path | None = field(default=None, compare=False)

    def get(self, path: str) -> Figure | None:
        """The figure at a dotted field, or None. Raises KeyError for a field no profile can have."""
        if path not in FIELDS:
            raise KeyError(f"no profile field {path!r}{suggest(path, tuple(FIELDS))}")
        return self.figures.get(path)

    def require(self, path: str) -> Figure:
        """The figure at a dotted field. Raises MissingFigure, whose line says how to supply it."""
        figure = self.get(path)
        if figure is None:
            unit, meaning = FIELDS[path].unit, FIELDS[path].meaning
            raise MissingFigure(
                f"profile {self.name} has no {path} ({meaning}); supply it with --set {path}=… in {unit}"
            )
        return figure

    def value(self, path: str) -> float:
        """`require(path).value`."""
        return self.require(path).value

    def curve(self, path: str) -> Curve:
        """The efficiency curve at "efficiency.compute", ".memory" or ".network". Raises MissingFigure."""
        if path not in CURVES:
            raise KeyError(f"no efficiency curve {path!r}{suggest(path, tuple(CURVES))}")
        if path not in self.curves:
            raise MissingFigure(
                f"profile {self.name} has no {path} (share of the peak reached, by size in {CURVES[path]}); "
                f"supply it with --set {path}=… between 0 and 1"
            )
        return self.curves[path]

    def number(self, path: str) -> float | None:
        """The figure's value, or a curve's efficiency at its largest size; None if the profile has none."""
        if path in CURVES:
            return self.curves[path].knots[-1][1] if path in self.curves else None
        figure = self.get(path)
        return figure.value if figure else None

    @property
    def settings(self) -> dict[str, float]:
        """What was set by hand, by field: the overrides that `load` takes to give this profile again."""
        found = {path: figure.value for path, figure in self.figures.items() if figure.source == SET}
        found |= {path: curve.knots[-1][1] for path, curve in self.curves.items() if curve.source == SET}
        return dict(sorted(found.items()))

    @property
    def absent(self) -> tuple[str, ...]:
        """The fields and curves this profile has no figure for."""
        present = self.figures.keys() | self.curves.keys()
        return tuple(path for path in (*FIELDS, *CURVES) if path not in present)

    @property
    def weakest_grade(self) -> Grade:
        """The weakest grade among all figures and curves."""
        return weakest(item.grade for item in (*self.figures.values(), *self.curves.values()))

    @property
    def ships(self) -> bool:
        """Whether `load` finds it by its name: another file may call itself the same."""
        return self.path is not None and self.path.parent == PROFILES

    @property
    def prices_path(self) -> Path | None:
        """Where the coefficients file named by `prices` lies, or None."""
        return self.path.parent / self.prices if self.prices and self.path else None
