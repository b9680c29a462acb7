"""Chats to text: GLM-5's format, transformers' rendering, and templates that misbehave."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from foundation import foreign_text
from foundation.template_sandbox import Sandbox
from model.errors import TokenizerError
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.api.ask import _RESERVED
from tests.marks import slow_but
from tests.model.test_tokenizer import TINY, TOKENIZER, hugging_face

GLM = ChatTemplate.load(TINY)
USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "天气 <&>", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3, "x": ["é", None]}}}
THOUGHT = {"role": "assistant", "content": "Hello", "reasoning_content": "greet"}


def rendered(*messages: dict[str, Any], **variables: Any) -> str:
    return GLM.render(messages, **variables)


# --- GLM-5's format ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "variables", "expected"),
    [
        ([USER], {}, "<|user|>Hi<|assistant|><think>"),
        ([USER], {"enable_thinking": False}, "<|user|>Hi<|assistant|></think>"),
        ([USER], {"enable_thinking": None}, "<|user|>Hi<|assistant|><think>"),
        ([USER], {"add_generation_prompt": False}, "<|user|>Hi"),
        ([USER], {"reasoning_effort": "max"}, "<|system|>Reasoning Effort: Max<|user|>Hi<|assistant|><think>"),
        ([{"role": "system", "content": "Be brief."}, USER], {}, "<|system|>Be brief.<|user|>Hi<|assistant|><think>"),
        (
            [USER, THOUGHT, USER],
            {},
            "<|user|>Hi<|assistant|></think>Hello<|user|>Hi<|assistant|><think>",
        ),
        (
            [USER, THOUGHT, USER],
            {"clear_thinking": False},
            "<|user|>Hi<|assistant|><think>greet</think>Hello<|user|>Hi<|assistant|><think>",
        ),
        (
            [USER, {"role": "assistant", "content": "<think>greet</think>\nHello"}],
            {"add_generation_prompt": False},
            "<|user|>Hi<|assistant|><think>greet</think>Hello",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [CALL]}, *[{"role": "tool", "content": str(n)} for n in (1, 2)]],
            {"enable_thinking": False},
            "<|user|>Hi<|assistant|></think><tool_call>weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
            "<arg_key>days</arg_key><arg_value>3</arg_value><arg_key>x</arg_key>"
            '<arg_value>["é", null]</arg_value></tool_call>'
            "<|observation|><tool_response>1</tool_response><tool_response>2</tool_response><|assistant|></think>",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}]}],
            {},
            "<|user|>A<|assistant|><think>",
        ),
    ],
)  # fmt: skip
def test_the_format(messages: list[dict[str, Any]], variables: dict[str, Any], expected: str) -> None:
    assert GLM.render(messages, **variables) == "[gMASK]<sop>" + expected


def test_tools_come_first_as_plain_json() -> None:
    text = rendered(USER, tools=[WEATHER])
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n")
    assert f"<tools>\n{json.dumps(WEATHER, ensure_ascii=False)}\n</tools>" in text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "wizard", "content": "Hi"}, "unknown role wizard"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "must be an object"),
    ],
)
def test_what_the_template_itself_refuses(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(TokenizerError, match=expected):
        rendered(message)


# --- as transformers renders ---------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
arguments = st.dictionaries(texts, texts | st.integers() | st.lists(st.booleans() | texts, max_size=2), max_size=2)
calls = st.builds(lambda name, given: {"function": {"name": name, "arguments": given}}, texts, arguments)
thoughts = {name: texts | st.none() for name in ("reasoning_content", "thinking", "reasoning")}
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": texts}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": texts | st.none()},
        optional={**thoughts, "tool_calls": st.lists(calls, max_size=2) | st.none(), "name": st.none()},
    ),
)
switches = st.fixed_dictionaries(
    {}, optional={name: st.booleans() for name in ("add_generation_prompt", "enable_thinking", "clear_thinking")}
)


@given(st.lists(messages, min_size=1, max_size=6), st.none() | st.just([WEATHER]), switches)
def test_any_chat_is_as_transformers_renders_it(chat: list[dict], tools: Any, options: dict[str, bool]) -> None:
    options = {"add_generation_prompt": True, **options}
    theirs = hugging_face(TINY)
    text = GLM.render(chat, tools, **options)
    assert text == theirs.apply_chat_template(chat, tools=tools, tokenize=False, **options)
    ids = theirs.apply_chat_template(chat, tools=tools, return_dict=False, **options)
    assert TOKENIZER.encode(text) == ids


CONVENTIONS = [  # of templates of other families: where they look for thoughts, and what they make of no content
    "{% for m in messages %}<{{ m.role }}>{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['reasoning_content'] or '' }}|{{ m['content'] or '' }}{% endfor %}",
    "{% for m in messages %}{{ m.content is none }}{{ m.content is defined }}{{ m.get('content', '-') }}{% endfor %}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.reasoning }}{% endif %}"
    "{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}"
    "{% endfor %}",
    "{% for m in messages if m.role == 'assistant' and m.tool_calls is not none %}{{ m.tool_calls }}{% endfor %}",
]


@pytest.mark.parametrize("source", CONVENTIONS)
@settings(max_examples=25)
@given(st.lists(messages, min_size=1, max_size=3))
def test_history_is_as_transformers_passes_it_on(source: str, chat: list[dict]) -> None:
    theirs = hugging_face(TINY).apply_chat_template(chat, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(chat, add_generation_prompt=False) == theirs


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_history_are_kept_under_each_of_their_names(key: str) -> None:
    chat = [USER, {"role": "assistant", "content": "x", "tool_calls": None, key: "because"}]
    text = GLM.render(chat, add_generation_prompt=False)
    assert text == "[gMASK]<sop><|user|>Hi<|assistant|><think>because</think>x"
    assert text == hugging_face(TINY).apply_chat_template(chat, tokenize=False)


def test_no_content_is_not_spelt_out() -> None:
    chat = [USER, {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": [CALL]}]
    assert "None" not in GLM.render(chat) and GLM.render(chat) == GLM.render([USER, {**chat[1], "content": ""}])


@pytest.mark.parametrize(
    ("chat", "expected"), [([], "has no messages"), ([USER, "Hi"], "message 2 of the chat is a str, not an object")]
)
def test_what_is_no_chat(chat: list[Any], expected: str) -> None:
    with pytest.raises(TokenizerError, match=expected):
        GLM.render(chat)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if loop.first %}\n first\n  {% endif %}\n{{ m.content }}{{ loop.length }}"
        "\n{% endfor %}\n",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.revindex }}{% endfor %}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
        "{{ messages[0]|tojson }}{{ messages[2]|tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'}|tojson(sort_keys=true) }}",
        "{{ messages|map(attribute='role')|join(', ') }}{{ 'a' ~ 1 ~ none ~ undefined_name }}{{ 'x' * 3 }}{{ 7 % 4 }}"
        "{{ 2 ** 5 }}",
        "{% set ns = namespace(n=0) %}{% for a in range(9) if a % 2 recursive %}{% set ns.n = ns.n + a %}{% else %}"
        "-{% endfor %}{{ ns.n }}",
        "{% macro f(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ f(1) }}{{ '%s' % 'a' }}{{ strftime_now('%Y') }}",
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% else %}none{% endfor %}"
        "{{ missing.x is defined }}",
        "{{ eos_token }}{{ documents is none }}{{ tools is none }}{{ bos_token is defined }}",
    ],
)  # fmt: skip
def test_any_template_is_as_transformers_renders_it(source: str) -> None:
    chat = [USER, THOUGHT, {"role": "user", "content": "<b>é</b>"}]
    ours = ChatTemplate(source, variables={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    options = {"chat_template": source, "tokenize": False, "add_generation_prompt": True}
    try:
        theirs = hugging_face(TINY).apply_chat_template(chat, **options)
    except Exception:  # whatever transformers refuses, so do we
        with pytest.raises(TokenizerError):
            ours.render(chat)
    else:
        assert ours.render(chat) == theirs


# --- templates that misbehave --------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ [1]|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self.__init__ }}",
    "{{ dict.mro() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
]
CHANGES = ["{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}"]
DOUBLED = "{% set ns = namespace(x=['x']) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
TWICE = (
    "{% set a, b = namespace(x=[0]), namespace(x=[0]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
    "{% set b.x = [b.x, b.x] %}{% endfor %}"
)
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    TWICE + "{{ a.x == b.x }}",
    "{% set a = [0] * 10**7 %}{% for i in range(99999) %}{% set x = a | sum %}{% endfor %}",
    "{% set a = 'a' * 10**7 %}{% for i in range(99999) %}{% set x = a.count('b') %}{% endfor %}",
    "{% set a = ('a' * 10**7).encode() %}{% for i in range(99999) %}{% if a[1:] == a %}{% endif %}{% endfor %}",
    "{{ 7 ** 77777777 > 0 }}",
]
HUGE = [
    DOUBLED + "{{ ns.x }}",
    "{% set ns = namespace(x='aaaa'.encode()) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set a = [0] * 10**6 %}{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = [a.copy(), ns.x] %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ [1]|batch(10**10, 'x')|list }}",
]
BROKEN = [
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages[0].nope.no }}", "has no attribute 'nope'"),
    ("{{ raise_exception('two\nlines') }}", "two lines"),
    ("{{ lipsum(5) }}", "'lipsum' is undefined"),
    ("{{ range(10**9) }}", "Range too big"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ 3 ** 99999 }}", "limit (4300 digits)"),
    ("{{ 'a' * 10**8 }}", "makes a text of 100,000,000 characters"),
    ("{{ raise_exception('x' * 10**6 ~ '\x1b[2J') }}", "xxx..."),
]


def soon_failure(source: str) -> str:
    """The failure of a template that is given less time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(foreign_text.WORKER, "cpu_seconds", 0.2)
        return failure(source)


def failure(source: str) -> str:
    with pytest.raises(TokenizerError) as raised:
        ChatTemplate(source, "its/chat_template.jinja").render([USER])
    message = str(raised.value)
    assert "\n" not in message and message.startswith("its/chat_template.jinja: ")
    return message


@pytest.mark.parametrize("source", ESCAPES + CHANGES)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    message = failure(source)
    assert "refused by the sandbox" in message and "unsafe" in message or source in CHANGES


def test_what_is_looked_up_is_as_in_jinjas_sandbox() -> None:
    """Keys and methods of dicts, strings and loops have a way of their own here."""
    ours, theirs = Sandbox(), ImmutableSandboxedEnvironment()
    ours.unsafe_undefined = lambda obj, attribute: None  # type: ignore[method-assign]
    theirs.unsafe_undefined = lambda obj, attribute: None  # type: ignore[method-assign]
    loop = LoopContext(["a", "b"], jinja2.Undefined)
    next(loop)
    names = {*dir(dict), *dir(str), *dir(list), *dir(loop), "role", "items", "0", ""}
    for held in ({"role": "a", "items": 1, "": 2, "__class__": 3}, {}, "text", Markup("text"), ["a"], 7, None, loop):
        for name in names:
            looked = [(ours.getattr(held, name), theirs.getattr(held, name))]
            looked.append((ours.getitem(held, name), theirs.getitem(held, name)))
            for found, expected in looked:
                assert type(found) is type(expected), (held, name)
                if not isinstance(found, jinja2.Undefined) and "format" not in name:
                    assert found == expected, (held, name)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(x, 3, 4, c=5) }}{{ m(b=x) }}",
        "{% macro m(a) %}{{ a }}{{ caller(a) }}{% endmacro %}{% call(b) m(x) %}<{{ b }}>{% endcall %}",
        "{% macro m(a) %}[{{ a|default('none') }}{{ y }}]{% endmacro %}{% for y in z %}{{ m() }}{{ m(y) }}{% endfor %}",
        "{% autoescape true %}{% macro m(a) %}<{{ a }}{% endmacro %}{{ m('<') }}{{ m(x) }}{% endautoescape %}",
        "{% for k, v in d.items() %}{{ loop.index, loop.last }}{{ loop.cycle(1, 2) }}{{ loop.changed(v) }}{% endfor %}",
        "{{ d.get('k') }}{{ d.get('none', x) }}{{ d.keys()|list }}{{ d['none'] is defined }}{{ d['items']() | list }}",
        "{% for y in z recursive %}{{ loop.depth }}{% if y is not string %}{{ loop(y) }}{% endif %}{% endfor %}",
        "{{ x.split('e')|map('upper')|join }}{{ '{0.real}'.format(7) }}{{ x.encode() }}{{ namespace(a=x).a }}",
    ],
)
def test_what_is_called_is_as_in_jinjas_sandbox(source: str) -> None:
    given = {"x": "text<", "z": [["a"], ["b", "c"]], "d": {"k": 1, "l": 1}}
    assert Sandbox().from_string(source).render(given) == ImmutableSandboxedEnvironment().from_string(source).render(
        given
    )


@pytest.mark.parametrize("source", slow_but([ENDLESS[1], ENDLESS[2], ENDLESS[-1]], ENDLESS))
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    assert soon_failure(source) == "its/chat_template.jinja: takes more than the 0.2 s that it is given"
    assert rendered(USER).endswith("Hi<|assistant|><think>")  # what the others have is there again


@pytest.mark.parametrize("work", [ChatTemplate.render, ChatTemplate.render_each, ChatTemplate.encode])
def test_a_variable_may_have_any_name_but_those_of_a_request(work: Callable[..., Any]) -> None:
    """What a server passes on is a stranger's: no parameter of ours may be in its way that the server lets through."""
    here = {
        name
        for name, each in inspect.signature(work).parameters.items()
        if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)
    }
    assert here == {"tools", "add_generation_prompt", "chat_template"} <= _RESERVED
    ours = {"self", "tokenizer", "messages", "chats", "variables", "contexts", "context", "what", "number", "template"}
    asked = dict.fromkeys(ours, 1)
    assert GLM.render([USER], **asked) == GLM.render([USER])
    assert GLM.encode(TOKENIZER, [USER], **asked) == GLM.encode(TOKENIZER, [USER])


def test_several_chats_at_once_are_as_one_by_one() -> None:
    chats = [[USER], [USER, THOUGHT, USER], [{"role": "user", "content": "天 \ud83d"}]]
    assert GLM.render_each(chats, enable_thinking=False) == [GLM.render(each, enable_thinking=False) for each in chats]
    assert GLM.render_each([]) == [] and TOKENIZER.encode_each(["a b", ""]) == [TOKENIZER.encode("a b"), []]


@pytest.mark.parametrize("source", slow_but([HUGE[0], HUGE[3], HUGE[-1]], HUGE))
def test_a_template_that_takes_all_memory_is_stopped(source: str) -> None:
    assert re.search("takes more than the (1.6 GB of memory|0.2 s) that it is given", soon_failure(source))
    assert rendered(USER).endswith("Hi<|assistant|><think>")


@pytest.mark.parametrize(("source", "expected"), BROKEN)
def test_a_template_that_fails_says_why(source: str, expected: str) -> None:
    assert expected in failure(source)


@pytest.mark.parametrize("source", ["{% if x %}", "{{ }}", "{% for %}", "\n{% nonsense %}", "{{ 'a"])
def test_a_syntax_error_has_a_line(source: str) -> None:
    assert re.search(r"jinja: line \d+: ", failure(source))


def test_a_long_chat_is_within_the_limits() -> None:
    turn = [USER, {**THOUGHT, "content": "word " * 400, "tool_calls": [CALL]}, {"role": "tool", "content": "x" * 500}]
    text = GLM.render(turn * 1000, clear_thinking=False)
    assert text.count("<tool_call>") == 1000


def test_a_chat_must_be_json() -> None:
    with pytest.raises(TokenizerError, match="must be JSON data"):
        GLM.render([{"role": "user", "content": object()}])


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"tools": [WEATHER]}])
def test_ids_at_once_are_those_of_the_text(variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the other process does both, or has to be asked for the second on its own."""
    chat = [USER, THOUGHT | {"tool_calls": [CALL]}, {"role": "tool", "content": "12 \u00b0C <|user|>"}]
    expected = TOKENIZER.encode(GLM.render(chat, **variables))
    assert GLM.encode(TOKENIZER, chat, **variables) == expected
    foreign_text.WORKER.end()  # what was held is gone
    assert GLM.encode(TOKENIZER, chat, **variables) == expected
    own = Tokenizer.load(TINY)
    own.foreign = None
    assert GLM.encode(own, chat, **variables) == expected
    monkeypatch.setattr(foreign_text, "MOST_TEXT_BYTES", 20)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot encode the text \(a text of \d+ bytes"):
        GLM.encode(TOKENIZER, chat, **variables)


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "{{ messages[7].role.x }}"])
def test_ids_of_what_a_template_refuses(source: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(TokenizerError) as alone:
        template.render([USER])
    with pytest.raises(TokenizerError) as both:
        template.encode(TOKENIZER, [USER])
    assert str(both.value) == str(alone.value)
    with pytest.raises(TokenizerError, match="the chat must be JSON data"):
        GLM.encode(TOKENIZER, [{**USER, "x": object()}])


def test_a_template_does_not_change_the_chat() -> None:
    chat = [{"role": "user", "content": ["a"]}]
    with pytest.raises(TokenizerError):
        ChatTemplate("{% do messages[0].content.append('b') %}").render(chat)
    assert chat == [{"role": "user", "content": ["a"]}]


# --- files ---------------------------------------------------------------------------------------


def test_where_templates_are_found(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        ChatTemplate.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "one{{ bos_token }}", "bos_token": {"content": "<s>"}}')
    assert ChatTemplate.load(tmp_path).render([USER]) == "one<s>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render([USER]) == "two"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("three{{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render([USER]) == "three</s>"


@pytest.mark.parametrize(
    "content", ['{"chat_template": 3}', '{"chat_template": [1]}', '{"chat_template": [{"name": "x"}]}']
)
def test_a_template_of_the_wrong_kind(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match="has no chat template"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="cannot be read"):
        ChatTemplate.load(tmp_path)


def test_rendered_text_ends_where_the_model_goes_on() -> None:
    ids = Tokenizer.load(TINY).encode(rendered(USER))
    assert ids[:3] == [TOKENIZER.token_id(name) for name in ("[gMASK]", "<sop>", "<|user|>")]
    assert ids[-2:] == [TOKENIZER.token_id(name) for name in ("<|assistant|>", "<think>")]


# --- several, by name ----------------------------------------------------------------------------

NAMED = {
    "default": "plain {{ messages[0].content }}",
    "tool_use": "tools {% for tool in tools %}{{ tool.function.name }}{% endfor %}",
    "rag": "rag {{ messages[0].content }}",
}


@pytest.fixture(params=["a list in tokenizer_config.json", "files"])
def several(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of several templates, spelt in one of the two ways."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    if request.param == "files":
        (tmp_path / "additional_chat_templates").mkdir()
        for name, text in NAMED.items():
            inner = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (tmp_path / inner).write_text(text)
        return tmp_path
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in NAMED.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("tools", [None, [], [WEATHER]])
@pytest.mark.parametrize("name", [None, "default", "tool_use", "rag"])
def test_which_of_several_templates(several: Path, name: str | None, tools: list[Any] | None) -> None:
    if name == "tool_use" and tools is None:
        tools = [WEATHER]  # else it is an error in both
    ours = ChatTemplate.load(several).render([USER], tools, chat_template=name)
    theirs = hugging_face(several).apply_chat_template(
        [USER], tools=tools, chat_template=name, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_a_template_that_is_not_there_is_named(several: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template called 'rags'; there is 'default', 'rag', 'tool_use'$"):
        ChatTemplate.load(several).render([USER], chat_template="rags")
    with pytest.raises(TokenizerError, match="no chat template called 'default'; there is 'x'$"):
        ChatTemplate({"x": "{{ messages }}"}).render([USER])
    broken = ChatTemplate({"default": "fine", "tool_use": "{% if %}"}, "t.jinja")  # as long as nobody asks for it
    assert broken.render([USER]) == "fine"
    with pytest.raises(TokenizerError, match="t.jinja: tool_use: line 1"):
        broken.render([USER], [])


def test_templates_lie_inside_the_checkpoint(several: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "more.jinja").write_text("secret")
    more = several / "additional_chat_templates"
    if more.exists():
        for each in more.iterdir():
            each.unlink()
        more.rmdir()
    more.symlink_to(outside)
    with pytest.raises(TokenizerError, match="a link that leads out of the folder"):
        ChatTemplate.load(several)
