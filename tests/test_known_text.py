"""The template and the tokenizer that ship do their short work in this process, and answer as in the other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation import foreign_text, known_text
from model.errors import TokenizerError
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.load import embedded_checkpoint

SHIPPED = embedded_checkpoint()
NAMES = ("chat_template.jinja", "tokenizer.json")
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which either file ends in one byte more, which says nothing."""
    folder = tmp_path_factory.mktemp("strange") / "copy"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in NAMES:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n")
    return folder


@pytest.fixture(scope="module")
def both(strange: Path) -> list[ChatTemplate]:
    return [ChatTemplate.load(SHIPPED), ChatTemplate.load(strange)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the other process was asked."""
    found: list[str] = []
    ask = foreign_text.WORKER.ask

    def noted(request: dict[str, Any], seconds_a_byte: float = 0.0) -> dict[str, Any]:
        found.append(request["what"])
        return ask(request, seconds_a_byte)

    monkeypatch.setattr(foreign_text.WORKER, "ask", noted)
    yield found


def test_the_list_is_of_what_ships() -> None:
    """Who trains the embedded checkpoint again writes the new digests here, and looks at what is new."""
    assert {sha256((SHIPPED / name).read_bytes()).hexdigest() for name in NAMES} == set(known_text.KNOWN)


def test_what_ships_works_here_and_a_byte_more_does_not(asked: list[str], strange: Path) -> None:
    found = ChatTemplate.load(SHIPPED).encode(Tokenizer.load(SHIPPED), [USER])
    assert asked == []
    assert ChatTemplate.load(strange).encode(Tokenizer.load(strange), [USER]) == found
    assert asked == ["template", "tokenizer", "to ids"]


@pytest.mark.parametrize("which", NAMES)
def test_one_of_both_is_a_strangers(which: str, asked: list[str], strange: Path) -> None:
    template = ChatTemplate.load(strange if which == NAMES[0] else SHIPPED)
    tokenizer = Tokenizer.load(strange if which == NAMES[1] else SHIPPED)
    found = template.encode(tokenizer, [USER])
    assert found == tokenizer.encode(template.render([USER]))
    kinds = {"template": {"template", "to ids", "render"}, "tokenizer": {"tokenizer", "encode"}}
    assert set(asked) == kinds["template" if which == NAMES[0] else "tokenizer"]


def test_tokens_that_other_files_add_are_a_strangers(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first: this process is not handed them."""
    monkeypatch.delattr(known_text, "load")
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"cls_token": "<|new|>"}')
    assert len(Tokenizer.load(tmp_path).encode("<|new|>")) == 1 and asked == ["tokenizer", "encode"]


def test_what_is_long_is_done_elsewhere(asked: list[str], strange: Path) -> None:
    template, tokenizer = ChatTemplate.load(SHIPPED), Tokenizer.load(SHIPPED)
    long = [{"role": "user", "content": "a b" * known_text.MOST_BYTES}]
    text = template.render(long)
    assert asked == ["render", "template", "render"]  # which did not hold it until then
    assert template.encode(tokenizer, long) == tokenizer.encode(text) == Tokenizer.load(strange).encode(text)
    with pytest.raises(TokenizerError, match="is longer than the"):
        tokenizer.encode("a" * (foreign_text.MOST_TEXT_BYTES + 1))


def test_more_are_held_than_are_kept() -> None:
    templates = [ChatTemplate.load(SHIPPED) for _ in range(9)]
    assert len({each.render([USER]) for each in [*templates, templates[0]]}) == 1


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["</think>", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "name", "items"]), inner)
    ),
    max_leaves=6,
)
keys = st.sampled_from(["role", "content", "reasoning_content", "tool_calls", "thinking"])
roles = st.sampled_from(["system", "user", "assistant", "tool", "x"])
messages = st.builds(lambda held, role: {"role": role, **held}, st.dictionaries(keys, values), roles)


def outcome(template: ChatTemplate, work: Callable[[ChatTemplate], str]) -> str:
    try:
        return work(template)
    except TokenizerError as error:
        return str(error).replace(template.where, "")


@settings(max_examples=60, deadline=None)
@given(st.lists(messages | values, max_size=4), values, st.booleans() | values)
def test_any_chat_is_as_in_the_other_process(both: list[ChatTemplate], chat: Any, tools: Any, thinking: Any) -> None:
    tools = tools if isinstance(tools, list) else None
    one, other = (outcome(each, lambda held: held.render(chat, tools, enable_thinking=thinking)) for each in both)
    assert one == other
