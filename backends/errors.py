"""Expected failures of the backends: each message is one line that says what to change.

BackendError
├── UnknownBackend      no adapter of that name
├── BackendUnavailable  the adapter cannot run here, and why
├── Unsupported         the adapter lacks a capability the program needs
└── ArtifactError       an artifact that is damaged, of another version, or for another platform
"""

from foundation.errors import Failure


class BackendError(Failure):
    """Base of every expected failure in `backends`."""


class UnknownBackend(BackendError):
    """No adapter of that name."""


class BackendUnavailable(BackendError):
    """The adapter exists but cannot run on this machine."""


class Unsupported(BackendError):
    """The program needs something that the adapter does not offer."""


class ArtifactError(BackendError):
    """An artifact that cannot be loaded."""
