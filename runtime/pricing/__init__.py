"""What an operator costs on a chip: fits to open measurements where there are any, rooflines elsewhere.

Owns the price functions and their evidence. Needs numpy only; must not import JAX, the graph or a profile
loader. Start with `open_book(Chip(...), engine)`; coefficients lie in `hw_profiles/prices/` and are made by
`bench/fit_prices.py`. Figures are per device and in SI units.
"""

from runtime.pricing import attention, load
from runtime.pricing.attention import MlaLayer
from runtime.pricing.book import PriceBook, open_book
from runtime.pricing.chip import Chip, Link
from runtime.pricing.load import ExpertLoad
from runtime.pricing.price import Price, PriceError, total
from runtime.pricing.work import DEEPSEEK_V3, DEEPSEEK_V32, GLM5, MlaShape

__all__ = [
    "DEEPSEEK_V3",
    "DEEPSEEK_V32",
    "GLM5",
    "Chip",
    "ExpertLoad",
    "Link",
    "MlaLayer",
    "MlaShape",
    "Price",
    "PriceBook",
    "PriceError",
    "attention",
    "load",
    "open_book",
    "total",
]
