"""What a shell offers as an option's value: the names that are known, where a word begins like one of them.

For files a shell offers its own. Imports wait until a shell asks.
"""

from __future__ import annotations

from collections.abc import Iterable


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Presets."""
    from model.hf_config import preset_names

    return _begun(preset_names(), incomplete)


def chips(incomplete: str) -> list[str]:
    """Profiles."""
    from hw_profiles.loader import names

    return _begun(names(), incomplete)


def engines(incomplete: str) -> list[str]:
    """Engine descriptions."""
    from runtime.deployment.engines.loader import described, names

    if "@" in incomplete:
        return _begun([f"{name}@{release}" for name in names() for release in described(name)], incomplete)
    return _begun(names(), incomplete)


def backends(incomplete: str) -> list[str]:
    """Adapters."""
    from backends.registry import names

    return _begun(names(), incomplete)


def schemes(incomplete: str) -> list[str]:
    """Number formats of weights."""
    from model.formats import SCHEMES

    return _begun(SCHEMES, incomplete)


def caches(incomplete: str) -> list[str]:
    """Formats of the KV cache."""
    from model.formats import KV

    return _begun(KV, incomplete)


def mechanisms(incomplete: str) -> list[str]:
    """Causes that a prediction is made of."""
    from runtime.simulation.mechanisms import MECHANISMS

    return _begun([each.name for each in MECHANISMS], incomplete)
