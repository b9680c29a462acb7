"""Text up to the first of several strings, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Holds back what may yet become a stop string; nothing of one is ever let through.

    Of several, the one that is whole first ends the text, and of two that are whole at once the longer. `found` is it.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def put(self, text: str) -> str:
        """What may be shown now. After a stop was found, nothing."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text, self._held = self._held + text, ""
        whole = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if whole:
            _, at, self.found = min(whole)
            return text[:at]
        keep = max(map(lambda stop: _begun(text, stop), self._stops))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, where the text ends."""
        text, self._held = self._held, ""
        return text


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end may be the beginning of a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
