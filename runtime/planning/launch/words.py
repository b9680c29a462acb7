"""Words of a command line, quoted for a POSIX shell, and the command they make."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping

from foundation.errors import printable


@dataclasses.dataclass(frozen=True)
class Shell:
    """Text that the shell fills in: what stands between double quotes, such as `${NODE0}:5000`."""

    text: str


Word = str | Shell
_WITH_MESSAGE = re.compile(r"\$\{(\w+):\?[^}]*\}")


def quoted(word: Word) -> str:
    """The word as a shell reads it back."""
    return f'"{word.text}"' if isinstance(word, Shell) else shlex.quote(word)


def plain(word: Word) -> str:
    """The word as a person reads it, variables unfilled: `$NODE0:5000`."""
    return _WITH_MESSAGE.sub(r"$\1", word.text) if isinstance(word, Shell) else word


def joined(*parts: Word) -> Word:
    """Words end to end: a string where all are."""
    text = "".join(part.text if isinstance(part, Shell) else part for part in parts)
    return Shell(text) if any(isinstance(part, Shell) for part in parts) else text


@dataclasses.dataclass(frozen=True)
class Command:
    """One process: where it runs, its environment and words, and what it could not be told.

    node: of the plan; -1 for a router, which runs on any machine. sources: flag -> the document it was read in.
    """

    title: str
    node: int
    environment: Mapping[str, Word]
    words: tuple[Word, ...]
    remarks: tuple[str, ...] = ()
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        """The words, variables unfilled."""
        return [plain(word) for word in self.words]

    def text(self, sources: bool = False, background: bool = False) -> str:
        """Shell text: remarks as comments, then assignments and a flag a line."""
        lines = [comment(self.title), *(comment(f"note: {remark}") for remark in self.remarks)]
        if sources:
            lines += [comment(f"{flag}: {where}") for flag, where in self.sources.items()]
        parts = [f"{name}={quoted(value)}" for name, value in self.environment.items()]
        first, *rest = _by_flag(self.words)
        parts.append(first)
        parts += [f"  {part}" for part in rest]
        return "\n".join([*lines, " \\\n".join(parts) + (" &" if background else "")])


def comment(text: str) -> str:
    """A line of shell that does nothing, whatever a plan or an engine's file has put into the text."""
    return f"# {printable(text)}"


def _by_flag(words: tuple[Word, ...]) -> list[str]:
    """The words on lines: the program and what precedes the first flag, then each flag with its values."""
    lines: list[list[str]] = [[]]
    for word in words:
        if isinstance(word, str) and word.startswith("--"):
            lines.append([])
        lines[-1].append(quoted(word))
    return [" ".join(line) for line in lines]
