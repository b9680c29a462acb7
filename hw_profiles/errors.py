"""What can go wrong with a profile, apart from bugs.

ProfileError            every expected failure; says what to change
├── UnknownProfile      no shipped profile has that name, and no file that path
├── InvalidProfile      the TOML is malformed or holds a wrong value; one line a problem
├── InvalidOverride     a `--set field=value` names no field or gives it a wrong value
└── MissingFigure       the profile is fine but lacks a number that an answer needs
"""

from collections.abc import Sequence

from foundation.errors import Failure


class ProfileError(Failure):
    """Base of every expected failure. `problems` holds a line each; `str()` is the first, and how many there are."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        more = len(self.problems) - 1
        super().__init__(self.problems[0] + (f" (and {more} more problem{'s' * (more > 1)})" if more > 0 else ""))


class UnknownProfile(ProfileError):
    """No shipped profile has that name, and no file that path."""


class InvalidProfile(ProfileError):
    """The TOML is malformed or holds a wrong value; one line a problem: file, field, what to change."""


class InvalidOverride(ProfileError):
    """A `--set field=value` names no field or gives it a wrong value."""


class MissingFigure(ProfileError):
    """The profile lacks a number that an answer needs; the line says how to supply it."""
