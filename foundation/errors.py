"""Expected failures: each message is one line that says what to change. Anything else that is raised is a bug.

Failure
├── UsageError      a request, option or combination that cannot be served
├── CapacityError   a pool's pages or a device's memory are too few for what was asked
└── of one package: ProfileError (hw_profiles), ModelError (model), BackendError (backends), and in runtime
    EngineError, PlanError, ServingError, PriceError, VerificationError, ProcessLost
"""


class Failure(Exception):
    """Base of every expected failure. The command line prints its text and exits with 2.

    keeps_lines: a ledger or a list of reasons follows its line. Other line ends are of names that are quoted, and are
    spelt out.
    """

    keeps_lines = False


class UsageError(Failure):
    """A request, option or combination that cannot be served."""


class CapacityError(Failure):
    """A pool's pages or a device's memory are too few."""

    keeps_lines = True


def first_line(said: object) -> str:
    """The first line of what an error says that is not blank; where it says nothing, the name of its type."""
    return next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__)


def shortened(text: str) -> str:
    """Text of others, cut to a length that a message can bear."""
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """Text of others on one line: line ends and what would command a terminal are spelt out (`\\n`, `\\x1b`)."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
