"""Chips of the tests; profiles are not needed here."""

from runtime.pricing import Chip, Link
from runtime.pricing.adjust import reference_chip
from runtime.pricing.book import PRICES_FOLDER, read_prices

MEASURED = ("h200-sxm", "h100-sxm", "b200-sxm", "b300-sxm", "gb200-nvl72", "gb300-nvl72", "a100-sxm-80gb")
CHIPS = {name: chip for name in MEASURED if (chip := reference_chip(read_prices(PRICES_FOLDER / f"{name}.json")))}
"""By the figures that their tables stand beside."""
UNMEASURED = Chip(
    "some-npu", {"bf16": 353.9e12, "int8": 707.8e12}, 1.6e12, Link(196e9, 1e-6, 8), Link(50e9, 5e-6, 1 << 20)
)
