"""What may be called, and with which arguments."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from runtime.api.refusal import wrong

MOST_TOOLS = 1024  # of a request: each is text of its prompt, and a grammar
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool. parameters: the JSON Schema of its arguments, an object. strict: whether it is refused where the schema
    cannot be held to. exact: whether it is held to."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None
    strict: bool = False
    exact: bool = True

    def spelt(self) -> dict[str, Any]:
        """As chat templates have it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Which calls are wanted. auto: none or some. required: one at least. name: of that tool, with `required`."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True


def checked(tools: list[Tool], param: str = "tools") -> dict[str, Tool]:
    """The tools by name. Raises `ApiRefusal`."""
    if len(tools) > MOST_TOOLS:
        raise wrong(f"{len(tools):,} tools are more than the {MOST_TOOLS:,} that are taken", param)
    found: dict[str, Tool] = {}
    for at, tool in enumerate(tools):
        if not _NAME.fullmatch(tool.name):
            raise wrong("a tool's name is 1 to 128 letters, digits and _ . : / -", f"{param}[{at}].name")
        if tool.name in found:
            raise wrong(f"two tools are named {tool.name}", f"{param}[{at}].name")
        if tool.parameters.get("type", "object") != "object":
            raise wrong("the arguments of a tool are an object", f"{param}[{at}].parameters.type")
        found[tool.name] = tool
    return found
