"""Training text and held-out questions, made from a seed.

Five tasks. `recall`: a list of who has what, and questions about it further on than the indexer can see at once;
`arithmetic`: sums of two numbers below 100; `copy`: words to say again; `tools`: requests answered by a call of one
of the tools on offer, and its result in words; `sentences`: plain text in which an animal's home follows from the
animal. All but the last are chats in the checkpoint's own template.

Held out by construction: `held_out` splits the *facts* that an answer is made of (this name with this thing, these
two numbers, ..) by a checksum; training text holds no fact of the one side, questions ask for no other.

A row of a batch holds one task. Weights say how much predicting a token counts: answers fully, all else little.
Free of JAX.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from model.tokenizer import ChatTemplate, Tokenizer
from runtime.training import words

HELD_OUT = 8  # one fact in so many is for the questions
OTHER_WEIGHT = 0.1  # of tokens that are not part of an answer
Chat = list[dict[str, Any]]
Rng = np.random.Generator


def held_out(*fact: object) -> bool:
    """Whether a fact is kept for the questions; the same on every machine."""
    return zlib.crc32(repr(fact).encode()) % HELD_OUT == 0


class Turn(NamedTuple):
    """A question, its right answer, and what follows (a tool's result and the answer in words)."""

    question: str
    answer: dict[str, Any]
    then: Chat = []

    def messages(self) -> Chat:
        return [{"role": "user", "content": self.question}, self.answer, *self.then]


@dataclasses.dataclass(frozen=True)
class Exercise:
    """A question: a rendered prompt and the text that must come back. `call`: the tool call meant; `fact_at`: where in
    the prompt the fact stands that a question of `recall` is about. `then`: what follows a right answer; its prompt is
    what an environment says, from the token that ends the answer on."""

    task: str
    prompt: str
    answer: str
    call: Mapping[str, Any] | None = None
    fact_at: int = 0
    then: Exercise | None = None

    @property
    def turns(self) -> list[Exercise]:
        """This one, and those that follow."""
        return [self, *(self.then.turns if self.then else ())]

    def is_right(self, text: str) -> bool:
        """Whether an answer, without the token that ends it, is the right one."""
        if self.task == "thinking":
            return text.rpartition("</think>")[2] == self.answer.rpartition("</think>")[2]
        if self.call is None:
            return text.startswith(self.answer) if self.task == "sentences" else text == self.answer
        arguments = {key: str(value) for key, value in self.call["arguments"].items()}
        return parse_call(text) == {"name": self.call["name"], "arguments": arguments}


def _one(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _until(rng: Rng, wanted: bool, draw: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Draws until a fact falls on the wanted side of the split."""
    while True:
        fact = draw()
        if held_out(*fact) == wanted:
            return fact


def _says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- the tasks: turns without end, from a generator and the side of the split -----------------------


def sums(rng: Rng, asked: bool, least: int = 0, below: int = 100) -> Iterator[Turn]:
    while True:
        a, b = _until(rng, asked, lambda: (int(rng.integers(least, below)), int(rng.integers(least, below))))
        yield Turn(f"{a}+{b}=", _says(str(a + b)))


def copies(rng: Rng, asked: bool, least: int = 3, most: int = 8) -> Iterator[Turn]:
    vocabulary = (*words.THINGS, *words.NAMES)
    while True:
        count = int(rng.integers(least, most + 1))
        said = " ".join(_until(rng, asked, lambda n=count: tuple(_one(rng, vocabulary) for _ in range(n))))
        yield Turn(f"Repeat: {said}", _says(said))


class Ownership(NamedTuple):
    """Who has what, in the order told."""

    things: dict[str, str]

    @classmethod
    def draw(
        cls, rng: Rng, people: int, first: tuple[str, str] | None = None, known: int = len(words.NAMES)
    ) -> Ownership:
        """`people` of the first `known` names with a thing each, none held out but `first`."""
        names = [words.NAMES[i] for i in rng.permutation(known)[:people]]
        things = {}
        for name in names:
            things[name] = _until(rng, False, lambda n=name: (n, _one(rng, words.THINGS)))[1]
        if first:
            things.pop(first[0], None)
            place = int(rng.integers(max(1, len(things) // 4)))  # early, so that the way back is long
            items = list(things.items())
            things = dict([*items[:place], first, *items[place:]])
        return cls(things)

    def told(self) -> str:
        return "Remember:" + "".join(f" {name}:{thing}" for name, thing in self.things.items()) + "."

    def told_again(self, rng: Rng, times: int) -> str:
        """Told, and then some of it once more in another order: each repetition is as good as a question."""
        names = tuple(self.things)
        return self.told()[:-1] + "".join(f" {n}:{self.things[n]}" for n in rng.permutation(names)[:times]) + "."

    def ask(self, name: str) -> Turn:
        return Turn(f"Find {name}", _says(f"Found {name}:{self.things[name]}"))


def errands(rng: Rng, asked: bool) -> Iterator[tuple[str, Turn]]:
    """Requests for a tool, with the tool's name."""
    while True:
        tool = _one(rng, tuple(words.TOOLS))
        arguments: dict[str, Any]
        if tool in ("weather", "clock"):
            _, city = _until(rng, asked, lambda t=tool: (t, _one(rng, words.CITIES)))
            arguments = {"city": city}
            if tool == "weather":
                request, result = f"How is the weather in {city}?", _one(rng, words.SKIES)
                answer = f"It is {result} in {city}."
            else:
                request, result = f"What time is it in {city}?", f"{rng.integers(24)}:{rng.integers(10, 60)}"
                answer = f"It is {result} in {city}."
        elif tool == "send":
            item, to = _until(rng, asked, lambda: (_one(rng, words.THINGS), _one(rng, words.NAMES)))
            arguments = {"item": item, "to": to}
            request, result, answer = f"Please send the {item} to {to}.", "sent", f"The {item} is sent to {to}."
        else:
            a, b = _until(rng, asked, lambda: (int(rng.integers(100)), int(rng.integers(100))))
            arguments = {"a": a, "b": b}
            request, result = f"Please add {a} and {b}.", str(a + b)
            answer = f"The sum is {result}."
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": tool, "arguments": arguments}]}
        yield tool, Turn(request, call, [{"role": "tool", "content": result}, _says(answer)])


def sentence(rng: Rng, asked: bool) -> tuple[str, str]:
    """Two sentences, cut where the second can be told from the first."""
    animals = tuple(words.HOMES)
    draw = (words.COLOURS, animals, words.MOVES, words.WAYS, words.PLACES)
    colour, animal, move, way, place = _until(rng, asked, lambda: tuple(_one(rng, choices) for choices in draw))
    return f"The {colour} {animal} {move} {way} the {place}. It", f" lives in the {words.HOMES[animal]}."


_SOURCES: dict[str, Callable[[Rng, bool], Iterator[Turn]]] = {
    "arithmetic": sums,
    "copy": copies,
    "thinking": sums,
    "long-sums": lambda rng, asked: sums(rng, asked, 100, 1000),
    "long-copy": lambda rng, asked: copies(rng, asked, 9, 19),
}


# --- rows ----------------------------------------------------------------------------------------


class TrainingBatch(NamedTuple):
    """tokens int32 [b,t]; weights float32 [b,t], of each token as something to predict; tasks int32 [b]."""

    tokens: np.ndarray
    weights: np.ndarray
    tasks: np.ndarray


TASKS = ("recall", "arithmetic", "copy", "tools", "sentences")
HARDER = ("thinking", "long-sums", "long-copy")  # asked, never trained: they leave room below full marks
TURNS = ("tool-answers", "tool-chains")  # in several turns: asked where there is an environment to answer calls
MOST_QUESTIONS = 100_000  # that one run asks of a task


class Generator:
    """Makes batches and questions with a checkpoint's own tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, seed: int = 0):
        self.tokenizer, self.template, self.seed = tokenizer, template, seed
        names = ("<|user|>", "<|assistant|>", "<|observation|>", "<think>")
        self._user, self._assistant, self._observation, self._think = map(tokenizer.token_id, names)
        self._things = {tokenizer.encode(f":{thing}")[-1] for thing in words.THINGS}

    def batch(self, step: int, rows: int, length: int, mix: Mapping[str, float]) -> TrainingBatch:
        """The batch of a step: a function of the seed and the step alone."""
        rng = np.random.default_rng([self.seed, step])
        shares = np.array([mix.get(task, 0.0) for task in TASKS])
        tasks = rng.choice(len(TASKS), rows, p=shares / shares.sum())
        tokens, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
        for row, task in enumerate(tasks):
            ids, counts = self.row(rng, TASKS[task], length)
            tokens[row], weights[row] = ids, counts
        weights[:, 0] = 0.0  # nothing comes before it
        return TrainingBatch(tokens, weights, tasks.astype(np.int32))

    def row(self, rng: Rng, task: str, length: int) -> tuple[list[int], list[float]]:
        """Documents of one task until `length` tokens are full; the last is cut."""
        ids: list[int] = []
        counts: list[float] = []
        while len(ids) < length:
            more = self._prose(rng) if task == "sentences" else self._chat(rng, task, length - len(ids))
            ids += more[0]
            counts += more[1]
        return ids[:length], counts[:length]

    def _prose(self, rng: Rng) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        counts: list[float] = []
        for i in range(int(rng.integers(2, 6))):
            given, follows = sentence(rng, False)
            for text, weight in ((" " * bool(i) + given, 2 * OTHER_WEIGHT), (follows, 1.0)):
                piece = self.tokenizer.encode(text)
                ids += piece
                counts += [weight] * len(piece)
        return [*ids, self.tokenizer.token_id("<|endoftext|>")], [*counts, 1.0]

    def _chat(self, rng: Rng, task: str, room: int) -> tuple[list[int], list[float]]:
        messages, tools = self._conversation(rng, task, room)
        if rng.random() < 0.1 and messages[-1].get("content") and messages[-2]["role"] == "user":
            # as asked with thinking on: this model has nothing to think, and says so
            text = self.template.render(messages[:-1], tools) + "</think>" + messages[-1]["content"]
        else:
            text = self.template.render(messages, tools, add_generation_prompt=False)
        ids = self.tokenizer.encode(text + "<|user|>")
        return ids, self._answer_weights(ids)

    def _conversation(self, rng: Rng, task: str, room: int) -> tuple[Chat, list[Any] | None]:
        if task == "recall":
            most = min(len(words.NAMES), max(5, room // 4))
            people = round(3 * (most / 3) ** rng.random())  # short lists as often as long ones: they teach the idea
            known = max(people, round(3 * (len(words.NAMES) / 3) ** rng.random()))  # some are met more often
            owners = Ownership.draw(rng, people, known=known)
            told = owners.told() if rng.random() < 0.5 else owners.told_again(rng, min(people, room // 8))
            turns = [owners.ask(_one(rng, tuple(owners.things))) for _ in range(max(1, (room - 2 * people - 5) // 9))]
            first = turns[0]._replace(question=told + " " + turns[0].question)
            return [m for turn in [first, *turns[1:]] for m in turn.messages()], None
        if task == "tools":
            found = errands(rng, False)
            asked = [next(found) for _ in range(max(1, (room - 90) // 40))]
            return [m for _, turn in asked for m in turn.messages()], self._offer(rng, {name for name, _ in asked})
        source = _SOURCES[task](rng, False)
        width = {"arithmetic": 11, "copy": 17}[task]
        return [m for _ in range(max(1, room // width)) for m in next(source).messages()], None

    @staticmethod
    def _offer(rng: Rng, needed: set[str]) -> list[Any]:
        """The tools on offer: those needed, perhaps one more, in any order."""
        names = sorted(needed | {_one(rng, tuple(words.TOOLS))})
        return [words.TOOLS[names[i]] for i in rng.permutation(len(names))]

    def _answer_weights(self, ids: list[int]) -> list[float]:
        """1 for what an assistant says and the token that ends its turn, and for what is told once more; little for
        all else."""
        counts: list[float] = []
        told: set[tuple[int, int]] = set()
        speaking, last = False, -1
        for token in ids:
            ends = token in (self._user, self._observation)
            begins = last == self._assistant and token != self._think  # `</think>` of a turn without thinking
            opens = token == self._think
            again = token in self._things and (last, token) in told
            answer = again or (speaking and not begins and not opens)
            counts.append(1.0 if answer else OTHER_WEIGHT)
            told.add((last, token))
            speaking = token == self._assistant or (speaking and not ends)
            last = token
        return counts

    # --- questions

    def questions(self, task: str, count: int, seed: int = 1) -> list[Exercise]:
        """Held-out questions of a task, one of `HARDER` or `TURNS` too; the same for the same seed."""
        rng = np.random.default_rng([self.seed, seed, (*TASKS, *HARDER, *TURNS).index(task), 2**31])
        return [self._question(rng, task) for _ in range(count)]

    def practice(self, rng: Rng, task: str) -> Exercise:
        """A question about facts that are not held out."""
        return self._question(rng, task, False)

    def _question(self, rng: Rng, task: str, asked_of: bool = True) -> Exercise:
        """One about held-out facts, or with `asked_of` False about the others."""
        if task == "sentences":
            given, follows = sentence(rng, asked_of)
            return Exercise(task, given, follows)
        if task in TURNS:
            tools, messages = self._errand(rng, asked_of) if task == "tool-answers" else self._chain(rng, asked_of)
            return self._turns(task, messages, tools)
        tools, call, before, fact = None, None, [], ""
        if task == "recall":
            name, thing = _until(rng, asked_of, lambda: (_one(rng, words.NAMES), _one(rng, words.THINGS)))
            owners = Ownership.draw(rng, len(words.NAMES), (name, thing))
            others = [other for other in owners.things if other != name]
            turns = [owners.ask(_one(rng, others)) for _ in range(int(rng.integers(0, 10)))] + [owners.ask(name)]
            turns[0] = turns[0]._replace(question=owners.told() + " " + turns[0].question)
            before, turn = [m for each in turns[:-1] for m in each.messages()], turns[-1]
            fact = f" {name}:{thing}"
        elif task == "tools":
            tool, turn = next(errands(rng, asked_of))
            tools, call = self._offer(rng, {tool}), turn.answer["tool_calls"][0]
        else:
            turn = next(_SOURCES[task](rng, asked_of))
        asked = [*before, {"role": "user", "content": turn.question}]
        if task == "thinking":  # asked with thinking on; this model has nothing to think, and says so
            return Exercise(task, self.template.render(asked), "</think>" + turn.answer["content"])
        prompt = self.template.render(asked, tools, enable_thinking=False)
        full = self.template.render([*asked, turn.answer], tools, add_generation_prompt=False)
        return Exercise(task, prompt, full.removeprefix(prompt), call, prompt.index(fact))

    def _errand(self, rng: Rng, asked_of: bool) -> tuple[list[Any], Chat]:
        tool, turn = next(errands(rng, asked_of))
        return self._offer(rng, {tool}), turn.messages()

    def _chain(self, rng: Rng, asked_of: bool) -> tuple[list[Any], Chat]:
        """Three numbers, by a tool that adds two."""
        a, b, c = _until(rng, asked_of, lambda: tuple(int(rng.integers(33)) for _ in range(3)))
        messages: Chat = [{"role": "user", "content": f"Please add {a}, {b} and {c}."}]
        for x, y in ((a, b), (a + b, c)):
            call = {"name": "add", "arguments": {"a": x, "b": y}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(x + y)},
            ]
        return self._offer(rng, {"add"}), [*messages, _says(f"The sum is {a + b + c}.")]

    def _turns(self, task: str, messages: Chat, tools: list[Any]) -> Exercise:
        """What an assistant says in a chat as exercises that follow one another."""
        found: Exercise | None = None
        for i in reversed(range(len(messages))):
            if messages[i]["role"] != "assistant":
                continue
            asked = self.template.render(messages[:i], tools, enable_thinking=False)
            said = self.template.render(messages[: i + 1], tools, add_generation_prompt=False)
            before = max((j for j in range(i) if messages[j]["role"] == "assistant"), default=-1) + 1
            heard = self.template.render(messages[:before], tools, add_generation_prompt=False) if before else ""
            call = messages[i].get("tool_calls", [None])[0]
            found = Exercise(task, asked.removeprefix(heard), said.removeprefix(asked), call, then=found)
        assert found is not None
        return found


_CALL = re.compile(r"<tool_call>([^<]+)((?:<arg_key>[^<]*</arg_key><arg_value>[^<]*</arg_value>)*)</tool_call>")
_ARGUMENT = re.compile(r"<arg_key>([^<]*)</arg_key><arg_value>([^<]*)</arg_value>")


def parse_call(text: str) -> dict[str, Any] | None:
    """The one tool call that `text` is, `{"name": .., "arguments": {..}}` with values as text; None if it is none."""
    found = _CALL.fullmatch(text)
    return None if found is None else {"name": found[1], "arguments": dict(_ARGUMENT.findall(found[2]))}
