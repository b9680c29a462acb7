"""What the dialects share: reading a body's fields, and the parts that OpenAI's three forms have alike."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from foundation.reading import Unreadable, parse_json
from runtime.api.answer import Answering, Shown
from runtime.api.ask import MOST_STOP_CHARACTERS, MOST_STOPS, Drawn, JsonFormat
from runtime.api.refusal import ApiRefusal, wrong
from runtime.api.tools import Tool, ToolChoice
from runtime.api.vocabulary import Vocabulary

MOST_BIASED = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_NO_FIELD = {"str", "int", "float", "bool", "none", "constrained-str", "constrained-int", "constrained-float"}
Form = TypeVar("Form", bound="RequestBody")
_Item = TypeVar("_Item")


class _ToTheFirst(FailFast):
    """The library's cannot be part of a union."""

    __hash__ = object.__hash__  # type: ignore[assignment]


Items = Annotated[list[_Item], _ToTheFirst()]
"""A list of a request's: checked up to the first that is wrong, since an error takes a kilobyte."""


class RequestBody(BaseModel):
    """Fields of a request, of exactly their types; fields that nobody knows are let be, as OpenAI's are."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Sampled(RequestBody):
    """How tokens are chosen: what OpenAI's forms and vLLM's additions to them have alike."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = Field(None, max_length=128)
    logit_bias: dict[str, Any] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=128)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None

    def drawn(self, **more: Any) -> Drawn:
        """Raises `ApiRefusal`."""
        for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
            if getattr(self, name) not in (None, neutral):
                raise wrong(f"{name} is not supported: leave it out, or at {neutral}", name, "unsupported_parameter")
        return Drawn(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p or 0.0, seed=self.seed,
            bias=_bias(self.logit_bias or {}), stops=stops(self.stop, "stop"),
            stop_ids=frozenset(self.stop_token_ids or ()), min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos), n=self.n or 1, **more,
        )  # fmt: skip


def read(form: type[Form], raw: Any) -> Form:
    """A body's fields. Raises `ApiRefusal`, which names the first that is wrong."""
    if not isinstance(raw, dict):
        raise wrong("the body is a JSON object")
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _path(first["loc"])
        missing = first["type"] == "missing"
        message = f"{param} is missing" if missing else f"{param}: {_lowered(first['msg'])}"
        raise wrong(message, param, "missing_required_parameter" if missing else "invalid_value") from None
    except RecursionError:
        raise wrong("the body is nested too deep") from None


def _path(where: Sequence[int | str]) -> str:
    said = ""
    for step in where:
        if isinstance(step, int):
            said += f"[{step}]"
        elif step not in _NO_FIELD and "[" not in step:
            said += f".{step}" if said else step
    return said


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(12)}"


def stops(given: str | list[str] | None, param: str) -> tuple[str, ...]:
    """Raises `ApiRefusal`."""
    found = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(found) > MOST_STOPS:
        raise wrong(f"{len(found)} stop strings are more than {MOST_STOPS}", param)
    if any(not stop or len(stop) > MOST_STOP_CHARACTERS for stop in found):
        raise wrong(f"a stop string has 1 to {MOST_STOP_CHARACTERS} characters", param)
    return found


def _bias(given: dict[str, Any]) -> dict[int, float]:
    if len(given) > MOST_BIASED:
        raise wrong(f"{len(given):,} tokens are more than {MOST_BIASED:,}", "logit_bias")
    found = {}
    for name, value in given.items():
        if not name.isdecimal() or len(name) > 9:
            raise wrong(f"{name[:40]!r} is no token id", "logit_bias")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise wrong(f"a bias is a number from -100 to 100, not {str(value)[:40]!r}", "logit_bias")
        found[int(name)] = float(value)
    return found


# --- tools, and JSON that is asked for ---


class FunctionTool(RequestBody):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.parameters or {}, self.description, bool(self.strict))


def format_of(given: dict[str, Any] | None, param: str, nested: bool) -> JsonFormat | None:
    """What `response_format` (nested) or `text.format` asks for. Raises `ApiRefusal`."""
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return JsonFormat({"type": "object"}, param)
    if kind != "json_schema":
        raise wrong(f"{param}.type is text, json_object or json_schema", f"{param}.type")
    holder, where = (given.get("json_schema"), f"{param}.json_schema") if nested else (given, param)
    if not isinstance(holder, dict) or "schema" not in holder:
        raise wrong(f"{where}.schema is missing", f"{where}.schema", "missing_required_parameter")
    return JsonFormat(holder["schema"], where)


def choice_of(given: Any, parallel: bool | None, param: str = "tool_choice") -> ToolChoice:
    """OpenAI's `tool_choice`, of chats (`function.name`) and of responses (`name`). Raises `ApiRefusal`."""
    parallel = parallel is not False
    if given is None:
        return ToolChoice(parallel=parallel)
    if given in ("none", "auto", "required"):
        return ToolChoice(given, None, parallel)
    if isinstance(given, dict) and given.get("type") == "function":
        function = given.get("function")
        name = function.get("name") if isinstance(function, dict) else given.get("name")
        if isinstance(name, str):
            return ToolChoice("required", name, parallel=False)
    raise wrong(f"{param} is none, auto, required or a function by name", param)


def arguments_of(text: Any, param: str) -> dict[str, Any]:
    """The arguments of a call in a history: JSON text, or already an object. Raises `ApiRefusal`."""
    if isinstance(text, dict):
        return text
    try:
        found = parse_json(text or "{}") if isinstance(text, str | None) else None
    except Unreadable as error:
        raise wrong(f"{param}: not JSON ({error})", param) from None
    if not isinstance(found, dict):
        raise wrong(f"{param}: the arguments of a call are an object", param)
    return found


def checked_model(names: tuple[str, ...], given: str | None) -> str:
    """The name that answers bear. Raises `ApiRefusal` for a model that is not served."""
    if given is not None and given not in names:
        raise ApiRefusal(
            404, f"the model {given[:100]!r} does not exist here: {names[0]} does", "model", "model_not_found"
        )
    return given or names[0]


# --- of answers ---


def usage(answering: Answering) -> dict[str, Any]:
    """As chat and completions have it."""
    return {
        "prompt_tokens": answering.prompt_tokens,
        "completion_tokens": answering.completion_tokens,
        "total_tokens": answering.prompt_tokens + answering.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answering.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": answering.reasoning_tokens},
    }


def logprob(vocabulary: Vocabulary, token: int, value: float) -> dict[str, Any]:
    """A token and its log probability, as chats have it."""
    piece = vocabulary.pieces[token]
    return {"token": piece.decode(errors="replace"), "logprob": max(value, -9999.0), "bytes": list(piece)}


def logprobs(vocabulary: Vocabulary, shown: list[Shown]) -> dict[str, Any]:
    """As chats and responses have them."""
    return {
        "content": [
            {
                **logprob(vocabulary, each.token, each.logprob.logprob),
                "top_logprobs": [logprob(vocabulary, token, value) for token, value in each.logprob.top],
            }
            for each in shown
        ]
    }
