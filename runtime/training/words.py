"""The little world that the training text speaks of: names, things, animals, cities and tools."""

from __future__ import annotations

from typing import Any

NAMES = (
    "Ada", "Amy", "Ben", "Bob", "Cai", "Cleo", "Dan", "Dora", "Eli", "Eva", "Fay", "Finn", "Gil", "Gus", "Hal",
    "Hugo", "Ida", "Ivo", "Jan", "Joy", "Kai", "Kim", "Lea", "Leo", "Max", "Mia", "Nia", "Noa", "Oli", "Otto", "Pam",
    "Paul", "Rex", "Rosa", "Sam", "Tom", "Uma", "Val", "Wes", "Zoe",
)  # fmt: skip
THINGS = (
    "bell", "boat", "book", "box", "coin", "cup", "drum", "fan", "fork", "harp", "hat", "jar", "key", "kite", "lamp",
    "map", "mask", "nail", "net", "oar", "pen", "pot", "ring", "rope", "sack", "saw", "sock", "spoon", "tent", "top",
    "vase", "wheel",
)  # fmt: skip
CITIES = (
    "Athens", "Berlin", "Cairo", "Delhi", "Lima", "London", "Lyon", "Madrid", "Milan", "Oslo", "Paris", "Perth",
    "Quito", "Rome", "Seoul", "Tokyo",
)  # fmt: skip
SKIES = ("clear", "cloudy", "rainy", "sunny", "windy")
# An animal lives in one place: what a sentence may be asked about.
HOMES = {
    "ant": "hill", "bat": "cave", "bear": "forest", "bee": "hive", "camel": "desert", "cow": "barn", "crab": "sea",
    "fox": "den", "frog": "pond", "hen": "coop", "mouse": "wall", "owl": "tree", "pig": "pen", "seal": "ice",
    "swan": "lake", "wolf": "wood",
}  # fmt: skip
COLOURS = ("black", "brown", "golden", "grey", "old", "quick", "red", "small", "white", "young")
MOVES = ("runs", "walks", "jumps", "looks", "turns")
WAYS = ("over", "past", "under", "behind", "around")
PLACES = ("bridge", "fence", "garden", "house", "road", "rock", "river", "wall")


def _tool(name: str, **parameters: str) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


TOOLS = {
    tool["name"]: tool
    for tool in (
        _tool("weather", city="string"),
        _tool("clock", city="string"),
        _tool("send", item="string", to="string"),
        _tool("add", a="number", b="number"),
    )
}
