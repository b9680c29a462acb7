"""What a chip is: the schema, the loader and one TOML per accelerator.

Owns every number about hardware, each with its source, date and grade. Standard library only; imports
nothing else of this project. Start with `load("h200-sxm")`; `README.md` explains every field.
"""

from hw_profiles.checks import check
from hw_profiles.errors import InvalidOverride, InvalidProfile, MissingFigure, ProfileError, UnknownProfile
from hw_profiles.fields import FIELDS, KV_FORMATS, RATE_OF_SCHEME, WEIGHT_SCHEMES, asked_as, is_profile_path, refused
from hw_profiles.loader import load, names, parse_override, prices_sha256
from hw_profiles.schema import ChipFormats, Curve, Figure, Grade, Profile, weakest
from hw_profiles.template import NEEDED, new_profile
from hw_profiles.writer import dumps

__all__ = [
    "FIELDS",
    "KV_FORMATS",
    "NEEDED",
    "RATE_OF_SCHEME",
    "WEIGHT_SCHEMES",
    "Curve",
    "Figure",
    "ChipFormats",
    "Grade",
    "InvalidOverride",
    "InvalidProfile",
    "MissingFigure",
    "Profile",
    "ProfileError",
    "UnknownProfile",
    "asked_as",
    "check",
    "dumps",
    "is_profile_path",
    "load",
    "names",
    "new_profile",
    "parse_override",
    "prices_sha256",
    "refused",
    "weakest",
]
