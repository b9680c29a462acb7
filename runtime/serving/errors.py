"""What can go wrong by the user's doing; anything else that is raised here is a bug.

ServingError            an expected "no answer"; its message is one line that says what to change
└── WorkloadError       a load that cannot be generated (rates, lengths, counts)
    └── TraceFileError  a request trace that cannot be read; the message has the line number

A request that the deployment could never serve is a `foundation.errors.CapacityError`.
"""

from foundation.errors import Failure


class ServingError(Failure):
    """Base of the expected failures; `str(error)` is one clear line."""


class WorkloadError(ServingError):
    """The load cannot be generated: a rate, length or count is out of range."""


class TraceFileError(WorkloadError):
    """A trace file is missing, empty or malformed; the message names file and line."""
