"""The JSON Schema of a plan file: `python -m runtime.deployment.schema > docs/plan.schema.json`."""

from __future__ import annotations

import json
from typing import Any

from runtime.deployment.document import schema
from runtime.deployment.plan import SCHEMA_VERSION, Plan


def plan_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of `Plan.text`: the dataclass, with the hash and the answering pool's formats."""
    found = schema(Plan)
    plan = found["$defs"]["Plan"]
    properties = plan["properties"]
    plan["properties"] = {
        "schema_version": {"const": SCHEMA_VERSION},
        "hash": {
            "type": "string",
            "pattern": "^[0-9a-f]{64}$",
            "description": "SHA-256 of the file's text with 64 zeros in the place of these digits.",
        },
        "formats": {"$ref": "#/$defs/Formats", "description": "Of the pool that makes the answers."},
        **{name: value for name, value in properties.items() if name != "schema_version"},
    }
    plan["required"] = list(plan["properties"])
    return {"title": "glm5 plan", **found}


if __name__ == "__main__":
    print(json.dumps(plan_schema(), indent=1))
