"""A JSON document with one of its values changed at random, by seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def damaged(text: str | bytes, values: Sequence[Any], rng: np.random.Generator, stops: float) -> str:
    """The document with one of `values` somewhere in it. stops: chance that what holds others is changed whole."""
    document = at = json.loads(text)
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < stops:
            break
        at = at[key]
    at[key] = values[rng.integers(len(values))]
    return json.dumps(document)
