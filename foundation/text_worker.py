"""Tokenizers and chat templates of strangers at work, in a process of their own: the other side of `foreign_text`.

Run by `child.Child`: a regular expression, a normalizer or a template may hang, take all memory, or end the process
that it runs in. Imported by `known_text` alone, for those that do not.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.exceptions import SecurityError

from foundation.child import one_line, serve
from foundation.template_sandbox import Sandbox

_MOST_HELD = 8  # tokenizers and templates: those asked for last
_MOST_CHARACTERS = 1 << 26  # of what a template makes
_ONE_THREAD = os.environ.get("TOKENIZERS_PARALLELISM") == "false"  # as the child is started
# Plain text, in which nothing has a name of its own: what cannot bear it does not get as far as a prompt.
_PROBE = "The quick brown fox, 47 of 1000.\n\taaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab  Ünï 天地 \U0001f996"
_held: OrderedDict[int, Any] = OrderedDict()


class _TemplateFailure(Exception):
    """What is wrong with a template."""


def _load_tokenizer(text: str, special: list[str]) -> tuple[Any, dict[str, Any]]:
    """A tokenizer, and which of the special tokens that other files name it does not know yet."""
    inner = tokenizers.Tokenizer.from_str(text)
    inner.no_truncation()
    inner.no_padding()
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    new = [token for token in special if token not in known]
    inner.add_special_tokens(new)
    try:
        for text in ("", _PROBE):
            ids = inner.encode(text, add_special_tokens=True).ids
            inner.decode(ids, skip_special_tokens=False)
    except Exception:
        pass  # a vocabulary without a token for it: then other texts may have one. A panic is no `Exception`.
    return inner, {"special": new}


def _encode(inner: Any, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
    return {"ids": [_ids(inner, text, add_special_tokens) for text in texts]}


def _ids(inner: Any, text: str, add_special_tokens: bool) -> str:
    """Token ids, each as four bytes in hexadecimal: a third of the time that numbers in JSON take. Where each is in the
    text, which is a third of the work of `encode`, nobody asks."""
    if _ONE_THREAD:
        (found,) = inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    else:  # than to start the library's threads
        found = inner.encode(text, add_special_tokens=add_special_tokens)
    return array("I", found.ids).tobytes().hex()


def _decode(inner: Any, ids: list[int], skip_special_tokens: bool) -> dict[str, Any]:
    return {"text": inner.decode(ids, skip_special_tokens=skip_special_tokens)}


def _describe(inner: Any) -> dict[str, Any]:
    return {"text": inner.to_str()}


class Template:
    """A template. render: its text for a context, as `jinja2.Template.render` has it, which gathers what the sandbox
    brings anew each time."""

    def __init__(self, source: str):
        self._inner = Sandbox().from_string(source)
        self._brought = dict(self._inner.globals)

    def render(self, given: dict[str, Any]) -> str:
        context = self._inner.new_context({**self._brought, **given}, shared=True)
        return "".join(self._inner.root_render_func(context))


def _load_template(source: str) -> tuple[Any, dict[str, Any]]:
    return _told(Template, source), {}


def _render(template: Template, contexts: list[dict[str, Any]]) -> dict[str, Any]:
    texts, size = [], 0
    for context in contexts:
        texts.append(_told(template.render, context))
        size += len(texts[-1])
        if size > _MOST_CHARACTERS:
            raise _TemplateFailure(f"makes a text of {size:,} characters, more than {_MOST_CHARACTERS:,}")
    return {"texts": texts}


def _to_ids(template: Template, context: dict[str, Any], tokenizer: int, most_bytes: int) -> dict[str, Any]:
    """The token ids of a chat; its text where it has more than `most_bytes`, or the tokenizer is not held or does
    not do it: asked on its own, that says what is wrong."""
    text = _render(template, [context])["texts"][0]
    if tokenizer in _held:
        _held.move_to_end(tokenizer)
        try:
            if len(text.encode()) > most_bytes:
                return {"text": text}
            return {"ids": _ids(_held[tokenizer], text, add_special_tokens=False)}
        except KeyboardInterrupt:  # where this is not the other process
            raise
        except BaseException:  # a panic is no `Exception`
            pass
    return {"text": text}


def _told(work: Callable[[Any], Any], given: Any) -> Any:
    try:
        return work(given)
    except jinja2.TemplateSyntaxError as error:
        raise _TemplateFailure(f"line {error.lineno}: {one_line(error)}") from None
    except SecurityError as error:
        raise _TemplateFailure(f"refused by the sandbox: {one_line(error)}") from None


_LOAD: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {"tokenizer": _load_tokenizer, "template": _load_template}
_USE: dict[str, Callable[..., dict[str, Any]]] = {
    "encode": _encode, "decode": _decode, "describe": _describe, "render": _render, "to ids": _to_ids
}  # fmt: skip


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for; what is raised says why it is not to be had."""
    number, what, given = request["number"], request["what"], request["given"]
    if what in _LOAD:
        held, found = _LOAD[what](**given)
        _held[number] = held
        if len(_held) > _MOST_HELD:
            _held.popitem(last=False)
        return found
    if number not in _held:
        return {"absent": True}
    _held.move_to_end(number)
    return _USE[what](_held[number], **given)


def main(lifeline: int) -> NoReturn:
    """Serves the process that started this one."""
    serve(answer, lifeline)
