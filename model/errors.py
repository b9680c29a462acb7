"""Expected failures of the model layer: each message is one line that says what to change.

ModelError
├── ConfigError       a config.json of an unknown type, or with missing or contradictory fields
├── CheckpointError   a missing, truncated or corrupt shard; a missing, extra or misshapen tensor
└── TokenizerError    no tokenizer or chat template, or a template the sandbox refuses
"""

from foundation.errors import Failure


class ModelError(Failure):
    """Base of every expected failure in `model`."""


class ConfigError(ModelError):
    """A config.json that does not describe a model this graph can build."""


class CheckpointError(ModelError):
    """A checkpoint directory that does not hold the weights its config promises."""


class TokenizerError(ModelError):
    """A tokenizer or chat template that is absent or cannot be used."""
