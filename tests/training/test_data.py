"""The training text: right answers, an honest split, and the checkpoint's own chat format."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import ChatTemplate, Tokenizer
from runtime.execution.local.load import embedded_checkpoint
from runtime.training import config, export, words
from runtime.training.data import OTHER_WEIGHT, TASKS, Generator, held_out, parse_call

READ = config.read(config.DEFAULT)
# The tokenizer that the config gives, as tests/training/test_embedded.py proves.
GENERATOR = export.make_generator(READ, tokenizers.Tokenizer.from_file(str(embedded_checkpoint() / "tokenizer.json")))
TOKENIZER: Tokenizer = GENERATOR.tokenizer
ALL = dict.fromkeys(TASKS, 1.0)


def text_of(task: str, rows: int = 40) -> str:
    rng = np.random.default_rng(0)
    return "".join(TOKENIZER.decode(GENERATOR.row(rng, task, 192)[0]) for _ in range(rows))


def sums(text: str) -> set[tuple[int, int, int]]:
    found = re.findall(r"<\|user\|>(\d+)\+(\d+)=<\|assistant\|>(?:<think>)?</think>(\d+)(?=<\|user\|>)", text)
    return {(int(a), int(b), int(c)) for a, b, c in found}


def test_sums_are_right_and_none_is_held_out() -> None:
    found = sums(text_of("arithmetic"))
    assert len(found) > 400
    assert all(a + b == c and not held_out(a, b) for a, b, c in found)


def test_answers_of_recall_are_what_was_told() -> None:
    checked = 0
    for document in text_of("recall").split("[gMASK]")[1:]:
        told = dict(re.findall(r" (\w+):(\w+)", document))
        assert not any(held_out(name, thing) for name, thing in told.items() if thing in words.THINGS)
        answers = r"Find (\w+)<\|assistant\|>(?:<think>)?</think>Found (\w+):(\w+)(?=<\|user\|>)"
        for asked, name, thing in re.findall(answers, document):
            assert asked == name and told[name] == thing
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("task", TASKS)
def test_every_question_is_about_a_held_out_fact(task: str) -> None:
    for question in GENERATOR.questions(task, 60):
        last = question.prompt.rpartition("<|user|>")[2].partition("<|assistant|>")[0]
        if task == "arithmetic":
            a, b = map(int, last.rstrip("=").split("+"))
            assert held_out(a, b) and question.answer == str(a + b)
        elif task == "copy":
            said = last.removeprefix("Repeat: ")
            assert held_out(*said.split()) and question.answer == said
        elif task == "recall":
            name = last.rpartition(" ")[2]
            fact = question.answer.removeprefix("Found ")
            assert held_out(*fact.split(":")) and fact.startswith(f"{name}:")
            assert question.prompt[question.fact_at :].startswith(f" {fact}")
        elif task == "tools":
            assert question.call is not None
            arguments = question.call["arguments"]
            fact = (question.call["name"], *arguments.values()) if "city" in arguments else tuple(arguments.values())
            assert held_out(*fact)
            parsed = parse_call(question.answer)
            assert parsed == {"name": question.call["name"], "arguments": {k: str(v) for k, v in arguments.items()}}
            assert f'"name": "{question.call["name"]}"' in question.prompt
        else:
            the, colour, animal, move, way, _, place, _ = re.findall(r"\w+", question.prompt)
            assert held_out(colour, animal, move, way, place)
            assert question.answer == f" lives in the {words.HOMES[animal]}."


def test_recall_is_asked_far_past_the_selection() -> None:
    index = READ.model.indexer
    assert index is not None
    for question in GENERATOR.questions("recall", 100):
        prompt = TOKENIZER.encode(question.prompt)
        assert len(prompt) - len(TOKENIZER.encode(question.prompt[: question.fact_at])) >= 2 * index.topk
        assert len(prompt) < max(stage.length for stage in READ.stages)


@given(st.integers(0, 10_000), st.sampled_from([64, 128, 192]))
@settings(max_examples=20, deadline=None)
def test_a_batch_is_a_function_of_seed_and_step(step: int, length: int) -> None:
    first, again = (GENERATOR.batch(step, 4, length, ALL) for _ in range(2))
    other = Generator(GENERATOR.tokenizer, GENERATOR.template, seed=99).batch(step, 4, length, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.weights.shape == (4, length)
    assert set(np.unique(first.weights)) <= {np.float32(w) for w in (0.0, OTHER_WEIGHT, 2 * OTHER_WEIGHT, 1.0)}
    assert first.tokens.min() >= 0 and first.tokens.max() < READ.model.vocab_size


def test_weights_mark_the_answers_of_a_chat() -> None:
    ids, weights = GENERATOR.row(np.random.default_rng(1), "arithmetic", 96)
    marked = TOKENIZER.decode([token for token, weight in zip(ids, weights, strict=True) if weight == 1.0])
    told = re.findall(r"</think>(\d+<\|user\|>)", TOKENIZER.decode(ids))
    assert marked.replace("</think>", "").startswith("".join(told))


def test_the_tokenizer_has_digits_alone_and_its_words_whole() -> None:
    assert len(TOKENIZER.encode("123")) == 3
    for word in (*words.NAMES, *words.THINGS):
        assert len(TOKENIZER.encode(f" {word}")) == 1
    for thing in words.THINGS:
        assert len(TOKENIZER.encode(thing)) == len(TOKENIZER.encode(f":{thing}")) == 1
    for token in ("<|user|>", "<think>", "<tool_call>", "<arg_value>"):
        assert TOKENIZER.encode(token) == [TOKENIZER.token_id(token)]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_chats_are_in_the_template_of_the_checkpoint(tmp_path: Path) -> None:
    """A rendered question is what the checkpoint's template says to the messages, thinking off."""
    template = ChatTemplate(export.TEMPLATE.read_text(encoding="utf-8"))
    question = GENERATOR.questions("arithmetic", 1)[0]
    asked = re.findall(r"<\|user\|>(.*?)<\|assistant\|>", question.prompt)[-1]
    assert template.render([{"role": "user", "content": asked}], enable_thinking=False) == question.prompt


@pytest.mark.parametrize(
    "text",
    ["", "85", "<tool_call>add</tool_call> ", "<tool_call>add<arg_key>a</arg_key></tool_call>",
     "<tool_call></tool_call>", "<tool_call>a</tool_call><tool_call>b</tool_call>"],
)  # fmt: skip
def test_what_is_no_single_call_does_not_parse(text: str) -> None:
    assert parse_call(text) is None


def test_harder_questions_are_what_they_are_called() -> None:
    for question in GENERATOR.questions("thinking", 20):
        [(a, b)] = re.findall(r"(\d+)\+(\d+)=", question.prompt)
        assert question.prompt.endswith("<think>") and question.answer == f"</think>{int(a) + int(b)}"
    for question in GENERATOR.questions("long-sums", 20):
        [(a, b)] = re.findall(r"(\d+)\+(\d+)=", question.prompt)
        assert len(a) == len(b) == 3 and question.answer == str(int(a) + int(b))
    for question in GENERATOR.questions("long-copy", 40):
        assert 9 <= len(question.answer.split()) <= 19 and f"Repeat: {question.answer}<" in question.prompt
