"""What any dialect asks for, in one form; and what a service is given for it."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from foundation.errors import CapacityError, UsageError
from model.errors import TokenizerError
from runtime.api.endpoint import Endpoint
from runtime.api.guide import Guide, Rules
from runtime.api.reader import Reader
from runtime.api.refusal import ApiRefusal, wrong
from runtime.api.synthetic import Invented
from runtime.api.tools import Tool, ToolChoice
from runtime.serving.sampling import Sampling
from runtime.serving.service import Constraint, Job

MOST_CHOICES = 128  # answers to one request: prompts, times `n`
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1000
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "self"}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How tokens are chosen, and how many. None: as the checkpoint recommends, or off. temperature 0 is greedy.

    max_tokens: None for all that there is room for. logprobs: how many of the best to name beside each token.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1


@dataclasses.dataclass(frozen=True)
class JsonFormat:
    """JSON that is asked for. param: where the request says so."""

    schema: Any
    param: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request. Either `messages`, of a chat, or `prompts`, to continue: texts or token ids.

    thinking: None as the template has it. budget: tokens of thinking at most. variables: more of the template's.
    """

    drawn: Drawn = Drawn()
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] | None = None
    tools: Mapping[str, Tool] = dataclasses.field(default_factory=dict)
    choice: ToolChoice = ToolChoice()
    format: JsonFormat | None = None
    thinking: bool | None = None
    effort: str | None = None
    budget: int | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    param: str = "messages"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An ask as jobs, by prompt, then by `n`; and a reader to each."""

    prompts: list[tuple[int, ...]]
    jobs: list[Job]
    readers: list[Reader]


def rendered(endpoint: Endpoint, ask: Ask) -> list[list[int]]:
    """The token ids of each prompt. Raises `ApiRefusal`. Takes a while: not for the event loop."""
    vocabulary = endpoint.vocabulary
    if ask.messages is None:
        prompts = ask.prompts or []
        texts = [each for each in prompts if isinstance(each, str)]
        of_texts = iter(encoded(endpoint, texts, True, ask.param))
        found = [next(of_texts) if isinstance(each, str) else each for each in prompts]
    else:
        found = [_chat(endpoint, ask)]
    for prompt in found:
        if not prompt:
            raise wrong("the prompt has no tokens: give at least one", ask.param)
        if bad := next((token for token in prompt if not 0 <= token < vocabulary.size), None):
            raise wrong(f"no token has the id {bad}: there are {vocabulary.size:,}", ask.param)
    return found


def encoded(endpoint: Endpoint, texts: list[str], add_special_tokens: bool, param: str) -> list[list[int]]:
    """The token ids of each text. Raises `ApiRefusal`."""
    tokenizer = endpoint.vocabulary.tokenizer
    try:
        return tokenizer.encode_each(texts, add_special_tokens) if texts else []
    except TokenizerError as error:
        raise unnamed(error, tokenizer.where, param) from None


def unnamed(error: TokenizerError, where: str, param: str, what: str = "") -> ApiRefusal:
    """What is wrong with a text, without the name of a file of the server's."""
    return wrong(what + str(error).removeprefix(f"{where}: "), param)


def _chat(endpoint: Endpoint, ask: Ask) -> list[int]:
    template, tokenizer = endpoint.vocabulary.template, endpoint.vocabulary.tokenizer
    if template is None:
        raise ApiRefusal(400, "this checkpoint has no chat template: use /v1/completions", code="no_chat_template")
    if reserved := _RESERVED & set(ask.variables):
        raise wrong(f"{min(reserved)} is the request's own", "chat_template_kwargs")
    variables = dict(ask.variables)
    if ask.thinking is not None:
        variables["enable_thinking"] = ask.thinking
    if ask.effort is not None:
        variables["reasoning_effort"] = ask.effort
    tools = [tool.spelt() for tool in ask.tools.values()] or None
    messages = ask.messages or []
    if len(messages) > endpoint.max_positions:  # before a template takes its time with them
        message = f"{len(messages):,} messages are more than the model's {endpoint.max_positions:,} positions"
        raise wrong(message, ask.param, "context_length_exceeded")
    try:
        return template.encode(tokenizer, messages, tools, **variables)
    except TokenizerError as error:
        if str(error).startswith(f"{tokenizer.where}: "):
            raise unnamed(error, tokenizer.where, ask.param) from None
        raise unnamed(error, template.where, ask.param, "the chat template refuses this: ") from None


def prepared(endpoint: Endpoint, ask: Ask) -> Prepared:
    """Everything that can be wrong with an ask is found here. Raises `ApiRefusal`. Not for the event loop."""
    prompts = rendered(endpoint, ask)
    room = [_room(endpoint, ask, prompt) for prompt in prompts]
    rules, tools = _rules(endpoint, ask)
    vocabulary, drawn = endpoint.vocabulary, ask.drawn
    if len(prompts) * drawn.n > MOST_CHOICES:
        raise wrong(f"{len(prompts) * drawn.n} answers to one request are more than {MOST_CHOICES}", "n")
    seed = secrets.randbits(62) if drawn.seed is None else drawn.seed % 2**62
    jobs, readers = [], []
    for prompt, most in zip(prompts, room, strict=True):
        thinking = ask.messages is not None and vocabulary.thinking_after(prompt)
        for number in range(drawn.n):
            jobs.append(
                Job(
                    prompt_ids=tuple(prompt),
                    max_tokens=most,
                    sampling=_sampling(endpoint, drawn, seed + number),
                    stop_ids=rules.ends,
                    min_tokens=min(drawn.min_tokens, most),
                    logprobs=drawn.logprobs,
                    constraint=_constraint(endpoint, rules, thinking, most, seed + number),
                )
            )
            plain = ask.messages is None
            readers.append(Reader(vocabulary, thinking, tools, drawn.stops, rules.ends, plain))
    return Prepared([tuple(prompt) for prompt in prompts], jobs, readers)


def _room(endpoint: Endpoint, ask: Ask, prompt: list[int]) -> int:
    """How many tokens the answer to a prompt may have: no more than there is room for behind it."""
    left = endpoint.max_positions - len(prompt)
    if left < 1:
        message = f"the prompt has {len(prompt):,} tokens, and the model {endpoint.max_positions:,} positions"
        raise wrong(f"{message} for it and the answer: shorten it", ask.param, "context_length_exceeded")
    most = left if ask.drawn.max_tokens is None else min(left, ask.drawn.max_tokens)
    try:
        endpoint.service.check(len(prompt), most)
    except CapacityError as error:
        raise wrong(str(error), ask.param, "context_length_exceeded") from None
    except UsageError as error:
        raise wrong(str(error), ask.param) from None
    return most


def _rules(endpoint: Endpoint, ask: Ask) -> tuple[Rules, Mapping[str, Tool] | None]:
    """What holds for the answers, and the tools that a reader looks for."""
    vocabulary, choice = endpoint.vocabulary, ask.choice
    ends = ask.drawn.stop_ids | (frozenset() if ask.drawn.ignore_eos else vocabulary.stop_ids)
    text = calls = None
    if ask.format is not None:
        text = endpoint.compiled(endpoint.grammars.answer, ask.format.schema, ask.format.param)
    wanted = dict(ask.tools) if choice.mode != "none" else {}
    if wanted and not vocabulary.markup.calls:
        raise wrong("this checkpoint's tokenizer has no tokens for calls", "tools")
    if choice.name is not None:
        if choice.name not in wanted:
            raise wrong(f"no tool is named {choice.name}", "tool_choice")
        wanted = {choice.name: wanted[choice.name]}
    if choice.mode == "required" and not wanted:
        raise wrong("a call is required, and there are no tools", "tool_choice")
    if wanted:
        calls = endpoint.compiled(endpoint.grammars.calls, wanted)
        wanted = {name: dataclasses.replace(tool, exact=name not in calls.inexact) for name, tool in wanted.items()}
    budget = ask.budget if vocabulary.markup.thinks else None
    required, forbid = choice.mode == "required", bool(ask.tools) and not wanted
    rules = Rules(vocabulary, ends, text, calls, required, choice.parallel, forbid, budget)
    return rules, wanted or None


def _constraint(endpoint: Endpoint, rules: Rules, thinking: bool, most: int, seed: int) -> Constraint | None:
    if endpoint.inventor is not None:
        return Invented(endpoint.inventor, Guide(rules, thinking), most, rules.ends, seed)
    return Guide(rules, thinking) if rules.needed else None


def _sampling(endpoint: Endpoint, drawn: Drawn, seed: int) -> Sampling:
    def chosen(name: str, otherwise: Any) -> Any:
        given = getattr(drawn, name)
        return endpoint.recommended.get(name, otherwise) if given is None else given

    for token in drawn.bias:
        if not 0 <= token < endpoint.vocabulary.size:
            raise wrong(f"no token has the id {token}: there are {endpoint.vocabulary.size:,}", "logit_bias")
    try:
        return Sampling(
            temperature=float(chosen("temperature", 1.0)),
            top_p=float(chosen("top_p", 1.0)),
            top_k=max(0, chosen("top_k", 0)),
            seed=seed,
            min_p=drawn.min_p,
            bias=tuple(drawn.bias.items()),
        )
    except UsageError as error:
        raise wrong(str(error)) from None
