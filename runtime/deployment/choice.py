"""Which number formats a chip can be asked for: those that its profile has units for."""

from __future__ import annotations

from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import KV, SCHEMES, Formats, Scheme, matrix_format, scheme
from model.split import Layout
from runtime.deployment.engines import engine_for, formats_for

_PREFERRED = ("fp8", "mxfp8", "w8a8", "fp8-tensor", "bf16")
"""A chip's own formats: the first of these that it has units for."""


def missing_formats(profile: Profile, wanted: Scheme) -> list[str]:
    """The formats of a scheme that a chip has no units for; float32, the reference, runs anywhere."""
    units = {*profile.formats.weights, "f32"}
    return [name for name in wanted.formats if matrix_format(name).base not in units]


def offered_schemes(profile: Profile) -> list[Scheme]:
    """The named schemes that a chip has units for."""
    return [known for known in SCHEMES.values() if not missing_formats(profile, known)]


def chosen_scheme(profile: Profile, name: str | None = None) -> Scheme:
    """The scheme of that name, or the chip's own. Raises `UsageError` where the chip has no units for it."""
    available = [known.name for known in offered_schemes(profile)]
    if name is None:
        return SCHEMES[next((own for own in _PREFERRED if own in available), "f32")]
    wanted = scheme(name)
    if missing := missing_formats(profile, wanted):
        raise UsageError(
            f"profile {profile.name} has no {' or '.join(missing)}: formats {name} cannot run on it; "
            f"it runs {', '.join(available)}"
        )
    return wanted


def check_kv(profile: Profile, kv: str | None) -> None:
    """Raises `UsageError` for a cache format that a chip does not keep; None and float32 are always kept."""
    if kv in (None, "f32"):
        return
    if kv not in KV:
        raise UsageError(f"unknown KV format {kv!r}; known: {', '.join(KV)}")
    if kv not in profile.formats.kv:
        raise UsageError(f"profile {profile.name} keeps caches in {', '.join(profile.formats.kv)}, not in {kv}")


def chip_formats(
    cfg: ModelConfig, profile: Profile, name: str | None = None, kv: str | None = None, engine: str = "sglang"
) -> Formats:
    """The number formats of a model on a chip. name: of a scheme, the chip's own by default; kv: of the cache, as wide
    as the activations by default. Raises `UsageError`."""
    chosen = chosen_scheme(profile, name)
    check_kv(profile, kv)
    described = engine_for(engine, cfg, profile, Layout())
    return formats_for(described, cfg, profile, chosen, kv or chosen.wide)
