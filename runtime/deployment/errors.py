"""What a plan, a planner or an engine description cannot answer: each carries one line that says what to change.

EngineError          an engine description that is unknown, incomplete or absurd
PlanError
├── LoadError        the expert-load matrix, or the file that should hold it, is unusable
├── SlotsError       devices, nodes, groups and slots do not divide or do not suffice
├── PreviousError    the placement to start from does not fit the load matrix or cannot be read
├── PlanFileError    a plan file that is cut short, edited, of another schema version or for another model
├── LaunchError      an engine cannot express the plan
└── NoPlanError      no layout of these devices holds the model and its load; the reasons follow the first line
"""

from foundation.errors import Failure


class EngineError(Failure):
    """The engine description is unknown, incomplete or holds an absurd value."""


class PlanError(Failure):
    """Base of every expected "no answer" of the planner. The message is one line for a person."""


class LoadError(PlanError):
    """The expert-load matrix, or the file that should hold it, is unusable."""


class SlotsError(PlanError):
    """Devices, nodes, groups and slots do not divide or do not suffice."""


class PreviousError(PlanError):
    """The placement to start from does not fit the load matrix or cannot be read."""


class PlanFileError(PlanError):
    """A plan file that cannot be trusted: cut short, edited, of another schema version, or for another model."""


class NoPlanError(PlanError):
    """No layout of these devices holds the model and its load."""

    keeps_lines = True


class LaunchError(PlanError):
    """An engine cannot express the plan."""
